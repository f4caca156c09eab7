"""Tests pass objects in; they do not reach into the trainer and replace its parts.

A test that replaces a function of ours depends on where that function lies and on who calls it, so it fails when code
moves, and it tests code that no user runs. What a test needs to vary is an argument, an entry of a registry, a variable
of the environment, or a real file.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OURS = ("steepest.trainer", "steepest.learner", "steepest.assembly", "steepest.cluster")
"""Nothing of these is replaced in any test."""
MOST = 30
"""Calls of `setattr` of a MonkeyPatch in all tests together: for what other packages and the system do."""


@dataclass(frozen=True)
class Patch:
    """One call of `setattr` of a MonkeyPatch."""

    line: int
    target: str
    """What is replaced, with the names of imports resolved: `steepest.hub.find.Found`, `shutil.disk_usage`."""


def patches(code: str) -> Iterator[Patch]:
    """Every `NAME.setattr(...)`, whatever the MonkeyPatch is called."""
    if ".setattr(" not in code:
        return
    tree = ast.parse(code)
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr"):
            continue
        target, *rest = node.args
        if len(rest) >= 2:
            attribute = rest[0].value if isinstance(rest[0], ast.Constant) else "?"
            yield Patch(node.lineno, f"{_resolved(target, names)}.{attribute}")
        else:
            yield Patch(node.lineno, _resolved(target, names))


def _imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Local name -> full name, for every import of the file and every `name = import_module("...")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                first = item.name.split(".")[0]
                yield (item.asname or first, item.name if item.asname else first)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for item in node.names:
                yield (item.asname or item.name, f"{node.module}.{item.name}")
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and "import_module" in ast.unparse(node.value)
        ):
            yield (node.targets[0].id, _text(node.value))


def _resolved(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_resolved(node.value, names)}.{node.attr}"
    if isinstance(node, ast.Call) and not node.args:
        return _resolved(node.func, names)
    return _text(node)


def _text(node: ast.AST) -> str:
    """The constant texts of an expression, one after another: "steepest.trainer.main_" of an f-string."""
    found = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return "".join(found) or ast.unparse(node)


def offences(code: str) -> list[str]:
    """Patches of what is ours, as `line: target`."""
    return [
        f"{patch.line}: {patch.target} is replaced; pass an object in instead"
        for patch in patches(code)
        if patch.target.startswith(OURS)
    ]


def files() -> list[Path]:
    return sorted(path for path in TESTS.rglob("*.py") if path != Path(__file__))


def test_no_test_replaces_a_part_of_the_trainer() -> None:
    found = [f"{file.relative_to(TESTS)}:{text}" for file in files() for text in offences(file.read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_few_things_are_replaced_at_all() -> None:
    counts = {str(file.relative_to(TESTS)): len(list(patches(file.read_text("utf-8")))) for file in files()}
    assert sum(counts.values()) <= MOST, {name: count for name, count in counts.items() if count}


PLANTED = [
    ("from steepest.learner.actor import Actor\nmonkeypatch.setattr(Actor, 'log_probs', f)\n", 2),
    ("from steepest.trainer import build_step\nmonkeypatch.setattr(build_step, 'Timer', f)\n", 2),
    ("import steepest.cluster.local as local\n\nmonkeypatch.setattr(local.Pool, 'run', f)\n", 3),
    ("def f(patch):\n    from steepest.assembly import compute as c\n    patch.setattr(c, 'x', 1)\n", 3),
    ("monkeypatch.setattr('steepest.learner.optim.Optimizer.step', f)\n", 1),
    ("monkeypatch.setattr(f'steepest.trainer.{name}.main', f)\n", 1),
    ("with pytest.MonkeyPatch.context() as p:\n    p.setattr('steepest.assembly.x', f, raising=False)\n", 2),
    ("module = importlib.import_module(f'steepest.trainer.main_{job}')\nmonkeypatch.setattr(module, 'main', f)\n", 2),
    ("from steepest.learner import checkpoint\nmonkeypatch.setattr(checkpoint.os, 'rename', f)\n", 2),
]


@pytest.mark.parametrize(("code", "line"), PLANTED)
def test_a_planted_offence_is_found_with_its_line(code: str, line: int) -> None:
    (found,) = offences(code)
    assert found.startswith(f"{line}: steepest.")


@pytest.mark.parametrize(
    "code",
    [
        "import shutil\nmonkeypatch.setattr(shutil, 'disk_usage', f)\n",
        "from steepest.hub import find\nmonkeypatch.setattr(find, 'x', f)\n",
        "monkeypatch.setenv('steepest.trainer', '1')\nsetattr(trainer, 'x', 1)\n",
    ],
)
def test_what_is_allowed_is_let_through(code: str) -> None:
    assert offences(code) == []


CLOCKS = r"\btime\.(?:time|monotonic|perf_counter|process_time|thread_time)(?:_ns)?\("
MAY_READ_A_CLOCK = {
    "process/test_openmp_waiting.py": "gives up waiting",
    "trainer/run/test_resume.py": "kills a run at a random moment",
    "trainer/test_real.py": "kills a run at a random moment",
    "trainer/test_speed.py": "a run is said to have begun some seconds ago",
    "hub/test_find.py": "sets the time of a file",
    "loggers/test_jsonl.py": "a time lies between two others",
    "bench/test_results.py": "has two moments looked up in a list of samples",
    "support/processes.py": "gives up waiting",
    "support/work.py": "processor seconds of its own thread, at a hundred times of what they should be",
}
"""Files whose result does not depend on how fast the machine is, although they read a clock."""


def test_no_test_measures_how_long_something_takes() -> None:
    reading = {str(file.relative_to(TESTS)) for file in files() if re.search(CLOCKS, file.read_text("utf-8"))}
    assert reading == set(MAY_READ_A_CLOCK)


def test_every_way_to_patch_is_counted() -> None:
    code = (
        "monkeypatch.setattr(a, 'b', c)\npatch.setattr('a.b', c)\nself.patch.setattr(a, 'b', c)\nsetattr(a, 'b', c)\n"
    )
    assert [patch.target for patch in patches(code)] == ["a.b", "a.b", "a.b"]
