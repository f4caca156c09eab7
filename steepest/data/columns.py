"""What the columns of a row mean, in addition to prompt and answer: which are refused when they have content, and why.

A column that is none of these goes to the reward. Content that would change what the model sees or does, and that this
version does not use, stops the run instead of being dropped; a column of `ignored_columns` is one as any other.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from steepest.data.files import Table
from steepest.data.problems import Problems
from steepest.errors import setting

_TOOLS = "conversations with tools are not part of this version, so the model would not see it"
_TEXT_ONLY = "only texts are read in this version, so the model would not see it"
REFUSED = {
    **dict.fromkeys(("tools", "tools_kwargs", "need_tools_kwargs"), _TOOLS),
    "interaction_kwargs": "a response is one turn in this version, so no interaction would start",
    **dict.fromkeys(("images", "image", "videos", "video", "audios", "audio"), _TEXT_ONLY),
    "agent_name": "a response is one turn in this version (single_turn_agent)",
    "chat_template_kwargs": "arguments of the chat template are given for all rows",
}
"""Column -> why its content cannot be used. `extra_info` may hold the same names."""
SYSTEM = ("system", "system_prompt")
"""Columns with the text of a system message for the row."""
INDEX = ("", "Unnamed: 0", "__index_level_0__")
"""Row numbers that pandas writes; they have no content."""
_AGREES = {"agent_name": ("single_turn_agent",)}
_EMPTY_TEXTS = ("", "[]", "{}", "null", "none", "nan", "false")


def is_filled(value: Any) -> bool:
    """False for null, NaN, False, and for empty texts, lists and objects, also where they are written as text."""
    if isinstance(value, str):
        return value.strip().lower() not in _EMPTY_TEXTS
    if isinstance(value, dict):
        return any(is_filled(entry) for entry in value.values())
    return bool(value) and not (isinstance(value, float) and math.isnan(value))


def without_row_numbers(table: Table) -> Table:
    """The table without the columns of INDEX."""
    if not set(INDEX).intersection(table.columns):
        return table
    rows = [{name: value for name, value in row.items() if name not in INDEX} for row in table.rows]
    return Table(table.name, table.stem, [name for name in table.columns if name not in INDEX], rows)


def check_columns(table: Table, used: Collection[str], problems: Problems) -> None:
    """Report content that this version does not use. `used`: columns that the run reads, whatever their names, and
    those that the user wants ignored."""
    there = [column for column in table.columns if column in REFUSED and column not in used]
    for index, row in enumerate(table.rows):
        for column in there:
            value = row.get(column)
            if is_filled(value) and value not in _AGREES.get(column, ()):
                problems.cell(table, index, column, value, "nothing in this column", _remedy(column))
        extra = row.get("extra_info")
        for name, value in extra.items() if isinstance(extra, dict) else ():
            if name in REFUSED and name not in used and is_filled(value):
                problems.cell(table, index, f"extra_info.{name}", value, "nothing here", _remedy(name))


def _remedy(column: str) -> str:
    why = REFUSED[column]
    ignored = f"{setting('ignored_columns')}=[{column}]"
    return f"{why[0].upper()}{why[1:]}. Take it out, or begin without it: {ignored} leaves it to the reward."


def add_system_message(
    table: Table, index: int, messages: list[dict[str, Any]], used: Collection[str], problems: Problems
) -> list[dict[str, Any]]:
    """The messages with the system message that a column of the row has, if there is such a column."""
    for column in SYSTEM:
        text = table.rows[index].get(column)
        if column in used or not is_filled(text):
            continue
        if not isinstance(text, str):
            problems.cell(table, index, column, text, "the text of a system message")
            continue
        if messages[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}, *messages]
        if messages[0]["content"] != text:
            problems.cell(
                table,
                index,
                column,
                text,
                "nothing, since the messages have a system message of their own",
                f"Keep one; {setting('ignored_columns')}=[{column}] leaves this one to the reward.",
            )
        break
    return messages
