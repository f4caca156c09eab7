"""Generated grade-school problems of two and three steps, in GSM8K's row and answer format, for models of any size.

The words and the numbers (0 to 99) are a closed set of fewer than 300 pieces. A tokenizer with one token per piece
reads a question in 20 to 35 tokens, and a model of 0.2M parameters can learn to answer. Train and test share no
problem: a hash of a problem's kind and numbers decides which split it belongs to; names and wording do not count.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from steepest.data.files import WrittenFile, write_parquet
from steepest.data.prepare.gsm8k import math_row, row_schema
from steepest.data.sampler import permutation
from steepest.errors import ConfigError, DataError

DATA_SOURCE = "steepest/arithmetic"
LARGEST = 99
# ranges of the numbers in the texts: so few sums that a model of 0.2M parameters knows them after the warm-up
STARTS, AMOUNTS, GROUPS, SHARES = (3, 15), (2, 8), (2, 5), (3, 12)
T = TypeVar("T")
PEOPLE = (("Tom", "he"), ("Ann", "she"), ("Ben", "he"), ("Mia", "she"), ("Sam", "he"), ("Eva", "she"))
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
LABELS = ("First", "Then", "Last")
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
HAS = "{name} has {x} {things}."
BOXES = "{name} has {x} boxes of {y} {things}."
CHANGES = {
    "+": (
        "{label} {pronoun} buys {x} more.",
        "{label} {pronoun} finds {x} more.",
        "{label} {pronoun} gets {x} from {friend}.",
    ),
    "-": ("{label} {pronoun} sells {x}.", "{label} {pronoun} loses {x}.", "{label} {pronoun} gives {x} to {friend}."),
}
COMPARES = {"+": "{friend} has {x} more than {name}.", "-": "{friend} has {x} fewer than {name}."}
TWICE = "{friend} has twice as many."
TOGETHER = {"+": "{label} they find {x} more.", "-": "{label} they sell {x}."}
ASK_NOW = "How many {things} does {name} have now?"
ASK_TOGETHER = "How many {things} do they have together?"
ASK_SHARE = "{label} {pronoun} puts them equally in {x} bags. How many {things} are in each bag?"


@dataclass(frozen=True)
class Problem:
    """A question with the steps (left, sign, right, result) that answer it. Each step needs the one before it."""

    kind: str
    question: str
    steps: tuple[tuple[int, str, int, int], ...]

    @property
    def key(self) -> str:
        """Kind and all numbers of the problem, without names and wording. Train and test share no key."""
        return f"{self.kind} {self.steps}"

    @property
    def answer(self) -> str:
        """The worked answer: one line per step, then `#### N`."""
        return _worked(self.steps)

    @property
    def shortcut(self) -> str:
        """The usual wrong answer, which looks right: it leaves out the second step; a third step uses the first
        result."""
        first, last = self.steps[0], self.steps[2:]
        left, sign, right, _ = last[0] if last else (0, "", 0, 0)
        left = first[3]
        skipped = ((left, sign, right, _apply(left, sign, right)),) if last else ()
        return _worked((first, *skipped), labels=("First", "Last"))

    @property
    def result(self) -> int:
        return self.steps[-1][3]


def _worked(steps: Sequence[tuple[int, str, int, int]], labels: Sequence[str] = LABELS) -> str:
    lines = [f"{label} {a} {op} {b} = {c}" for label, (a, op, b, c) in zip(labels, steps, strict=False)]
    return "\n".join([*lines, f"#### {steps[-1][3]}"])


def _apply(left: int, sign: str, right: int) -> int:
    return _OPERATORS[sign](left, right)


class _Draw:
    """Random choices made with `random()` alone: Python guarantees its sequence for a seed in every version."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        return low + int(self._random() * (high - low + 1))

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]


class _Story:
    """A problem under construction: its sentences and steps. A number outside 1..LARGEST makes it invalid."""

    def __init__(self, draw: _Draw) -> None:
        self.draw = draw
        name, pronoun = draw.pick(PEOPLE)
        friend = draw.pick([person for person, _ in PEOPLE if person != name])
        self.words = {"name": name, "pronoun": pronoun, "friend": friend, "things": draw.pick(THINGS)}
        self.sentences: list[str] = []
        self.steps: list[tuple[int, str, int, int]] = []
        self.valid = True

    def say(self, sentence: str, x: int = 0, y: int = 0) -> None:
        # a sentence of change begins with the word that the answer's line for it begins with
        label = LABELS[min(len(self.steps), len(LABELS) - 1)]
        self.sentences.append(sentence.format(label=label, x=x, y=y, **self.words))

    def step(self, left: int, sign: str, right: int) -> int:
        result = _apply(left, sign, right)
        self.valid = self.valid and 1 <= result <= LARGEST
        self.steps.append((left, sign, right, result))
        return result

    def change(self, total: int) -> int:
        sign, amount = self.draw.pick("+-"), self.draw.number(*AMOUNTS)
        self.say(self.draw.pick(CHANGES[sign]), amount)
        return self.step(total, sign, amount)


def _changes(story: _Story, num_steps: int) -> None:
    total = story.draw.number(*STARTS)
    story.say(HAS, total)
    for _ in range(num_steps):
        total = story.change(total)
    story.say(ASK_NOW)


def _boxes(story: _Story, num_steps: int) -> None:
    boxes, each = story.draw.number(*GROUPS), story.draw.number(*GROUPS)
    story.say(BOXES, boxes, each)
    total = story.step(boxes, "*", each)
    for _ in range(num_steps - 1):
        total = story.change(total)
    story.say(ASK_NOW)


def _compare(story: _Story, num_steps: int) -> None:
    own, sign, more = story.draw.number(*SHARES), story.draw.pick("+-"), story.draw.number(*AMOUNTS)
    story.say(HAS, own)
    story.say(COMPARES[sign], more)
    _together(story, own, story.step(own, sign, more), num_steps)


def _twice(story: _Story, num_steps: int) -> None:
    own = story.draw.number(*STARTS)
    story.say(HAS, own)
    story.say(TWICE)
    _together(story, own, story.step(own, "*", 2), num_steps)


def _together(story: _Story, own: int, other: int, num_steps: int) -> None:
    total = story.step(other, "+", own)  # the result before comes first, as in every other kind
    if num_steps == 3:
        sign, amount = story.draw.pick("+-"), story.draw.number(*AMOUNTS)
        story.say(TOGETHER[sign], amount)
        story.step(total, sign, amount)
        # without the second step the third would start from the friend's share
        story.valid = story.valid and 1 <= _apply(other, sign, amount) <= LARGEST
    story.say(ASK_TOGETHER)


def _share(story: _Story, num_steps: int) -> None:
    bags, each = story.draw.number(*GROUPS), story.draw.number(*GROUPS)
    sign, amount = story.draw.pick("+-"), story.draw.number(*AMOUNTS)
    before = bags * each - amount if sign == "+" else bags * each + amount
    story.valid = before >= 2
    story.say(HAS, before)
    story.say(story.draw.pick(CHANGES[sign]), amount)
    total = story.step(before, sign, amount)
    story.say(ASK_SHARE, bags)
    story.step(total, "/", bags)


KINDS = {
    "change2": (_changes, 2),
    "change3": (_changes, 3),
    "boxes2": (_boxes, 2),
    "boxes3": (_boxes, 3),
    "compare2": (_compare, 2),
    "compare3": (_compare, 3),
    "twice2": (_twice, 2),
    "twice3": (_twice, 3),
    "share2": (_share, 2),
}
# how often each kind is drawn: kinds with more problems more often, two steps more often than three
WEIGHTS = {
    "change2": 6,
    "change3": 3,
    "boxes2": 2,
    "boxes3": 2,
    "compare2": 2,
    "compare3": 1,
    "twice2": 1,
    "twice3": 1,
    "share2": 2,
}
WEIGHTED = tuple(kind for kind, times in WEIGHTS.items() for _ in range(times))


def _tell(draw: _Draw, kinds: Sequence[str]) -> Problem | None:
    kind = draw.pick(kinds)
    story = _Story(draw)
    build, num_steps = KINDS[kind]
    build(story, num_steps)
    if not story.valid:
        return None
    problem = Problem(kind, " ".join(story.sentences), tuple(story.steps))
    # the shortcut must give a wrong result, and a number that the vocabulary has
    wrong = int(problem.shortcut.rsplit(" ", 1)[1])
    return problem if 0 <= wrong <= LARGEST and wrong != problem.result else None


def split_of(problem: Problem) -> str:
    """ "test" for one problem in five, by a hash of kind and numbers; "train" for the others. No seed changes it."""
    return "test" if hashlib.sha256(problem.key.encode()).digest()[0] < 51 else "train"


def make_problems(num: int, split: str, *, seed: str, kinds: Sequence[str] = WEIGHTED) -> list[Problem]:
    """`num` problems of the split, no question twice; a kind comes as often as it stands in `kinds`.

    Raises DataError when there are not that many.
    """
    draw = _Draw(f"steepest arithmetic {seed}")
    found: dict[str, Problem] = {}
    for _ in range(200 * num + 1000):
        if len(found) == num:
            break
        problem = _tell(draw, kinds)
        if problem is not None and split_of(problem) == split:
            found.setdefault(problem.question, problem)
    if len(found) < num:
        raise DataError(f"only {len(found)} different {split} problems were found, {num} are wanted. Ask for fewer.")
    return list(found.values())


def prepare_arithmetic(
    save_dir: str | Path,
    *,
    num_train: int = 4096,
    num_test: int = 512,
    num_sft: int = 8192,
    seed: int = 0,
    right_share: float = 0.4,
) -> dict[str, WrittenFile]:
    """Write train.parquet, test.parquet (columns as GSM8K's) and sft.parquet into `save_dir`.

    sft.parquet holds demonstrations for a supervised warm-up: `prompt` (messages), `answer` (text) and `is_right`. They
    are imperfect on purpose: a share of `right_share` is right, the others leave out the second step, as weak base
    models do. So a warmed-up model knows the format and the sums, mostly takes the shortcut when it answers greedily,
    and is sometimes right when it samples. Reinforcement learning then has to teach the second step.
    The demonstrations are drawn from the train problems; no test problem is among them.

    Returns "train", "test", "sft" -> path and number of rows. The same arguments give the same files.
    """
    for name, value in (("num_train", num_train), ("num_test", num_test), ("num_sft", num_sft)):
        if value < 1:
            raise ConfigError(f"{name}={value}: expected a number above 0.")
    if not 0.0 <= right_share <= 1.0:
        raise ConfigError(f"right_share={right_share}: expected a share between 0 and 1.")
    folder = Path(save_dir).expanduser()
    rows = {
        split: _rows(make_problems(num, split, seed=f"{split} {seed}"), split)
        for split, num in (("train", num_train), ("test", num_test))
    }
    demonstrations = _demonstrations(make_problems(num_sft, "train", seed=f"sft {seed}"), seed, right_share)
    written = {split: write_parquet(folder / f"{split}.parquet", rows[split], row_schema()) for split in rows}
    return {**written, "sft": write_parquet(folder / "sft.parquet", demonstrations, sft_schema())}


def _rows(problems: list[Problem], split: str) -> list[dict[str, Any]]:
    return [
        math_row(DATA_SOURCE, p.question, p.answer, str(p.result), split=split, index=index, question=p.question)
        for index, p in enumerate(problems)
    ]


def _demonstrations(problems: list[Problem], seed: int, right_share: float) -> list[dict[str, Any]]:
    right = set(permutation(len(problems), f"right {seed}")[: round(right_share * len(problems))])
    return [
        {
            "prompt": [{"role": "user", "content": problem.question}],
            "answer": problem.answer if index in right else problem.shortcut,
            "is_right": index in right,
        }
        for index, problem in enumerate(problems)
    ]


def sft_schema() -> Any:
    """The Arrow schema of sft.parquet."""
    import pyarrow as pa

    return pa.schema([("prompt", row_schema().field("prompt").type), ("answer", pa.string()), ("is_right", pa.bool_())])


def arithmetic_corpus() -> Iterator[str]:
    """Texts with every word and every number that a problem or answer can hold, with the same spaces as there.

    A tokenizer made from these texts has no unknown piece in any row, of any seed.
    """
    yield "".join(f" {number}" for number in range(LARGEST + 1))
    lines = "\n".join(f"{label} 1 + 2 = 3 - 4 = 5 * 6 = 7 / 8" for label in LABELS)
    yield f"{lines}\n#### 9"
    later = [
        *CHANGES["+"],
        *CHANGES["-"],
        *COMPARES.values(),
        TWICE,
        *TOGETHER.values(),
        ASK_NOW,
        ASK_TOGETHER,
        ASK_SHARE,
    ]
    for place, (name, pronoun) in enumerate(PEOPLE):
        friend = PEOPLE[place - 1][0]
        for things in THINGS:
            words = {"name": name, "pronoun": pronoun, "friend": friend, "things": things, "x": 2, "y": 3}
            for opening in (HAS, BOXES):
                story = (opening, *later)
                yield " ".join(line.format(label=LABELS[i % 3], **words) for i, line in enumerate(story))
