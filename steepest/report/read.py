"""What the record files of a run folder say, in the form and the size in which report.html holds it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steepest.errors import SteepestError
from steepest.loggers.rows import read_rows, row_of

POINTS = 1000
"""Steps of which a page has the metrics; of a longer run it has every second, third, ... step."""
TRAINING_BYTES = 2_200_000
"""Size of the training samples on a page."""
VALIDATION_BYTES = 1_200_000
HEALTH = "health/"
_CHARACTERS = 20_000
"""Longer answers are cut in their middle."""
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Curves:
    """The metrics of a run, a column each."""

    steps: list[int]
    seconds: list[float]
    """Since the first row."""
    metrics: dict[str, list[float | None]]
    """None: the step has no such number, or one that is not finite."""
    every: int
    """1: all steps are there. 3: every third step, and those that were validated."""


@dataclass(frozen=True)
class Samples:
    """The samples of a page, and how many steps of the file are not on it."""

    rows: list[dict[str, Any]]
    steps_left_out: int = 0


def read_steps(path: Path) -> dict[int, dict[str, float]]:
    """Step -> its metrics and the time of its last row, from a metrics.jsonl; the rows of a step are merged. Raises
    SteepestError for a damaged file."""
    steps: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        steps.setdefault(row.pop("step"), {}).update(row)
    return steps


def curves(steps: Mapping[int, Mapping[str, float]]) -> Curves:
    """The columns of a run."""
    names = sorted({name for found in steps.values() for name in found} - {"time"})
    every, last = max(1, math.ceil(len(steps) / POINTS)), max(steps, default=0)
    keep = [
        step
        for step, found in steps.items()
        if step % every == 0 or step == last or any(name.startswith("val/") for name in found)
    ]
    times = [steps[step].get("time", 0.0) for step in keep]
    return Curves(
        steps=keep,
        seconds=[round(moment - times[0], 1) for moment in times],
        metrics={name: [number(steps[step].get(name)) for step in keep] for name in names},
        every=every,
    )


def number(value: Any) -> float | None:
    """Five digits of a finite number; None for anything else."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)


def events(steps: Mapping[int, Mapping[str, float]]) -> dict[str, list[list[int]]]:
    """Name of a health check -> the stretches of steps, [first, last], in which `health/<name>` is not 0."""
    found: dict[str, list[list[int]]] = {}
    before: int | None = None
    for step, metrics in steps.items():
        for name in (name for name, value in metrics.items() if name.startswith(HEALTH) and value):
            stretches = found.setdefault(name.removeprefix(HEALTH), [])
            if stretches and stretches[-1][1] == before:
                stretches[-1][1] = step
            else:
                stretches.append([step, step])
        before = step
    return found


def read_settings(path: Path) -> list[tuple[str, str, str]]:
    """(key, value, origin) of each line of a config.yaml. The origin is the line's comment, "default" where it has
    none. An empty list where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=_YAML)
    except yaml.YAMLError as error:
        raise SteepestError(f"{path}: this configuration cannot be read ({error}).") from error
    lines = text.splitlines()
    return [(key, *_value_and_origin(lines, node)) for key, node in _leaves(root, "")]


def _leaves(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode) or (prefix and node.flow_style):
        if node is not None:
            yield prefix.rstrip("."), node
        return
    for key, value in node.value:
        yield from _leaves(value, f"{prefix}{key.value}.")


def _value_and_origin(lines: Sequence[str], node: yaml.Node) -> tuple[str, str]:
    start, end = node.start_mark, node.end_mark
    line = lines[end.line] if end.line < len(lines) else ""
    if start.line == end.line:
        value = line[start.column : end.column]
    else:
        value = "\n".join([lines[start.line][start.column :], *lines[start.line + 1 : end.line], line[: end.column]])
    comment = line[end.column :].strip()
    return value.strip(), comment.removeprefix("#").strip() if comment.startswith("#") else "default"


def read_training_samples(path: Path) -> Samples:
    """The groups of a token_samples.jsonl, of steps spread over the run where they are too many for a page."""
    return _read_samples(path, TRAINING_BYTES)


def read_validation_samples(path: Path) -> Samples:
    """The answers of a samples.jsonl; long texts are cut in their middle."""
    found = _read_samples(path, VALIDATION_BYTES)
    return Samples([_answer(row) for row in found.rows], found.steps_left_out)


def _answer(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = {name.removeprefix("reward/"): value for name, value in row.items() if name.startswith("reward/")}
    kept = ("step", "id", "data_source", "ground_truth", "score", "truncated", "error")
    return {
        **{name: row[name] for name in kept if name in row},
        "prompt": row.get("prompt"),
        "response": cut(str(row.get("response")), _CHARACTERS),
        "parts": parts,
    }


def cut(text: str, limit: int) -> str:
    """A text of more than `limit` characters without its middle."""
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters are left out here]\n{text[-half:]}"


@dataclass(frozen=True)
class _Line:
    step: int
    start: int
    size: int


def _read_samples(path: Path, budget: int) -> Samples:
    """Rows of as many steps as fit into `budget` bytes: the first, the last and steps between them."""
    if not path.exists():
        return Samples([])
    lines = list(_index(path))
    sizes: dict[int, int] = {}
    for line in lines:
        sizes[line.step] = sizes.get(line.step, 0) + line.size
    chosen = steps_within(sizes, budget)
    rows, used = [], 0
    with path.open("rb") as file:
        for number, line in enumerate(lines, 1):
            if line.step in chosen and used + line.size <= budget:
                file.seek(line.start)
                rows.append(row_of(file.read(line.size), f"{path}:{number}"))
                used += line.size
    return Samples(rows, len(sizes) - len({row["step"] for row in rows}))


def _index(path: Path) -> Iterator[_Line]:
    """Where each whole line of a file of rows is. Only the step is read: the file may be large."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                head = line[:32].removeprefix(b'{"step": ').partition(b",")[0]
                step = int(head) if head.isdigit() else row_of(line, f"{path}:{number}")["step"]
                yield _Line(step, start, len(line))
            start += len(line)


def steps_within(sizes: Mapping[int, int], budget: int) -> Collection[int]:
    """As many steps as fit, at even distances; the first and the last are always among them."""
    steps = sorted(sizes)
    keep = len(steps)
    while keep > 2 and sum(sizes[step] for step in spread(steps, keep)) > budget:
        keep = max(2, keep * 9 // 10)
    return spread(steps, keep)


def spread(steps: Sequence[int], keep: int) -> set[int]:
    """`keep` of `steps`, the first and the last among them."""
    if keep >= len(steps):
        return set(steps)
    return {steps[round(place * (len(steps) - 1) / (keep - 1))] for place in range(keep)}
