"""From token ids to the text that rewards get. docs/rewards.md, "What a reward gets", says what comes out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

from steepest.core.batch import Batch
from steepest.data.chat import render
from steepest.data.prompts import Prompt
from steepest.errors import DataError, ModelError

Skipped = Literal["template", "all", "none"]
_OPENED = re.compile(r"<(think|thinking|answer)>\s*(?:</\1>\s*)?\Z")
_TAIL_TOKENS = 32
_ANCHOR = "a"
_TAG = re.compile(r"</?(?:think|thinking|answer)>")
_SHOWN = 8
_ASKED = 200  # prompts that are searched for names of special tokens


class WritesTexts(Protocol):
    """Decodes responses for rewards."""

    def texts(self, batch: Batch) -> list[str]:
        """The text of each response."""
        ...

    def opening(self, prompt_ids: Sequence[int]) -> str:
        """What the prompt has already opened of the response, such as `<think>` and a line break; else empty."""
        ...


@dataclass(frozen=True)
class ResponseText:
    """Decodes the policy's tokens as it wrote them: a space at the start stays, and nothing is tidied up.

    `skip` says which special tokens are left out of the text. template: those that a chat template writes around a
    turn, the end, pad and start tokens, and the unknown token, which has no text. all: every special token. none: no
    token.
    """

    tokenizer: Any
    skip: Skipped = "template"
    end_ids: Collection[int] = ()
    """Tokens that end a response, in addition to the tokenizer's own."""
    _openings: dict[tuple[int, ...], str] = field(default_factory=dict)

    def texts(self, batch: Batch) -> list[str]:
        lengths, cut = batch.response_lengths.tolist(), batch.truncated.tolist()
        rows = [row[:n] for row, n in zip(batch.responses.tolist(), lengths, strict=True)]
        # bytes of a character that the length limit has cut decode to U+FFFD
        return [text.rstrip("\ufffd") if cut else text for text, cut in zip(self.decode(rows), cut, strict=True)]

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """The texts of responses, given as token ids without padding."""
        anchor = self._anchor
        kept = [[*anchor, *(id for id in row if id not in self.skipped_ids)] for row in rows]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text[len(_ANCHOR) :] if anchor else text for text in texts]

    def opening(self, prompt_ids: Sequence[int]) -> str:
        tail = tuple(prompt_ids[-_TAIL_TOKENS:])
        if tail not in self._openings:
            text = self.tokenizer.decode(tail, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            match = _OPENED.search(text)
            self._openings[tail] = match[0] if match else ""
        return self._openings[tail]

    @cached_property
    def skipped_ids(self) -> frozenset[int]:
        """Token ids that are left out of the text."""
        tokenizer = self.tokenizer
        if self.skip == "none":
            return frozenset()
        if self.skip == "all":
            return frozenset(tokenizer.all_special_ids) | frozenset(self.end_ids)
        own = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        return frozenset(id for id in own if id is not None) | frozenset(self.end_ids) | self._template_ids

    @cached_property
    def _template_ids(self) -> frozenset[int]:
        """Special tokens that the chat template writes around a turn of the user."""
        try:
            turn = [{"role": "user", "content": _ANCHOR}]
            text = render(turn, self.tokenizer, where="0", add_generation_prompt=False)
        except (DataError, ModelError):  # none, or it takes no lone turn: the end tokens are known without it
            return frozenset()
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return frozenset(ids) & frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def _anchor(self) -> list[int]:
        """Tokens before the response, cut off after decoding: some decoders drop a space at the start of a text."""
        ids = list(self.tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"])
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return ids if text == _ANCHOR else []

    def notes(self, prompts: Sequence[Prompt]) -> list[str]:
        """Special tokens of the tokenizer that the prompts or the form of a response speak of, and whether rewards
        get them."""
        asked = "".join(str(message.get("content")) for prompt in prompts[:_ASKED] for message in prompt.messages)
        special = {id: self.tokenizer.convert_ids_to_tokens(id) for id in self.tokenizer.all_special_ids}
        around = self._template_ids | {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, *self.end_ids}
        named = [
            token for id, token in special.items() if id not in around and (token in asked or _TAG.fullmatch(token))
        ]
        if not named or self.skip == "none":
            return []
        tokens = " ".join(named[:_SHOWN]) + (" ..." if len(named) > _SHOWN else "")
        if self.skip == "all":
            return [
                f"warning: {tokens}: special tokens of this tokenizer, so rewards do not see them "
                "(reward.skip_special_tokens=all). Set reward.skip_special_tokens=template to keep them in the text."
            ]
        return [f"rewards see {tokens}, special tokens of this tokenizer (reward.skip_special_tokens=template)."]
