"""Writes the table of families into docs/models.md: `python -m tests.models.sweep docs/models.md`.

Every causal language model of the installed transformers is made tiny, loaded from a folder and run: generation,
trainer's passes, an update (`tests/support/architectures.py`). It takes some minutes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import transformers

from tests.support.architectures import MODEL_TYPES, ORDER, Verdict, verdict

BEGIN, END = "<!-- families: written by python -m tests.models.sweep -->", "<!-- end of families -->"


def rows_of_page(page: Path) -> dict[str, list[str]]:
    """The page's table: how a family runs -> the families."""
    table = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines() if line.startswith("|")]
    return {row: families.strip("`").split("`, `") for row, families in lines[2:]}


def table(found: list[Verdict]) -> str:
    rows: dict[str, list[str]] = {}
    for one in found:
        rows.setdefault(one.row, []).append(one.model_type)
    order = sorted(rows, key=lambda row: (next(i for i, start in enumerate(ORDER) if row.startswith(start)), row))
    lines = [f"| {row} | {', '.join(f'`{name}`' for name in rows[row])} |" for row in order]
    head = f"| transformers {transformers.__version__} | Families (`model_type`) |\n|---|---|\n"
    return head + "\n".join(lines) + "\n"


def main(page: Path) -> None:
    """Run the sweep and replace the table."""
    found: list[Verdict] = []
    for model_type in MODEL_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(verdict(model_type, Path(folder), thorough=False))
        print(model_type, found[-1].row, found[-1].reason, found[-1].numbers, flush=True)
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(found)}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
