"""The list of scripts/mutate fits the code, so that it can be run at any time, and leaves no file of core out."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "steepest" / "core"
MIN_A_FILE = 3


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Found as scripts/mutate finds them: beside it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("mutations").MUTATIONS


def test_every_mutation_is_found_once_and_changes_something(mutations: list[Any]) -> None:
    texts = {m.file: (CORE / m.file).read_text(encoding="utf-8") for m in mutations}
    assert [(m.file, m.old) for m in mutations if texts[m.file].count(m.old) != 1 or m.old == m.new] == []


def test_every_file_with_functions_is_broken_in_some_ways(mutations: list[Any]) -> None:
    listed = Counter(m.file for m in mutations)
    files = [file for file in CORE.rglob("*.py") if "\ndef " in file.read_text(encoding="utf-8")]
    names = sorted(str(file.relative_to(CORE)) for file in files)
    assert [name for name in names if listed[name] < MIN_A_FILE] == []
