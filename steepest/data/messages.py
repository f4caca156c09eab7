"""The conversation in a cell: a text, or a list of messages, checked and made the same for all."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass
from typing import Any

from steepest.data.files import Table
from steepest.data.problems import Problems

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAPE = "a text, or a list of messages {'role': ..., 'content': ...}"
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """`is_text`: the cell was a text, which is one message of the user."""

    messages: list[dict[str, Any]]
    is_text: bool = False


def is_missing(value: Any) -> bool:
    """True for null, NaN (what pandas writes for null) and a blank text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip()
    )  # fmt: skip


def structured(value: Any) -> Any:
    """A list or an object that stands in a cell as text, as JSON or as Python prints it (CSV files have no other way);
    any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return found if isinstance(found, list | dict) else value
    return value


def read_conversation(table: Table, index: int, column: str, problems: Problems) -> Conversation | None:
    """The cell as messages, or None where it is wrong. Null entries of a message are dropped: parquet writes null for a
    key that only other rows have."""
    cell = table.rows[index].get(column)
    value = cell
    if isinstance(cell, str) and "role" in cell and cell.lstrip().startswith("[{"):
        value = structured(cell)
        if isinstance(value, str):
            problems.cell(table, index, column, cell, SHAPE, "It looks like messages that were printed; write JSON.")
            return None
    if is_missing(value):
        problems.cell(table, index, column, None if isinstance(value, float) else value, SHAPE)
        return None
    if isinstance(value, str):
        return Conversation([{"role": "user", "content": value}], is_text=True)
    if not isinstance(value, list):
        problems.cell(table, index, column, value, SHAPE)
        return None
    if not value:
        problems.cell(table, index, column, value, "at least one message")
        return None
    messages = [_message(table, index, f"{column}[{place}]", one, problems) for place, one in enumerate(value)]
    good = [message for message in messages if message is not None]
    if len(good) < len(messages):
        return None
    if not any(message["content"].strip() or message.get("tool_calls") for message in good):
        problems.cell(table, index, column, value, "at least one message that is not blank")
        return None
    return Conversation(good)


def _message(table: Table, index: int, cell: str, message: Any, problems: Problems) -> dict[str, Any] | None:
    if not isinstance(message, dict):
        problems.cell(table, index, cell, message, "a message {'role': ..., 'content': ...}")
        return None
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message:
            remedy = f"What is called {other!r} here is {name!r}." if other in message else ""
            problems.cell(table, index, cell, message, f"a message with {name!r}", remedy)
            return None
    role, content = message["role"], message["content"]
    if role not in ROLES:
        meant = _OTHER_ROLES.get(role) if isinstance(role, str) else None
        remedy = f"{role!r} is written {meant!r}." if meant else ""
        problems.cell(table, index, f"{cell}.role", role, f"one of {', '.join(ROLES)}", remedy)
        return None
    text = _text_of_parts(content)
    if text is None:
        remedy = "Text only in this version." if isinstance(content, list) else ""
        problems.cell(table, index, f"{cell}.content", content, "a string", remedy)
        return None
    if role == "user" and not text.strip():
        problems.cell(table, index, f"{cell}.content", content, "a text that is not blank")
        return None
    return {**{name: entry for name, entry in message.items() if entry is not None}, "content": text}


def _text_of_parts(content: Any) -> str | None:
    """A string as it is; parts `{"type": "text", "text": ...}` of a list joined, as chat templates do; else None."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(content) else None
