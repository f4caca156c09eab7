"""Times the parts of a peer's step. It uses the standard library only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Clock:
    """start(), mark("gen"), mark("logp"), ..., stop() make one record, written at once as a line of `out`.

    A record has `end` (seconds since 1970), `step` (its seconds), the parts, and the keywords of `stop`. Time between
    stop() and start() belongs to no step.
    """

    def __init__(self, out: Path, **about: Any) -> None:
        self._out = out
        self._out.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")
        self._began = self._last = time.perf_counter()
        self._parts: dict[str, float] = {}

    def start(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts = {}

    def mark(self, name: str) -> None:
        """Count the time since the last mark as part `name`."""
        now = time.perf_counter()
        self._parts[name] = self._parts.get(name, 0.0) + now - self._last
        self._last = now

    def stop(self, **told: Any) -> None:
        record = {"end": time.time(), "step": time.perf_counter() - self._began, "parts": self._parts, **told}
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_records(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the facts about the run, the records of its steps)."""
    first, *records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return first["about"], records
