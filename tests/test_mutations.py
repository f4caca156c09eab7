"""The list of scripts/mutate fits the code, so that it can be run at any time, and leaves out no file of the core and
none of the learner's that computes."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "steepest"
MIN_A_FILE = 3
WITHOUT_NUMBERS = {"learner/checkpoint.py", "learner/checkpoint_files.py", "learner/rng.py"}
"""Files and random states: what they do wrong shows in a resumed run (tests/learner/test_resume.py)."""
MASK_WRITERS = (
    "trainer/experience/scoring.py",
    "trainer/algorithm/row_selection.py",
    "trainer/algorithm/correction.py",
)


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Found as scripts/mutate finds them: beside it."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("mutations").MUTATIONS


def test_every_mutation_is_found_once_and_changes_something(mutations: list[Any]) -> None:
    texts = {m.path: (SOURCE / m.path).read_text(encoding="utf-8") for m in mutations}
    assert [(m.path, m.old) for m in mutations if texts[m.path].count(m.old) != 1 or m.old == m.new] == []


def test_every_file_of_core_with_functions_is_broken_in_some_ways(mutations: list[Any]) -> None:
    listed = Counter(m.path for m in mutations)
    files = [file for file in (SOURCE / "core").rglob("*.py") if "\ndef " in file.read_text(encoding="utf-8")]
    names = sorted(str(file.relative_to(SOURCE)) for file in files)
    assert [name for name in names if listed[name] < MIN_A_FILE] == []


def test_every_file_of_the_learner_that_computes_is_broken_in_some_ways(mutations: list[Any]) -> None:
    listed = Counter(m.path for m in mutations)
    files = [file for file in (SOURCE / "learner").rglob("*.py") if file.name != "__init__.py"]
    names = {str(file.relative_to(SOURCE)) for file in files} - WITHOUT_NUMBERS
    assert [name for name in sorted(names) if listed[name] < MIN_A_FILE] == []


def test_what_writes_masks_is_broken_in_some_ways(mutations: list[Any]) -> None:
    listed = Counter(m.path for m in mutations)
    assert [name for name in MASK_WRITERS if listed[name] < 2] == []
