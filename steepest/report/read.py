"""What the record files of a run folder say, in the form and the size in which report.html holds it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from steepest.errors import SteepestError
from steepest.loggers.rows import read_rows, row_of

POINTS = 1000
"""Steps of which a page has the metrics; of a longer run it has every second, third, ... step."""
TRAINING_BYTES, VALIDATION_BYTES = 2_200_000, 1_200_000
"""Size of the samples on a page."""
HEALTH = "health/"
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
class Lines:
    """Lines of a file of rows that a page holds as they are, and how many steps of the file are not among them."""

    lines: list[str]
    steps_left_out: int = 0


def read_steps(path: Path) -> dict[int, dict[str, float]]:
    """Step -> its metrics and the time of its last row, from a metrics.jsonl; the rows of a step are merged. Raises
    SteepestError for a damaged file."""
    steps: dict[int, dict[str, float]] = {}
    for row in read_rows(path):
        steps.setdefault(row.pop("step"), {}).update(row)
    return steps


def curves(steps: Mapping[int, Mapping[str, float]], points: int = POINTS) -> Curves:
    """The columns of a run, of about `points` steps."""
    names = sorted({name for found in steps.values() for name in found} - {"time"})
    every, last = max(1, math.ceil(len(steps) / points)), max(steps, default=0)
    keep = [
        step
        for step, found in steps.items()
        if step % every == 0 or step == last or any(name.startswith("val/") for name in found)
    ]
    rows = [steps[step] for step in keep]
    times = [row.get("time", 0.0) for row in rows]
    return Curves(
        steps=keep,
        seconds=[round(moment - times[0], 1) for moment in times],
        metrics={name: [number(row.get(name)) for row in rows] for name in names},
        every=every,
    )


def number(value: float | None) -> float | None:
    """Five digits of a finite number; None for anything else."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.5g}") if -1e5 < value < 1e5 else round(value)


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


@dataclass(frozen=True)
class _Place:
    step: int
    start: int
    size: int


def sample_lines(path: Path, budget: int) -> Lines:
    """The rows of as many steps as fit into `budget` bytes: the first, the last and steps between them.

    They are not parsed, which would take most of the time of a page: the page does it, line by line.
    """
    if not path.exists():
        return Lines([])
    places = list(_index(path))
    sizes: dict[int, int] = {}
    for place in places:
        sizes[place.step] = sizes.get(place.step, 0) + place.size
    chosen, left = steps_within(sizes, budget), budget
    lines, steps = list[str](), set[int]()
    with path.open("rb") as file:
        for place in places:
            if place.step in chosen and place.size <= left:
                file.seek(place.start)
                lines.append(file.read(place.size).decode("utf-8", "replace").rstrip())
                steps.add(place.step)
                left -= place.size
    return Lines(lines, len(sizes) - len(steps))


def _index(path: Path) -> Iterator[_Place]:
    """Where each whole line of a file of rows is. Only the step is read: the file may be large."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                head = line[:32].removeprefix(b'{"step": ').partition(b",")[0]
                step = int(head) if head.isdigit() else row_of(line, f"{path}:{number}")["step"]
                yield _Place(step, start, len(line))
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
