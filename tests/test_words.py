"""The check of words: it finds what is planted, lets plain English and code through, and knows where it reads."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "words.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("words", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # NamedTuple looks its module up there
    spec.loader.exec_module(module)
    return module


CHECK = load()

PLANTED = [
    ('"""How to mend it."""', 2, "mend"),
    ('"""A config that was mended."""', 2, "mended"),
    ("# every failure is told at the end", 2, "told"),
    ("text = 'The page tells why.'", 2, "tells"),
    ("text = f'{1}: as said above'", 2, "said"),
    ("print('The run goes on from step 3.')", 2, "goes on from"),
    ('"""A run that has gone\n\non from a checkpoint."""', 2, "gone on from"),
    ("# drawn anew in each step", 2, "anew"),
    ('"""The file lies beside the weights."""', 2, "beside"),
    ("text = 'Beside the text'", 2, "Beside"),
    ("# set in any case", 2, "in any case"),
    ('"""Waking a thread is dear."""', 2, "dear"),
    ('"""One line.\n\nWhom the loss reads."""', 4, "Whom"),
    ('"""States for who needs them."""', 2, "for who"),
    ('"""Keeps tokens at bay."""', 2, "at bay"),
    ('"""Memory that training leaves over."""', 2, "leaves over"),
    ('class A:\n    x = 1\n    """Of one model."""', 4, "Of"),
    ('"""The size. Of those that wait."""', 2, "Of"),
    ("# Of the rows that are active now.", 2, "Of"),
    ('"""By name: what each device reports."""', 2, "By name:"),
    ('"""As `f`, but faster."""', 2, "As `x`, but"),
    ('"""The same for a head."""', 2, "The same for a head."),
    ('"""For the summary at start."""', 2, "For the summary at start."),
    ('"""To the next tokens."""', 2, "To the next tokens."),
    ("# one\n# two told", 3, "told"),
]


@pytest.mark.parametrize(("code", "line", "word"), PLANTED)
def test_a_planted_word_is_found_with_its_line(tmp_path: Path, code: str, line: int, word: str) -> None:
    file = tmp_path / "new.py"
    file.write_text(f"x = 1\n{code}\n")
    found = CHECK.problems(file, "new.py")
    assert [text.split("; write: ")[0] for text in found] == [f"new.py:{line}: {word!r}"], found
    assert found[0].split("; write: ")[1]


FINE = [
    "told = said = anew = mend = 1",
    "def tells(beside): return beside.mended",
    '"""`told` and ``beside`` are names here."""',
    '"""The optimizer\'s order. Of course it is fixed."""',
    '"""See the README; --help says more, and it can tell them apart."""',
    '"""Tokens of one model, for each of several rows."""',
    '"""For two rows, it returns both."""',
    '"""To the console it writes one line, to the file all."""',
    '"""As in `f`, every row counts."""',
    '"""By default all rows count."""',
    "# besides, amended and recommended are other words; so is endear",
    "# the run goes on; goes on with the next step",
    'text = "Of a text in code only the words count"',
    'pattern = "For"',
    "text = 'whoever'",
]


@pytest.mark.parametrize("code", FINE)
def test_plain_english_and_names_in_code_are_let_through(tmp_path: Path, code: str) -> None:
    file = tmp_path / "new.py"
    file.write_text(f"{code}\n")
    assert CHECK.problems(file, "new.py") == []


PAGE = """# Title

A run that goes
on from a checkpoint. Of these `told` is code.

```
told, in a block
```

| a | beside |
"""


def test_a_page_is_read_outside_of_its_code(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    found = [text.split("; write: ")[0] for text in CHECK.problems(file, "page.md")]
    assert found == ["page.md:3: 'goes on from'", "page.md:4: 'Of'", "page.md:10: 'beside'"]


def test_scripts_without_suffix_are_read_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("#!/usr/bin/env bash\necho done # told below\n")
    (tmp_path / "tool").write_text("#!/usr/bin/env python3\ntold = 1  # told\n")
    assert [text.split(";")[0] for text in CHECK.problems(tmp_path / "run", "run")] == ["run:2: 'told'"]
    assert [text.split(";")[0] for text in CHECK.problems(tmp_path / "tool", "tool")] == ["tool:2: 'told'"]


def test_a_tree_is_read_where_prose_is_and_not_elsewhere(tmp_path: Path) -> None:
    read = ["steepest/a.py", "steepest/b/c.py", "bench/a.py", "scripts/check", "examples/a.sh", "docs/a.md",
            "docs/en/a.md", "README.md", "CONTRIBUTING.md", "Makefile"]  # fmt: skip
    not_read = ["docs/zh/a.md", "tests/test_a.py", "CHANGELOG.md", "scripts/words.py", "steepest/config/a.yaml"]
    for name in read + not_read:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("# told\n")
    assert sorted(text.split(":")[0] for text in CHECK.all_problems(tmp_path)) == sorted(read)


def test_the_command_prints_what_it_finds_and_exits_with_1(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("# told\n")
    done = subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (1, CHECK.problems(file, str(file)))
    file.write_text("# plain\n")
    done = subprocess.run([sys.executable, SCRIPT, file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "plain words everywhere\n")
