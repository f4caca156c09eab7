"""Puts the tables of a results folder into a page, between its marks.

    python -m bench.table outputs/bench docs/performance.md
    python -m bench.table outputs/bench                       prints them

A block of the page starts with `<!-- bench:NAME -->` and ends with `<!-- /bench:NAME -->`. A block without a result
stays as it is, and its name is printed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.compare import cell, markdown
from bench.inputs import guarded_main
from bench.measure import BenchError

_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", flags=re.DOTALL)
_SHOWN = ("processor", "cores", "threads", "instructions", "memory_gib", "system", "python", "torch", "model", "date")


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result of the folder. Raises BenchError where there is none."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    results = [result for result in found if "tables" in result]
    if not results:
        raise BenchError(f"no results in {folder}: make bench writes them.")
    return results


def blocks(results: list[dict[str, Any]]) -> dict[str, str]:
    """Block name -> its text: one for each table, `machine`, and `comparisons`."""
    made: dict[str, str] = {}
    lines: list[str] = []
    rows: list[dict[str, Any]] = []
    for result in results:
        about = ", ".join(f"{key}: {cell(value)}" for key, value in result["about"].items())
        date = result["machine"].get("date", "")
        for name, table in result["tables"].items():
            made[name] = markdown(table) + "\n" + (f"\n{about}; measured {date}.\n" if about else "")
        if result["text"]:
            plain = result["text"].startswith("|")  # a table already
            made[result["name"]] = result["text"] + "\n" if plain else f"```text\n{result['text']}\n```\n"
        for comparison in result["comparisons"]:
            lines.append(comparison["line"])
            low, high = comparison["spread"]
            rows.append({
                "comparison": comparison["name"], "unit": comparison["unit"], "ours": _median(comparison["ours"]),
                "peer": _median(comparison["peer"]), "times faster": comparison["ratio"],
                "spread": f"{low:.2f} to {high:.2f}", "limit share": comparison["limit_share"],
            })  # fmt: skip
    if rows:
        made["comparisons"] = markdown(rows) + "\n\n```text\n" + "\n".join(lines) + "\n```\n"
    made["machine"] = machine(results)
    return made


def _median(values: list[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def machine(results: list[dict[str, Any]]) -> str:
    """The machine of the results. Raises BenchError if they come from several machines."""
    facts: dict[str, Any] = {}
    for result in results:
        for key in ("processor", "cores", "torch"):
            there = facts.setdefault(key, result["machine"].get(key))
            if there != result["machine"].get(key):
                raise BenchError(
                    f"the results are of different machines or versions ({key}: {there} and "
                    f"{result['machine'].get(key)}): measure them again on one."
                )
        facts |= {key: value for key, value in result["machine"].items() if key in _SHOWN}
    return "| | |\n|---|---|\n" + "".join(f"| {key} | {cell(facts[key])} |\n" for key in _SHOWN if key in facts)


def fill(page: str, texts: dict[str, str]) -> tuple[str, list[str]]:
    """The page with its blocks replaced, and the names of blocks that had no result."""
    missing: list[str] = []

    def replaced(found: re.Match[str]) -> str:
        if found[2] not in texts:
            missing.append(found[2])
            return found[0]
        return f"{found[1]}{texts[found[2]]}{found[3]}"

    return _BLOCK.sub(replaced, page), missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder that make bench wrote")
    parser.add_argument("page", type=Path, nargs="?", help="markdown file with marked blocks")
    args = parser.parse_args()
    texts = blocks(read_results(args.results))
    if args.page is None:
        print("\n".join(f"## {name}\n\n{text}" for name, text in texts.items()))
        return
    page, missing = fill(args.page.read_text(encoding="utf-8"), texts)
    args.page.write_text(page, encoding="utf-8")
    if missing:
        print(f"left as they were, no result: {', '.join(missing)}", file=sys.stderr)


if __name__ == "__main__":
    guarded_main(main)
