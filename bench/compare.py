"""Compares figures of ours with a peer's: the ratio, its spread, and the line that scripts read."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_LINE = re.compile(r"^bench: (\w+) ours=(\S+) peer=(\S+) ratio=(\S+) limit_share=(\S+)$")


@dataclass(frozen=True)
class Comparison:
    """Rounds of ours and of a peer on one workload, in alternation."""

    name: str
    unit: str
    """tokens/s: more is better; s: less is better."""
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    limit_share: float
    """(time of our passes' arithmetic at this machine's measured rate) / (our time)."""

    def ratio(self, ours: float, peer: float) -> float:
        """How many times faster ours is. Below 1 the peer is faster."""
        return ours / peer if self.unit == "tokens/s" else peer / ours

    @property
    def median_ratio(self) -> float:
        return self.ratio(statistics.median(self.ours), statistics.median(self.peer))

    @property
    def spread(self) -> tuple[float, float]:
        """The ratios of the least and of the most favourable pair of figures."""
        ratios = [self.ratio(one, other) for one in self.ours for other in self.peer]
        return min(ratios), max(ratios)

    def line(self) -> str:
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        return (
            f"bench: {self.name} ours={ours:.4g} peer={peer:.4g} ratio={self.median_ratio:.3g} "
            f"limit_share={self.limit_share:.3g}"
        )

    def row(self) -> dict[str, Any]:
        """The row for the results file."""
        return {**asdict(self), "ratio": self.median_ratio, "spread": self.spread, "line": self.line()}


def parse_line(line: str) -> dict[str, Any]:
    """The fields of a `bench:` line. Raises ValueError for anything else."""
    found = _LINE.match(line.strip())
    if not found:
        raise ValueError(f"not a bench line: {line!r}")
    keys = ("ours", "peer", "ratio", "limit_share")
    return {"name": found[1], **{key: float(value) for key, value in zip(keys, found.groups()[1:], strict=True)}}


def write_results(
    folder: Path,
    name: str,
    *,
    machine: Mapping[str, Any],
    about: Mapping[str, Any],
    comparisons: Sequence[Comparison] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    text: str = "",
) -> Path:
    """Write `name.json`: the machine and its limits, what was run, the comparisons, and rows of tables or text."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "name": name,
        "machine": dict(machine),
        "about": dict(about),
        "comparisons": [comparison.row() for comparison in comparisons],
        "tables": {title: [dict(row) for row in rows] for title, rows in (tables or {}).items()},
        "text": text,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a table; numbers with three or four figures, missing values as a dash."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
