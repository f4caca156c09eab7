"""What preflight found: groups of checks, what the model sees and writes, the prediction, the verdict."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import steepest
from steepest.checks import EXIT_OK, EXIT_PROBLEM, Check, Group, count, worst
from steepest.checks.text import STYLES, Row, found, group_rows, write
from steepest.config import tree
from steepest.config.schema import Config
from steepest.console import printable, shortened

SCHEMA = 1
"""Version of the JSON. It increases when a field or the name of a line is removed or changes its meaning."""
_SHOWN = 1200


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    prompt: str
    """Id of its row, file:row."""
    text: str
    score: float | None
    ground_truth: str
    num_tokens: int
    cut: bool
    error: str | None


@dataclass(frozen=True)
class Prediction:
    """The whole run, from what was measured on a part of a step."""

    steps: int
    seconds: float
    step_seconds: float
    """Seconds of one step, without validation and saving."""
    peak_bytes: int
    """Memory of the process, or of the card."""
    checkpoint_bytes: int
    disk_bytes: int
    """All checkpoints that are kept at once."""


@dataclass
class Report:
    """The whole report."""

    groups: list[Group] = field(default_factory=list)
    prompts: list[tuple[str, str]] = field(default_factory=list)
    """Id of a row, and its prompt as the model sees it, special tokens included."""
    answers: list[Answer] = field(default_factory=list)
    prediction: Prediction | None = None
    stage: str = "data"
    """What is being looked at; the heading of an error that ends the report early."""
    seconds: float = 0.0

    def add(self, name: str, lines: Sequence[Check]) -> None:
        """Add a group, unless it is empty."""
        if lines:
            self.groups.append(Group(name, list(lines)))

    @property
    def lines(self) -> list[Check]:
        """All lines, in order."""
        return [line for group in self.groups for line in group.lines]

    @property
    def exit_code(self) -> int:
        """1 with a problem, else 0; warnings do not count."""
        return EXIT_PROBLEM if worst(self.lines) == "problem" else EXIT_OK

    @property
    def keys(self) -> list[str]:
        """The keys that remedies name, and the texts of problems; those of problems first."""
        keys = sorted((key for key in tree.leaves(Config) if "." in key), key=len, reverse=True)
        known = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, keys))})(?!\w)")  # the longest first
        named: dict[str, None] = {}
        for status in ("problem", "warning"):
            for line in (line for line in self.lines if line.status == status):
                text = f"{line.text if status == 'problem' else ''} {line.remedy or ''}"
                named |= dict.fromkeys(known.findall(text))
        return list(named)

    def as_json(self) -> dict[str, Any]:
        """The object of `steepest preflight --json`; docs/preflight.md describes it."""
        return {
            "schema": SCHEMA,
            "steepest": steepest.__version__,
            "status": worst(self.lines),
            "counts": {status: count(self.lines, status) for status in ("ok", "warning", "problem")},
            "seconds": round(self.seconds, 2),
            "keys": self.keys,
            "prompts": [{"id": uid, "text": text} for uid, text in self.prompts],
            "answers": [asdict(answer) for answer in self.answers],
            "prediction": None if self.prediction is None else asdict(self.prediction),
            "groups": [group.as_json() for group in self.groups],
        }

    def show(self, *, as_json: bool) -> None:
        """Print the report on standard output."""
        if as_json:
            print(json.dumps(self.as_json(), indent=2))
        else:
            write(self._rows)

    def _rows(self, width: int) -> Iterator[Row]:
        yield f"steepest {steepest.__version__} preflight", "bold"
        for number, (uid, text) in enumerate(self.prompts, 1):
            yield "", ""
            yield f"prompt {number}, row {uid}, as the model sees it", "bold"
            for line in shown(text).split("\n"):
                yield f"  | {line}", ""
        if self.answers:
            yield "", ""
            yield f"{len(self.answers)} sampled answers", "bold"
        for answer in self.answers:
            score = "failed" if answer.score is None else f"{answer.score:g}"
            cut = ", cut" if answer.cut else ""
            yield (
                f"  score {score}, right: {shortened(answer.ground_truth, 40)}, {answer.num_tokens} tokens{cut}",
                "",
            )
            yield f"    | {shortened(answer.text, max(40, width - 8))}", ""
        yield from group_rows(self.groups, width)
        yield "", ""
        for line in textwrap.wrap(self._verdict(), width, break_long_words=False, break_on_hyphens=False):
            yield line, STYLES[worst(self.lines)]

    def _verdict(self) -> str:
        problems = count(self.lines, "problem")
        text = found(problems, count(self.lines, "warning"), self.seconds)
        text += " Correct the problems before you start the run." if problems else " The run can start."
        return text + (f" Keys to look at: {', '.join(self.keys)}." if self.keys else "")


def shown(text: str) -> str:
    """A prompt for the terminal; a long one is cut."""
    if len(text) > _SHOWN:
        text = f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"
    return printable(text)
