"""Messages to token ids: the model's own chat template, one BOS, and a rule for prompts that are too long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steepest.data.prompts import Prompt
from steepest.errors import ConfigError, DataError, ModelError, setting

TRUNCATIONS = ("error", "left", "right", "middle")
CHUNK = 1024  # texts a tokenizer call: enough for its threads, little memory
MOST_CHARACTERS_A_TOKEN, LEAST_CHARACTERS = 256, 1_000_000
"""A text with more characters is refused by its length. The longest tokens of usual vocabularies are 128 blanks."""
_OURS = (
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "return_tensors",
    "return_dict",
    "padding",
    "truncation",
)


@dataclass(frozen=True)
class EncodeReport:
    """How many rows were kept, dropped and cut. `longest` is in tokens, over all rows before dropping and cutting."""

    num_kept: int
    num_filtered: int
    num_truncated: int
    longest: int
    max_length: int = 0
    truncation: str = "error"
    num_bos_removed: int = 0
    has_generation_prompt: bool = True
    unread: tuple[str, ...] = ()
    """Fields of messages that the chat template writes nothing of."""
    what: str = "prompts"

    def describe(self) -> str:
        """One or two sentences for the start of a run."""
        text = (
            f"{self.num_kept:,} {self.what}, the longest {self.longest:,} tokens of {self.max_length:,} allowed; "
            f"{self.num_filtered:,} dropped as too long, {self.num_truncated:,} cut"
        )
        text += f" ({self.truncation})." if self.num_truncated else "."
        if self.num_bos_removed:
            text += f" The chat template doubled the BOS token in {self.num_bos_removed:,}: one was kept."
        if not self.has_generation_prompt:
            text += " The chat template adds no generation prompt: normal for [INST] templates, wrong for most others."
        if self.unread:
            text += f" The chat template does not read these fields of messages: {', '.join(self.unread)}."
        return text


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    truncation: str = "error",
    filter_overlong: bool = False,
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[list[Prompt], EncodeReport]:
    """Fill `token_ids`: the chat template with its generation prompt, then the tokenizer, which adds nothing.

    So the template alone decides about BOS: no BOS is added, and a doubled BOS is made single. A prompt of more than
    `max_prompt_length` tokens is dropped with `filter_overlong`; otherwise `truncation` decides: "error" stops, "left"
    cuts the start away (BOS and system message first), "right" the end (generation prompt first), "middle" keeps both
    ends.

    Raises ModelError without a chat template, DataError when the template refuses a row, a row is too long, or none is
    left.
    """
    check_lengths(max_prompt_length, truncation, key=setting("max_prompt_length"))
    texts = [
        render(
            prompt.messages, tokenizer, where=prompt.uid, add_generation_prompt=True, template_kwargs=template_kwargs
        )
        for prompt in prompts
    ]
    _check_template_reads_messages(prompts, texts)
    unread = unread_parts([(prompt.uid, prompt.messages) for prompt in prompts], tokenizer, template_kwargs)
    if truncation == "error" and not filter_overlong:
        check_characters(texts, [prompt.uid for prompt in prompts], max_prompt_length, setting("max_prompt_length"))
    ids, num_bos_removed = tokenize([bounded(text, max_prompt_length, truncation) for text in texts], tokenizer)
    too_long = {place for place, row in enumerate(ids) if len(row) > max_prompt_length}
    report = EncodeReport(
        num_kept=len(prompts) - (len(too_long) if filter_overlong else 0),
        num_filtered=len(too_long) if filter_overlong else 0,
        num_truncated=0 if filter_overlong else len(too_long),
        longest=max(map(len, ids), default=0),
        max_length=max_prompt_length,
        truncation=truncation,
        num_bos_removed=num_bos_removed,
        unread=unread,
        has_generation_prompt=not prompts or _has_generation_prompt(prompts[0], texts[0], tokenizer, template_kwargs),
    )
    if too_long and not filter_overlong and truncation == "error":
        raise _overlong(prompts, ids, max_prompt_length, len(too_long))
    if prompts and not report.num_kept:
        raise DataError(
            f"{setting('filter_overlong_prompts')}=True leaves no prompt: all {len(prompts)} are longer than "
            f"{setting('max_prompt_length')}={max_prompt_length} (the longest has {report.longest} tokens). Raise "
            f"{setting('max_prompt_length')}."
        )
    kept = [
        dataclasses.replace(prompt, token_ids=tuple(cut(row, max_prompt_length, truncation)))
        for place, (prompt, row) in enumerate(zip(prompts, ids, strict=True))
        if not (filter_overlong and place in too_long)
    ]
    return kept, report


def check_characters(texts: Sequence[str], uids: Sequence[str], limit: int, key: str) -> None:
    """Raise DataError for a text that is too long for `limit` tokens by far, which takes minutes and gigabytes to
    find by its tokens."""
    for text, uid in zip(texts, uids, strict=True):
        if len(text) > most_characters(limit):
            raise DataError(
                f"row {uid}: {len(text):,} characters, which are far more than {key}={limit} tokens. See whether the "
                f"file or the column is the right one; to keep such rows, drop the long ones with "
                f"{setting('filter_overlong_prompts')}=True or cut them with {setting('truncation')}."
            )


def most_characters(limit: int) -> int:
    """The number of characters above which no text has only `limit` tokens."""
    return max(LEAST_CHARACTERS, MOST_CHARACTERS_A_TOKEN * limit)


def bounded(text: str, limit: int, truncation: str) -> str:
    """`text` without most of what is cut away after tokenising or makes it too long, which would take minutes and
    gigabytes to tokenise."""
    most = most_characters(limit)
    if len(text) <= 2 * most:
        return text
    if truncation == "left":
        return text[-most:]
    return text[:most] + text[-most:] if truncation == "middle" else text[:most]


def _check_template_reads_messages(prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Raise ModelError for a template that writes the same text for every prompt: it ignores the messages."""
    if len(set(texts)) == 1 and any(prompt.messages != prompts[0].messages for prompt in prompts):
        raise ModelError(
            f"the chat template makes the same text of all {len(prompts)} prompts, {texts[0][:80]!r}: it does not read "
            f"the messages. Give another with {setting('custom_chat_template')}."
        )


def unread_parts(
    rows: Sequence[tuple[str, list[dict[str, Any]]]], tokenizer: Any, template_kwargs: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Fields of messages (`name`, ...) that the template does not read, found by rendering the first row that has the
    field without it. rows: (uid, messages).

    Raises DataError where that loses content: `tool_calls`, or all messages of a role.
    """
    fields: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {}
    roles: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for uid, messages in rows:
        for place, message in enumerate(messages):
            for name in message:
                if name not in ("role", "content") and name not in fields:
                    bare = {key: value for key, value in message.items() if key != name}
                    fields[name] = uid, messages, [*messages[:place], bare, *messages[place + 1 :]]
            if message["role"] not in roles and message["content"].strip() and len(messages) > 1:
                roles[message["role"]] = uid, messages, messages[:place] + messages[place + 1 :]
    for role, case in roles.items():
        if _same_text(*case, tokenizer, template_kwargs):
            raise DataError(
                f"row {case[0]}: the model's chat template writes nothing of a message of the role {role!r}, so the "
                f"model would not see it. Write it as another role, or give a template with "
                f"{setting('custom_chat_template')}."
            )
    unread = tuple(name for name, case in fields.items() if _same_text(*case, tokenizer, template_kwargs))
    if "tool_calls" in unread:
        raise DataError(
            f"row {fields['tool_calls'][0]}: a message has tool_calls, and the model's chat template does not write "
            f"them, so the model would not see them. Write them into its content, or give a template with "
            f"{setting('custom_chat_template')}."
        )
    return unread


def _same_text(
    uid: str,
    messages: list[dict[str, Any]],
    less: list[dict[str, Any]],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None,
) -> bool:
    def text(some: list[dict[str, Any]]) -> str:
        return render(some, tokenizer, where=uid, add_generation_prompt=False, template_kwargs=template_kwargs)

    try:
        return text(messages) == text(less)
    except DataError:  # the template needs what was taken out
        return False


def _overlong(prompts: Sequence[Prompt], ids: list[list[int]], limit: int, num: int) -> DataError:
    first = next(place for place, row in enumerate(ids) if len(row) > limit)
    return DataError(
        f"row {prompts[first].uid}: the prompt has {len(ids[first])} tokens, {setting('max_prompt_length')} is "
        f"{limit}; {num} of {len(prompts)} prompts are too long, the longest has {max(map(len, ids))} tokens. Raise "
        f"{setting('max_prompt_length')}, or drop them with {setting('filter_overlong_prompts')}=True, or cut them "
        f"with {setting('truncation')}=left, right or middle."
    )


def _has_generation_prompt(
    prompt: Prompt, text: str, tokenizer: Any, template_kwargs: Mapping[str, Any] | None
) -> bool:
    bare = render(
        prompt.messages, tokenizer, where=prompt.uid, add_generation_prompt=False, template_kwargs=template_kwargs
    )
    return text != bare


def check_lengths(max_length: int, truncation: str, *, key: str) -> None:
    """Raise ConfigError for a limit below 1 or an unknown truncation."""
    if max_length < 1:
        raise ConfigError(f"{key}={max_length}: expected a number of tokens above 0.")
    if truncation not in TRUNCATIONS:
        raise ConfigError(f"{setting('truncation')}={truncation!r}: expected one of {', '.join(TRUNCATIONS)}.")


def render(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    *,
    where: str,
    add_generation_prompt: bool,
    template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The text that the chat template writes. `where` names the row in errors (a template may refuse system
    messages)."""
    options = dict(template_kwargs or {})
    if taken := [name for name in _OURS if name in options]:
        raise ConfigError(f"{setting('apply_chat_template_kwargs')}.{taken[0]}: set by Steepest itself; leave it out.")
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in options:
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise ModelError(
            f"the tokenizer of {name} has no chat template, so messages cannot become text. Use an instruction-tuned "
            f"model, or give a template with {setting('custom_chat_template')}."
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template is a program of the model's author: it may raise anything
        raise DataError(
            f"row {where}: the model's chat template does not take this conversation: {type(error).__name__}: "
            f"{error}. Roles here: {', '.join(message['role'] for message in messages)}. Change the row, or the "
            f"template with {setting('custom_chat_template')}."
        ) from error
    if not text:
        raise DataError(f"row {where}: the model's chat template makes an empty text of this conversation.")
    return str(text)


def tokenize(texts: Sequence[str], tokenizer: Any) -> tuple[list[list[int]], int]:
    """Token ids of rendered texts, without added special tokens, and the number of texts whose doubled BOS was made
    single."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        encoded = tokenizer(
            list(texts[start : start + CHUNK]), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids.extend(list(row) for row in encoded["input_ids"])
    bos, removed = getattr(tokenizer, "bos_token_id", None), 0
    for place, row in enumerate(ids):
        if bos is not None and row[:2] == [bos, bos]:
            extra = next((index for index, token in enumerate(row) if token != bos), len(row)) - 1
            ids[place], removed = row[extra:], removed + 1
    return ids, removed


def cut(row: Sequence[int], limit: int, truncation: str) -> list[int]:
    """Keep at most `limit` entries: "left" drops from the start, "right" from the end, "middle" between the two
    halves."""
    if len(row) <= limit:
        return list(row)
    if truncation == "left":
        return list(row[-limit:])
    if truncation == "right":
        return list(row[:limit])
    head = limit // 2
    return [*row[:head], *row[len(row) - (limit - head) :]]
