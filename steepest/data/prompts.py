"""Loads the rows that reinforcement learning trains on and checks every cell, before a model is loaded."""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steepest.data.columns import SYSTEM, add_system_message, check_columns, without_row_numbers
from steepest.data.files import Table, read_tables
from steepest.data.messages import is_missing, read_conversation, structured
from steepest.data.prepare import gsm8k
from steepest.data.problems import Problems, listed
from steepest.data.sampler import permutation
from steepest.errors import ConfigError, setting

ANSWER_COLUMNS = ("ground_truth", "answer")
"""Where the ground truth is looked for when no key names its column."""
CONVERSATION_LIKE = ("messages", "conversations", "conversation", "chat", "dialogue")
PROMPT_LIKE = ("question", "problem", "instruction", "query", "input", "text")
ANSWER_LIKE = ("solution", "target", "label", "final_answer", "expected", "output", "response", "completion")
_EXACT = 2**53
"""Whole numbers up to this one are exact as floats."""


@dataclass(frozen=True)
class Prompt:
    """One checked row. `token_ids` is empty until `chat.encode_prompts` fills it."""

    uid: str
    """`{file stem}:{row}`, the same in every run over the same files."""
    messages: list[dict[str, Any]]
    """The conversation up to the answer: dicts of `role` and `content`."""
    data_source: str
    """Chooses the reward. The file's stem where no reward is chosen by it and the row has none."""
    ground_truth: Any
    """What the reward compares with; None where no reward needs one and the row has none."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Passed on to the reward: the row's `extra_info` and every column that has no other use."""
    token_ids: tuple[int, ...] = ()
    """The prompt as the model reads it, generation prompt included."""
    is_text: bool = False
    """The row's prompt was a text; `messages` holds it as one message of the user."""


@dataclass(frozen=True)
class RowShape:
    """Which columns hold what, and what a row needs. `answer`: None looks for ANSWER_COLUMNS."""

    prompt: str = "prompt"
    answer: str | None = None
    source: str = "data_source"
    needs_source: bool = True
    needs_truth: bool = True
    ignored: Collection[str] = ()
    """Columns whose content need not reach the model."""

    def answer_in(self, table: Table) -> str | None:
        """The column with the ground truth of rows without `reward_model`, if the file has one."""
        names = ANSWER_COLUMNS if self.answer is None else (self.answer,)
        return next((name for name in names if name in table.columns), None)

    def example(self) -> dict[str, Any]:
        """A right row."""
        row: dict[str, Any] = {self.source: "openai/gsm8k"} if self.needs_source else {}
        row[self.prompt] = "What is 2 + 3?"
        return {**row, self.answer or "answer": "5"} if self.needs_truth else row


def load_prompts(
    files: str | Sequence[str],
    *,
    prompt_key: str = "prompt",
    answer_key: str | None = None,
    reward_fn_key: str = "data_source",
    ignored_columns: Collection[str] = (),
    needs_source: bool = True,
    needs_truth: bool = True,
    max_samples: int = -1,
    seed: int = 0,
    key: str = setting("train_files"),
    note: Callable[[str], None] = print,
) -> list[Prompt]:
    """Load and check the rows of files, several in the order given; each file may have other columns.

    A row has a prompt (`prompt_key`, a text or messages), what the reward compares with (`reward_model.ground_truth`,
    or the column `answer_key`) and the name of its reward (`reward_fn_key`). `needs_source` and `needs_truth` say
    whether the run's rewards read the last two. Raw GSM8K rows (question, answer) are converted. `note` is called with
    what was not as in a prepared file. `max_samples` > 0 keeps that many rows, chosen by `seed`, in the order of the
    files; -1 keeps all. All rows are checked, also those not kept. `key` is the configuration key named in errors.

    Raises DataError with all problems of the rows and a right row.
    """
    shape = RowShape(prompt_key, answer_key, reward_fn_key, needs_source, needs_truth, ignored_columns)
    problems, prompts = Problems(), list[Prompt]()
    notes: dict[str, list[str]] = {}
    for found in read_tables(files, key=key):
        rows = _Rows(without_row_numbers(found), shape, problems)
        prompts += rows.read()
        for text in rows.notes:
            notes.setdefault(text, []).append(found.name)
    if problems:
        raise problems.error(shape.example())
    for text, names in notes.items():
        note(f"{names[0]}{f' and {len(names) - 1} more files' if len(names) > 1 else ''}: {text}")
    return choose(prompts, max_samples, seed=seed, key=key.replace("files", "max_samples"))


def choose(rows: list[Any], max_samples: int, *, seed: int, key: str) -> list[Any]:
    """Draw `max_samples` of the rows by seed and keep their order; -1, or fewer rows than that, keeps all of them."""
    if max_samples == 0 or max_samples < -1:
        raise ConfigError(f"{key}={max_samples}: expected -1 (all rows) or a number above 0.")
    if max_samples == -1 or max_samples >= len(rows):
        return rows
    return [rows[index] for index in sorted(permutation(len(rows), f"subset {seed}")[:max_samples])]


class _Rows:
    """The rows of one file."""

    def __init__(self, table: Table, shape: RowShape, problems: Problems) -> None:
        self.table, self.shape, self.problems = table, shape, problems
        self.notes: list[str] = []
        """What is not as in a prepared file, in one sentence each."""
        self.answer = shape.answer_in(table)
        self.used = {shape.prompt, shape.source, "reward_model", "extra_info", *([self.answer] if self.answer else [])}
        self.whole_floats = 0
        """Ground truths like 72.0 that were made 72."""
        self.styles: dict[str, int] = {}
        """Values of `reward_model.style` that are not read -> rows."""

    def read(self) -> list[Prompt]:
        check_columns(self.table, {*self.used, *self.shape.ignored}, self.problems)
        if self._is_raw_gsm8k():
            return self._read_gsm8k()
        if not self._has_columns():
            return []
        prompts = [self._prompt(index) for index in range(len(self.table.rows))]
        self.notes += self._notes()
        return [prompt for prompt in prompts if prompt is not None]

    def _is_raw_gsm8k(self) -> bool:
        """Question and answer, nothing else that a row needs, no key that says how to read them, and a first answer
        that ends in `#### NUMBER`."""
        shape, columns = self.shape, self.table.columns
        if shape.answer is not None or {shape.source, "reward_model"} & set(columns):
            return False
        if not {"question", "answer"} <= set(columns) or (shape.prompt in columns and shape.prompt != "question"):
            return False
        return gsm8k.final_number(self.table.rows[0].get("answer")) is not None

    def _read_gsm8k(self) -> list[Prompt]:
        self.notes.append(
            f"raw GSM8K rows (question, answer): each question is made a user message with GSM8K's instruction, the "
            f"ground truth is the number after ####, data_source is {gsm8k.DATA_SOURCE!r}. `steepest prepare gsm8k` "
            f"writes such rows once and for all; {setting('answer_key')}=answer takes question and answer as they are."
        )
        rows: list[dict[str, Any]] = []
        for index, row in enumerate(self.table.rows):
            if is_missing(row.get("question")) or not isinstance(row["question"], str):
                self.problems.cell(self.table, index, "question", row.get("question"), "the text of a question")
            elif gsm8k.final_number(row.get("answer")) is None:
                self.problems.cell(self.table, index, "answer", row.get("answer"), gsm8k.WORKED_ANSWER)
            else:
                more = {name: value for name, value in row.items() if name not in ("question", "answer")}
                rows.append({**more, **gsm8k.to_row(self.table, index, split=self.table.stem)})
        table = Table(self.table.name, self.table.stem, list(gsm8k.COLUMNS), rows)
        shape = replace(self.shape, prompt="prompt", source="data_source")
        return _Rows(table, shape, self.problems).read() if len(rows) == len(self.table.rows) else []

    def _has_columns(self) -> bool:
        """Report columns that are missing."""
        shape, columns = self.shape, self.table.columns
        has = f"it has {listed(columns)}"
        if shape.prompt not in columns:
            self._missing(
                shape.prompt, has, setting("prompt_key"), (*PROMPT_LIKE, *CONVERSATION_LIKE), "names another column."
            )
        if shape.answer is not None and self.answer is None:
            self._missing(shape.answer, has, setting("answer_key"), (), "names another column.")
        elif shape.needs_truth and self.answer is None and "reward_model" not in columns:
            self._missing("answer", has, setting("answer_key"), ANSWER_LIKE, "names the one that the reward reads.")
        if shape.needs_source and shape.source not in columns:
            self.problems.file(
                self.table,
                f"there is no column {shape.source!r}; {has}. It names the reward of each row, such as "
                f"'openai/gsm8k'. {setting('reward_fn_key')}=NAME names another column; without one, give all rows "
                f"one reward: {setting('reward_functions')}=math (or gsm8k, numeric, exact, multiple_choice, "
                f"my_reward.py:my_function).",
            )
        return shape.prompt in columns

    def _missing(self, column: str, has: str, key: str, likely: Sequence[str], tail: str) -> None:
        guess = next((name for name in likely if name in self.table.columns), "NAME")
        self.problems.file(self.table, f"there is no column {column!r}; {has}. {key}={guess} {tail}")

    def _prompt(self, index: int) -> Prompt | None:
        table, row = self.table, self.table.rows[index]
        found = read_conversation(table, index, self.shape.prompt, self.problems)
        source, truth, extra = self._source(index), self._truth(index), self._extra(index)
        if found is None:
            return None
        used = {*self.used, *self.shape.ignored}
        messages = add_system_message(table, index, found.messages, used, self.problems)
        if messages[-1]["role"] == "assistant":
            ends = "a conversation that ends before the answer, with a message of the user or a tool"
            self.problems.cell(table, index, self.shape.prompt, messages[-1], ends)
        others = {name: value for name, value in row.items() if name not in self.used or name == self.answer}
        is_text = found.is_text and len(messages) == 1
        return Prompt(f"{table.stem}:{index}", messages, source, truth, {**others, **extra}, is_text=is_text)

    def _source(self, index: int) -> str:
        value = self.table.rows[index].get(self.shape.source)
        if not self.shape.needs_source:
            return self.table.stem.partition("#")[0] if is_missing(value) else str(value)
        if not isinstance(value, str) or not value:
            if self.shape.source in self.table.columns:
                expected = "the name of a data source, such as 'openai/gsm8k'"
                self.problems.cell(self.table, index, self.shape.source, value, expected)
            return ""
        return value

    def _truth(self, index: int) -> Any:
        row = self.table.rows[index]
        model = structured(row.get("reward_model"))
        has_truth = not isinstance(model, dict) or model.get("ground_truth") is not None or self.answer is None
        if self.shape.answer is None and not is_missing(model) and has_truth:
            return self._truth_of_object(index, model)
        if self.answer is None:
            if self.shape.needs_truth and "reward_model" in self.table.columns:
                expected = "an object with a ground_truth, such as {'ground_truth': '72'}"
                self.problems.cell(self.table, index, "reward_model", row.get("reward_model"), expected)
            return None
        value = row.get(self.answer)
        if is_missing(value):
            if self.shape.needs_truth:
                found = value if isinstance(value, str) else None
                self.problems.cell(self.table, index, self.answer, found, "what the reward compares with")
            return value if isinstance(value, str) else None
        return self._plain(index, value)

    def _truth_of_object(self, index: int, model: Any) -> Any:
        if not isinstance(model, dict) or (self.shape.needs_truth and model.get("ground_truth") is None):
            expected = "an object with a ground_truth, such as {'ground_truth': '72'}"
            self.problems.cell(self.table, index, "reward_model", model, expected)
            return None
        style = model.get("style")
        if style not in (None, "", "rule"):
            self.styles[str(style)] = self.styles.get(str(style), 0) + 1
        return model.get("ground_truth")

    def _plain(self, index: int, value: Any) -> Any:
        """A ground truth as text, number, list or object. A whole number that pandas or JSON has as 72.0 is 72."""
        if isinstance(value, decimal.Decimal):
            return int(value) if value == value.to_integral_value() else str(value)
        if isinstance(value, float) and value.is_integer():
            if abs(value) > _EXACT:
                expected = "a whole number or a text: as a float a number of this size has lost its last digits"
                self.problems.cell(self.table, index, str(self.answer), value, expected)
            self.whole_floats += 1
            return int(value)
        if not isinstance(value, str | int | float | list | dict) or value in (math.inf, -math.inf):
            self.problems.cell(self.table, index, str(self.answer), value, "a text, a number, a list or an object")
        return value

    def _extra(self, index: int) -> dict[str, Any]:
        extra = structured(self.table.rows[index].get("extra_info"))
        if is_missing(extra):
            return {}
        if not isinstance(extra, dict):
            self.problems.cell(self.table, index, "extra_info", extra, "an object with named entries, or nothing")
            return {}
        return extra

    def _notes(self) -> list[str]:
        """What is not as in a prepared file, in one sentence each."""
        shape, columns = self.shape, self.table.columns
        notes = []
        if "reward_model" not in columns or shape.answer is not None:
            truth = f"the ground truth column {self.answer!r}" if self.answer else "there is no ground truth"
            stem = self.table.stem.partition("#")[0]
            given = "" if shape.source in columns else f", data_source is {stem!r}"
            notes.append(f"the prompt is column {shape.prompt!r}, {truth}{given}.")
        others = [name for name in columns if name not in self.used and name != "ability"]
        if system := [name for name in SYSTEM if name in others and name not in shape.ignored]:
            notes.append(f"column {system[0]!r} is the system message of its row.")
        if others := [name for name in others if name not in system]:
            notes.append(f"the reward gets these columns in extra_info: {listed(others)}.")
        if self.whole_floats:
            notes.append(
                f"{self.whole_floats:,} ground truths are whole numbers stored as floats (pandas does this to a column "
                "with an empty cell); they are read without the .0."
            )
        for style, count in self.styles.items():
            notes.append(f"reward_model.style={style!r} in {count:,} rows is not read: the reward is chosen by keys.")
        return notes
