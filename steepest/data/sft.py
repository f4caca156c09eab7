"""Rows for supervised fine-tuning: token ids and a mask that is true on the answers only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.data.chat import EncodeReport, check_characters, check_lengths, cut, render, tokenize, unread_parts
from steepest.data.columns import SYSTEM, add_system_message, check_columns, without_row_numbers
from steepest.data.files import Table, read_tables
from steepest.data.messages import is_missing, read_conversation
from steepest.data.prepare import gsm8k
from steepest.data.problems import Problems, listed
from steepest.data.prompts import ANSWER_LIKE, CONVERSATION_LIKE, PROMPT_LIKE, choose
from steepest.errors import DataError, ModelError, setting

WEIGHTS = ("weight", "loss", "train")
"""Names of a field of a message that says whether an answer is learned, 0 or 1 (OpenAI's format, ms-swift, axolotl)."""


@dataclass(frozen=True)
class SFTRow:
    """One checked conversation. Every message of the assistant is an answer that the model learns, but those whose
    number is in `not_learned` (`weight: 0` in the data)."""

    uid: str
    messages: list[dict[str, Any]]
    not_learned: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SFTExample:
    """One tokenised conversation. `loss_mask` is as long as `token_ids`, true on each answer up to its end token."""

    uid: str
    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


def load_sft_rows(
    files: str | Sequence[str],
    *,
    messages_key: str = "messages",
    prompt_key: str = "prompt",
    answer_key: str = "answer",
    ignored_columns: Collection[str] = (),
    max_samples: int = -1,
    seed: int = 0,
    key: str = setting("train_files"),
    note: Callable[[str], None] = print,
) -> list[SFTRow]:
    """Load and check the rows of files of one of three shapes, decided for each file by its columns:

    `messages_key` (a conversation that ends with the assistant); `prompt_key` (a text or messages) with `answer_key`
    (a text, or the messages of the answer); or raw GSM8K rows (question, answer), which get GSM8K's instruction, and
    `note` is called. `max_samples` and `seed` as in `prompts.load_prompts`.

    Raises DataError with all problems of the rows and a right row.
    """
    names = SFTColumns(messages_key, prompt_key, answer_key, frozenset(ignored_columns))
    problems, rows = Problems(), list[SFTRow]()
    for found in read_tables(files, key=key):
        rows += _Rows(without_row_numbers(found), names, problems, note).read()
    if problems:
        raise problems.error({prompt_key: "What is 2 + 3?", answer_key: "2 + 3 = 5"})
    return choose(rows, max_samples, seed=seed, key=key.replace("files", "max_samples"))


@dataclass(frozen=True)
class SFTColumns:
    """Which columns hold what."""

    messages: str
    prompt: str
    answer: str
    ignored: frozenset[str]


class _Rows:
    """The rows of one file."""

    def __init__(self, table: Table, names: SFTColumns, problems: Problems, note: Callable[[str], None]) -> None:
        self.table, self.names, self.problems, self.note = table, names, problems, note

    def read(self) -> list[SFTRow]:
        columns, names = set(self.table.columns), self.names
        if names.messages in columns:
            used, read = {names.messages}, self._conversation
        elif {names.prompt, names.answer} <= columns:
            used, read = {names.prompt, names.answer}, self._pair
        elif {"question", "answer"} <= columns and gsm8k.final_number(self.table.rows[0].get("answer")) is not None:
            used, read = {"question", "answer"}, self._raw
            self.note(
                f"note: {self.table.name} holds raw GSM8K rows (question, answer): each question gets GSM8K's "
                "instruction."
            )
        else:
            self.problems.file(
                self.table,
                f"expected the column {names.messages!r} (messages), or {names.prompt!r} and {names.answer!r}; it has "
                f"{listed(self.table.columns)}. {setting('messages_key')}, {setting('prompt_key')} and "
                f"{setting('response_key')} name other columns, e.g. {self._guess()}.",
            )
            return []
        check_columns(self.table, used | names.ignored, self.problems)
        self._say_columns(used)
        rows = (self._row(index, read(index), used | names.ignored) for index in range(len(self.table.rows)))
        return [row for row in rows if row is not None]

    def _guess(self) -> str:
        """The keys that fit the columns, as far as their names show it."""
        columns = self.table.columns
        if talk := next((name for name in CONVERSATION_LIKE if name in columns), None):
            return f"{setting('messages_key')}={talk}"
        prompt = next((name for name in (self.names.prompt, *PROMPT_LIKE) if name in columns), "question")
        answer = next((name for name in ("answer", *ANSWER_LIKE) if name in columns), "answer")
        return f"{setting('prompt_key')}={prompt} {setting('response_key')}={answer}"

    def _say_columns(self, used: set[str]) -> None:
        """What becomes of the other columns. Prepared data sets have the columns of reinforcement learning, too."""
        others = [name for name in self.table.columns if name not in used]
        if system := [name for name in others if name in SYSTEM and name not in self.names.ignored]:
            self.note(f"{self.table.name}: column {system[0]!r} is the system message of its row.")
        if unused := [name for name in others if name not in (*system, *gsm8k.COLUMNS)]:
            self.note(f"{self.table.name}: these columns are not used: {listed(unused)}.")

    def _row(self, index: int, messages: list[dict[str, Any]] | None, used: set[str]) -> SFTRow | None:
        """The row, its weights taken out of the messages."""
        if not messages:
            return None
        messages = add_system_message(self.table, index, messages, used, self.problems)
        zero: set[int] = set()
        for place, message in enumerate(messages):
            for name in WEIGHTS:
                weight = message.get(name)
                if weight in (0, False):
                    zero.add(place)
                elif weight not in (None, 1, True):
                    self.problems.cell(
                        self.table, index, f"message {place}, {name}", weight, "0 (not learned) or 1 (learned)"
                    )
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if zero.issuperset(answers):
            self.problems.cell(self.table, index, "messages", messages, "an answer that is learned (weight 1)")
        plain = [{name: value for name, value in message.items() if name not in WEIGHTS} for message in messages]
        return SFTRow(f"{self.table.stem}:{index}", plain, frozenset(zero.intersection(answers)))

    def _conversation(self, index: int) -> list[dict[str, Any]] | None:
        column = self.names.messages
        found = read_conversation(self.table, index, column, self.problems)
        if found is None:
            return None
        messages, wrong = found.messages, ""
        if messages[-1]["role"] != "assistant":
            wrong = "a conversation whose last message is the assistant's, the answer"
        elif messages[0]["role"] == "assistant":
            wrong = "a conversation that starts with a message of the user or the system"
        if wrong:
            self.problems.cell(self.table, index, column, messages[0 if "starts" in wrong else -1], wrong)
            return None
        return messages if self._answers_have_text(index, column, messages) else None

    def _answers_have_text(self, index: int, column: str, messages: list[dict[str, Any]]) -> bool:
        blank = [m for m in messages if m["role"] == "assistant" and not m["content"].strip() and "tool_calls" not in m]
        if blank:
            self.problems.cell(self.table, index, column, blank[0], "answers that are not blank")
        return not blank

    def _pair(self, index: int) -> list[dict[str, Any]] | None:
        table, names = self.table, self.names
        answer = self._answer(index)
        found = read_conversation(table, index, names.prompt, self.problems)
        if found is None or answer is None:
            return None
        if found.messages[-1]["role"] == "assistant":
            self.problems.cell(table, index, names.prompt, found.messages[-1], "a prompt that ends before the answer")
            return None
        return [*found.messages, *answer]

    def _answer(self, index: int) -> list[dict[str, Any]] | None:
        """The text of the answer as a message, or the messages that the cell has."""
        table, column = self.table, self.names.answer
        value = table.rows[index].get(column)
        if isinstance(value, list):
            found = read_conversation(table, index, column, self.problems)
            if found is None or not self._answers_have_text(index, column, found.messages):
                return None
            if {found.messages[0]["role"], found.messages[-1]["role"]} == {"assistant"}:
                return found.messages
        elif isinstance(value, str) and value.strip():
            return [{"role": "assistant", "content": value}]
        self.problems.cell(table, index, column, value, "the text of the answer, or messages of the assistant")
        return None

    def _raw(self, index: int) -> list[dict[str, Any]] | None:
        try:
            row = gsm8k.to_row(self.table, index, split=self.table.stem)
        except DataError:
            row = self.table.rows[index]
            if not isinstance(row.get("question"), str) or is_missing(row["question"]):
                self.problems.cell(self.table, index, "question", row.get("question"), "the text of a question")
            else:
                self.problems.cell(self.table, index, "answer", row.get("answer"), gsm8k.WORKED_ANSWER)
            return None
        return [*row["prompt"], {"role": "assistant", "content": row["extra_info"]["answer"]}]


def encode_sft(
    rows: Sequence[SFTRow],
    tokenizer: Any,
    *,
    max_length: int,
    truncation: str = "error",
    template_kwargs: Mapping[str, Any] | None = None,
    end_token_ids: Sequence[int] | None = None,
) -> tuple[list[SFTExample], EncodeReport]:
    """Token ids and loss masks. The text before an answer is tokenised like the prompt of a rollout, with the
    generation prompt, so the model learns to answer exactly the token ids that it gets as a prompt in a rollout.

    The mask is true on each answer's tokens up to and including its end token (`end_token_ids`, by default the
    tokenizer's EOS), false on what the template writes after it. If the template closes the last answer without an end
    token, the first of `end_token_ids` is appended: a model that never saw one would not stop. More than `max_length`
    tokens: as in `chat.encode_prompts`.

    Raises ModelError without chat template or end token, DataError for a row the template refuses or rewrites (a
    template that drops earlier thoughts), a row too long, and a row whose answer was cut away.
    """
    check_lengths(max_length, truncation, key=setting("max_length"))
    ends = list(end_token_ids) if end_token_ids is not None else [tokenizer.eos_token_id]
    texts = [_turn_texts(row, tokenizer, template_kwargs) for row in rows]
    if truncation == "error":
        check_characters([row[-1] for row in texts], [row.uid for row in rows], max_length, setting("max_length"))
    flat, num_bos_removed = tokenize([text for row in texts for text in row], tokenizer)
    pieces = iter(flat)
    examples = []
    for row, turn_texts in zip(rows, texts, strict=True):
        examples.append(_mask(row, turn_texts, [next(pieces) for _ in turn_texts], tokenizer, ends))
    longest = max((len(example.token_ids) for example in examples), default=0)
    too_long = [example for example in examples if len(example.token_ids) > max_length]
    if too_long and truncation == "error":
        raise DataError(
            f"row {too_long[0].uid}: the conversation has {len(too_long[0].token_ids)} tokens, {setting('max_length')} "
            f"is {max_length}; {len(too_long)} of {len(rows)} are too long, the longest has {longest} tokens. "
            f"Raise {setting('max_length')}, or cut them with {setting('truncation')}=left or right."
        )
    unread = unread_parts([(row.uid, row.messages) for row in rows], tokenizer, template_kwargs)
    report = EncodeReport(
        num_kept=len(examples),
        num_filtered=0,
        num_truncated=len(too_long),
        longest=longest,
        max_length=max_length,
        truncation=truncation,
        num_bos_removed=num_bos_removed,
        unread=unread,
        what="conversations",
    )
    return [_shorten(example, max_length, truncation) for example in examples], report


def _turn_texts(row: SFTRow, tokenizer: Any, template_kwargs: Mapping[str, Any] | None) -> list[str]:
    """Two texts for every answer, up to it and including it. All are prefixes of the whole conversation."""
    texts: list[str] = []
    for place, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        for count, ask in ((place, True), (place + 1, False)):
            text = render(
                row.messages[:count],
                tokenizer,
                where=row.uid,
                add_generation_prompt=ask,
                template_kwargs=template_kwargs,
            )
            if texts and not text.startswith(texts[-1]):
                raise DataError(
                    f"row {row.uid}: the chat template writes the conversation up to message {count - 1} (counted "
                    f"from 0) not as a continuation of what stands before it, so the answer cannot be separated from "
                    f"the prompt (templates that drop earlier thoughts do this). Make one row of each answer, or use "
                    f"another template with {setting('custom_chat_template')}."
                )
            texts.append(text)
    return texts


def _mask(row: SFTRow, texts: list[str], pieces: list[list[int]], tokenizer: Any, ends: list[int | None]) -> SFTExample:
    """Join the pieces and mark the answers. `texts` and `pieces` alternate: text up to an answer, text with the
    answer."""
    ids: list[int] = []
    mask: list[bool] = []
    places = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    for place, piece in enumerate(pieces):
        if piece[: len(ids)] == ids:
            new = piece[len(ids) :]
        else:  # a token spans the border: split there, as generation does
            (new,), _ = tokenize([texts[place][len(texts[place - 1]) :]], tokenizer)
        is_answer = place % 2 == 1
        teaches = is_answer and places[place // 2] not in row.not_learned
        last_end = max((spot for spot, token in enumerate(new) if token in ends), default=-1)
        if is_answer and last_end < 0 and place == len(pieces) - 1:
            if not ends or ends[0] is None:
                raise ModelError(
                    "the tokenizer has no EOS token, so no model could learn where an answer ends: set one."
                )
            new, last_end = [*new, ends[0]], len(new)
        learned = (last_end + 1 if last_end >= 0 else len(new)) if is_answer else 0
        ids += new
        mask += [teaches and spot < learned for spot in range(len(new))]
    return SFTExample(row.uid, tuple(ids), tuple(mask))


def _shorten(example: SFTExample, max_length: int, truncation: str) -> SFTExample:
    keep = cut(range(len(example.token_ids)), max_length, truncation)
    short = SFTExample(
        example.uid, tuple(example.token_ids[spot] for spot in keep), tuple(example.loss_mask[spot] for spot in keep)
    )
    if not any(short.loss_mask[1:]):  # the first token is never predicted: no token precedes it
        raise DataError(
            f"row {example.uid}: cut to {setting('max_length')}={max_length} ({setting('truncation')}={truncation}) "
            f"nothing of the answer is left to learn. Raise {setting('max_length')}, or use "
            f"{setting('truncation')}=left or drop the row."
        )
    return short
