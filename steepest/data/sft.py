"""Rows for supervised fine-tuning: token ids and a mask that is true on the answers only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.data.chat import EncodeReport, check_characters, check_lengths, cut, render, tokenize
from steepest.data.files import Table, read_tables
from steepest.data.prepare import gsm8k
from steepest.data.prompts import check_messages, choose
from steepest.errors import DataError, ModelError, setting


@dataclass(frozen=True)
class SFTRow:
    """One checked conversation. Every message of the assistant is an answer that the model learns."""

    uid: str
    messages: list[dict[str, Any]]


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
    max_samples: int = -1,
    seed: int = 0,
    key: str = setting("train_files"),
    note: Callable[[str], None] = print,
) -> list[SFTRow]:
    """Load and check parquet, jsonl and json files of one of three shapes, decided for each file by its columns:

    `messages_key` (a conversation that ends with the assistant); `prompt_key` (a text or messages) with `answer_key`
    (a text); or raw GSM8K rows (question, answer), which get GSM8K's instruction, and `note` is called.
    `max_samples` and `seed` as in `prompts.load_prompts`. Raises DataError with file, row, column, found, expected.
    """
    wanted = {messages_key, prompt_key, answer_key, "question", "answer"}
    rows: list[SFTRow] = []
    for table in read_tables(files, key=key, columns=wanted):
        numbers = range(len(table.rows))
        if messages_key in table.columns:
            rows += [SFTRow(f"{table.stem}:{index}", _conversation(table, index, messages_key)) for index in numbers]
        elif prompt_key in table.columns and answer_key in table.columns:
            rows += [SFTRow(f"{table.stem}:{index}", _pair(table, index, prompt_key, answer_key)) for index in numbers]
        elif {"question", "answer"} <= set(table.columns):
            note(f"note: {table.name} holds raw GSM8K rows (question, answer): each question gets GSM8K's instruction.")
            rows += [SFTRow(f"{table.stem}:{index}", _raw(table, index)) for index in numbers]
        else:
            raise DataError(
                f"{table.name}: expected the column {messages_key!r} (messages), or {prompt_key!r} and "
                f"{answer_key!r}; it has {', '.join(table.columns)}. {setting('messages_key')}, "
                f"{setting('prompt_key')} and {setting('response_key')} name other columns."
            )
    return choose(rows, max_samples, seed=seed, key=key.replace("files", "max_samples"))


def _conversation(table: Table, index: int, column: str) -> list[dict[str, Any]]:
    messages = check_messages(table, index, column)
    if messages[-1]["role"] != "assistant":
        raise table.error(
            index, column, messages[-1], "a conversation whose last message is the assistant's, the answer"
        )
    if messages[0]["role"] == "assistant":
        raise table.error(
            index, column, messages[0], "a conversation that starts with a message of the user or the system"
        )
    return messages


def _pair(table: Table, index: int, prompt_key: str, answer_key: str) -> list[dict[str, Any]]:
    prompt, answer = table.rows[index].get(prompt_key), table.rows[index].get(answer_key)
    if not isinstance(answer, str) or not answer.strip():
        raise table.error(index, answer_key, answer, "the text of the answer")
    if isinstance(prompt, str) and prompt.strip():
        messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list):
        messages = check_messages(table, index, prompt_key)
    else:
        raise table.error(index, prompt_key, prompt, "the text of the prompt, or a list of messages")
    if messages[-1]["role"] == "assistant":
        raise table.error(index, prompt_key, messages[-1], "a prompt that ends before the answer")
    return [*messages, {"role": "assistant", "content": answer}]


def _raw(table: Table, index: int) -> list[dict[str, Any]]:
    row = gsm8k.to_row(table, index, split=table.stem)
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
    report = EncodeReport(
        num_kept=len(examples),
        num_filtered=0,
        num_truncated=len(too_long),
        longest=longest,
        max_length=max_length,
        truncation=truncation,
        num_bos_removed=num_bos_removed,
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
    for place, piece in enumerate(pieces):
        if piece[: len(ids)] == ids:
            new = piece[len(ids) :]
        else:  # a token spans the border: split there, as generation does
            (new,), _ = tokenize([texts[place][len(texts[place - 1]) :]], tokenizer)
        is_answer = place % 2 == 1
        last_end = max((spot for spot, token in enumerate(new) if token in ends), default=-1)
        if is_answer and last_end < 0 and place == len(pieces) - 1:
            if not ends or ends[0] is None:
                raise ModelError(
                    "the tokenizer has no EOS token, so no model could learn where an answer ends: set one."
                )
            new, last_end = [*new, ends[0]], len(new)
        learned = (last_end + 1 if last_end >= 0 else len(new)) if is_answer else 0
        ids += new
        mask += [spot < learned for spot in range(len(new))]
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
