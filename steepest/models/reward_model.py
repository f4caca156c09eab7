"""A reward model: any Hugging Face sequence-classification model, scoring conversations in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from steepest.errors import ModelError
from steepest.models.hf_logging import quiet_transformers
from steepest.models.load import load_tokenizer
from steepest.registry import nearest

Messages = Sequence[Mapping[str, Any]]
_NO_LIMIT = 10**6  # tokenizers without a limit say a huge number


@dataclass
class RewardModel:
    """Scores a conversation with its response by the text that the model's own tokenizer makes of both.

    One output: the score is its logit. Several: the probability of `label`, by its number.
    """

    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    micro_batch_size: int = 8
    label: int | None = None

    @property
    def max_tokens(self) -> int | None:
        """The longest text that the model reads; None without a limit."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
        return min(known, default=None)

    def token_ids(self, messages: Messages, response: str) -> list[int]:
        """By the chat template, with the response as the assistant's turn. Without a template: the turns' texts, a
        blank line between them, with the special tokens that the tokenizer puts around a text."""
        turns = [dict(message) for message in messages] + [{"role": "assistant", "content": response}]
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(str(turn["content"]) for turn in turns)
            return list(self.tokenizer(text)["input_ids"])
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """A score each, in their order; rows of like length share a pass. The same as one at a time, to rounding."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.micro_batch_size):
            chosen = order[start : start + self.micro_batch_size]
            for i, value in zip(chosen, self._batch([sequences[i] for i in chosen]).tolist(), strict=True):
                scores[i] = value
        return scores

    def _batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(b,) f32 on the CPU. Padded on the right, so that nothing real sees padding."""
        width, config = max(map(len, rows)), self.model.config
        own_pad = config.pad_token_id
        # Decoders read the score at the last token that is no pad. Without a pad of its own that is the last token, so
        # the padding must be a token that no row has.
        pad = own_pad if own_pad is not None else _unused(rows)
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        try:
            config.pad_token_id = pad
            logits = self.model(input_ids=ids, attention_mask=mask).logits.float()
        finally:
            config.pad_token_id = own_pad
        scores = logits[:, 0] if self.label is None else logits.softmax(dim=-1)[:, self.label]
        return scores.cpu()


def _unused(rows: Sequence[Sequence[int]]) -> int:
    used = {token for row in rows for token in row}
    return next(token for token in range(len(used) + 1) if token not in used)


def load_reward_model(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    micro_batch_size: int,
    label: str | None,
    trust_remote_code: bool,
) -> RewardModel:
    """From a local folder, in evaluation mode. Raises ModelError: no such model, weights missing, a label that it has
    not, several labels and none named."""
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: not a sequence-classification model: {' '.join(str(error).split())[:300]}"
        ) from error
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(
            f"{path}: {len(info['missing_keys'])} weights are not in the checkpoint ({names}), so scores would be "
            "random. Name a model that was trained as a reward model."
        )
    number = _label_number(path, model.config, label)
    return RewardModel(model.to(device).eval(), tokenizer, device, micro_batch_size, number)


def _label_number(path: Path, config: Any, label: str | None) -> int | None:
    if config.num_labels == 1:
        if label is not None:
            raise ModelError(f"{path}: it has one output, so there is no label to choose. Remove the label.")
        return None
    names = {str(name): int(number) for number, name in config.id2label.items()}
    if label is None or label not in names:
        guess = nearest(label, names) if label is not None else None
        hint = f" Did you mean {guess!r}?" if guess else ""
        what = "name the one whose probability is the score" if label is None else f"it has no label {label!r}"
        raise ModelError(f"{path}: it has {len(names)} labels; {what}.{hint} Its labels: {', '.join(names)}.")
    return names[label]
