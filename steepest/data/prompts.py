"""Loads the rows that reinforcement learning trains on and checks every cell, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steepest.data.files import MAKE_DATA, Table, read_tables
from steepest.data.prepare import gsm8k
from steepest.data.sampler import permutation
from steepest.errors import ConfigError, DataError, setting

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Prompt:
    """One checked row. `token_ids` is empty until `chat.encode_prompts` fills it."""

    uid: str
    """`{file stem}:{row}`, the same in every run over the same files."""
    messages: list[dict[str, Any]]
    """The conversation up to the answer: dicts of `role` and `content`."""
    data_source: str
    """Chooses the reward."""
    ground_truth: Any
    """What the reward compares with."""
    extra_info: dict[str, Any] = field(default_factory=dict)
    """Passed on to the reward."""
    token_ids: tuple[int, ...] = ()
    """The prompt as the model reads it, generation prompt included."""


def load_prompts(
    files: str | Sequence[str],
    *,
    prompt_key: str = "prompt",
    reward_fn_key: str = "data_source",
    max_samples: int = -1,
    seed: int = 0,
    key: str = setting("train_files"),
    note: Callable[[str], None] = print,
) -> list[Prompt]:
    """Load and check parquet, jsonl and json files, several in the order given.

    A row has the columns `prompt_key` (list of role and content), `reward_fn_key` (string), `reward_model` (with
    `ground_truth`) and, if there, `extra_info`. Raw GSM8K rows (question, answer) are accepted too, and `note` is
    called. `max_samples` > 0 keeps that many rows, chosen by `seed`, in the order of the files; -1 keeps all. All rows
    are checked, also those not kept. `key` is the configuration key named in errors.

    Raises DataError that names file, row (from 0), column, what was found and what is expected.
    """
    wanted = {prompt_key, reward_fn_key, "reward_model", "extra_info", "question", "answer"}
    prompts: list[Prompt] = []
    for table in read_tables(files, key=key, columns=wanted):
        prompts += _table_prompts(table, prompt_key, reward_fn_key, note)
    return choose(prompts, max_samples, seed=seed, key=key.replace("files", "max_samples"))


def choose(rows: list[Any], max_samples: int, *, seed: int, key: str) -> list[Any]:
    """Draw `max_samples` of the rows by seed and keep their order; -1, or fewer rows than that, keeps all of them."""
    if max_samples == 0 or max_samples < -1:
        raise ConfigError(f"{key}={max_samples}: expected -1 (all rows) or a number above 0.")
    if max_samples == -1 or max_samples >= len(rows):
        return rows
    return [rows[index] for index in sorted(permutation(len(rows), f"subset {seed}")[:max_samples])]


def _table_prompts(table: Table, prompt_key: str, reward_fn_key: str, note: Callable[[str], None]) -> list[Prompt]:
    if prompt_key not in table.columns and {"question", "answer"} <= set(table.columns):
        note(
            f"note: {table.name} holds raw GSM8K rows (question, answer), no column {prompt_key!r}: each question is "
            f"made a user message with GSM8K's instruction, data_source {gsm8k.DATA_SOURCE!r}. `steepest prepare "
            f"gsm8k` writes such rows once and for all."
        )
        prompt_key, reward_fn_key = "prompt", "data_source"
        rows = [gsm8k.to_row(table, index, split=table.stem) for index in range(len(table.rows))]
        table = Table(table.name, table.stem, list(gsm8k.COLUMNS), rows)
    remedies = {
        prompt_key: f"{setting('prompt_key')}=NAME names another column; {MAKE_DATA}.",
        reward_fn_key: f"{setting('reward_fn_key')}=NAME names another column; it holds the name of the reward.",
        "reward_model": "It holds {'ground_truth': ...}, what the reward compares with.",
    }
    for column, remedy in remedies.items():
        if column not in table.columns:
            raise DataError(f"{table.name}: there is no column {column!r}; it has {', '.join(table.columns)}. {remedy}")
    return [_prompt(table, index, prompt_key, reward_fn_key) for index in range(len(table.rows))]


def _prompt(table: Table, index: int, prompt_key: str, reward_fn_key: str) -> Prompt:
    row = table.rows[index]
    messages = check_messages(table, index, prompt_key)
    if messages[-1]["role"] == "assistant":
        raise table.error(
            index,
            prompt_key,
            messages[-1],
            "a conversation that ends before the answer, with a message of the user or a tool",
        )
    source = row.get(reward_fn_key)
    if not isinstance(source, str) or not source:
        raise table.error(index, reward_fn_key, source, "the name of a data source, such as 'openai/gsm8k'")
    reward_model = row.get("reward_model")
    if not isinstance(reward_model, dict) or reward_model.get("ground_truth") is None:
        raise table.error(
            index, "reward_model", reward_model, "an object with a ground_truth, such as {'ground_truth': '72'}"
        )
    extra = row.get("extra_info")
    if extra is not None and not isinstance(extra, dict):
        raise table.error(index, "extra_info", extra, "an object with named entries, or nothing")
    return Prompt(f"{table.stem}:{index}", messages, source, reward_model["ground_truth"], extra or {})


def check_messages(table: Table, index: int, column: str) -> list[dict[str, Any]]:
    """The cell as a list of messages. Null entries are dropped: parquet writes null for a key that only other rows
    have.

    Raises DataError: not a list, empty, a message without role or content, an unknown role, content that is no string.
    """
    value = table.rows[index].get(column)
    shape = "a list of messages {'role': ..., 'content': ...}"
    if isinstance(value, str):
        raise table.error(index, column, value, shape, "Wrap it: [{'role': 'user', 'content': TEXT}].")
    if not isinstance(value, list):
        raise table.error(index, column, value, shape)
    if not value:
        raise table.error(index, column, value, "at least one message")
    messages = []
    for place, message in enumerate(value):
        cell = f"{column}[{place}]"
        if not isinstance(message, dict):
            raise table.error(index, cell, message, "a message {'role': ..., 'content': ...}")
        for name in ("role", "content"):
            if name not in message:
                raise table.error(index, cell, message, f"a message with {name!r}")
        if message["role"] not in ROLES:
            raise table.error(index, f"{cell}.role", message["role"], f"one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise table.error(index, f"{cell}.content", message["content"], "a string")
        messages.append({name: entry for name, entry in message.items() if entry is not None})
    if not any(message["content"].strip() for message in messages):
        raise table.error(index, column, value, "at least one message that is not blank")
    return messages
