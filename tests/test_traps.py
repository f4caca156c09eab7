"""docs/traps.md names tests that exist, and leaves no trap out."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "traps.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))
ROWS = {int(row[0]): row[1] for row in re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, flags=re.MULTILINE)}


@cache
def functions_of(file: str) -> frozenset[str]:
    """Names of the test functions at the top of a file, without running it. A slow one is not in the default suite."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))
    return frozenset(f.name for f in functions if not any("slow" in ast.unparse(mark) for mark in f.decorator_list))


@pytest.mark.parametrize(("file", "name"), NAMED, ids=[name for _, name in NAMED])
def test_the_test_exists_and_runs_by_default(file: str, name: str) -> None:
    assert name in functions_of(file)


def test_every_trap_is_answered() -> None:
    assert list(ROWS) == list(range(1, 35))
    for number, row in ROWS.items():
        assert "`tests/" in row or number == 34, number


def test_every_mention_of_a_test_is_in_the_form_that_is_checked() -> None:
    assert len(re.findall(r"::test_", PAGE)) == len(re.findall(r"`tests/[\w/]+\.py::test_\w+`", PAGE))
    assert len(NAMED) > 60
