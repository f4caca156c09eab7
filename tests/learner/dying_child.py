"""Run by test_checkpoint.py: saves a step again and is gone, as by a kill, before a chosen renaming of its folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from steepest.learner.checkpoint import CheckpointStore

EXIT = 9


def main(folder: str, step: int, renames: int) -> None:
    """Save `step` with the content b"after"; the process ends before its folder is renamed once more than `renames`."""
    seen = [0]

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and any(str(path).endswith(f"global_step_{step}") for path in arguments[:2]):
            seen[0] += 1
            if seen[0] > renames:
                os._exit(EXIT)

    def write(path: Path) -> None:
        (path / "model.bin").write_bytes(b"after")

    store = CheckpointStore(folder)
    sys.addaudithook(die)
    store.save(step, {"actor": write}, {"step": step})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
