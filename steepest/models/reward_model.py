"""Reward models: any Hugging Face sequence-classification model, which scores conversations in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from steepest.errors import ModelError
from steepest.models.file_weights import LANGUAGE_HEAD, check_finite, check_names
from steepest.models.hf_logging import quiet_transformers
from steepest.models.load import as_model_error, check_pad_id, load_tokenizer
from steepest.registry import nearest

Messages = Sequence[Mapping[str, Any]]
_NO_LIMIT = 10**6  # tokenizers without a limit report a huge number


@dataclass
class RewardModel:
    """Scores a conversation with its response, tokenized by the reward model's own tokenizer.

    With one output the score is its logit; with several it is the probability of output number `label`.
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
        """Token ids by the chat template, with the response as the assistant's turn. Without a template they are those
        of the turns' texts with a blank line between them, and the special tokens that the tokenizer puts around a
        text."""
        turns = [dict(message) for message in messages] + [{"role": "assistant", "content": response}]
        if self.tokenizer.chat_template is None:
            text = "\n\n".join(str(turn["content"]) for turn in turns)
            return list(self.tokenizer(text)["input_ids"])
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score per sequence, in order. Sequences of similar length share a pass, which changes scores only by
        rounding."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        for start in range(0, len(order), self.micro_batch_size):
            chosen = order[start : start + self.micro_batch_size]
            for i, value in zip(chosen, self._batch([sequences[i] for i in chosen]).tolist(), strict=True):
                scores[i] = value
        return scores

    def _batch(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """The scores (b,) f32, on the CPU. Rows are padded on the right, so that no real token attends to padding."""
        width, config = max(map(len, rows)), self.model.config
        own_pad = config.pad_token_id
        # transformers' decoders take the score at the last token that is not the pad token. A tokenizer may have no pad
        # token of its own, so the padding must be a token that no row holds.
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
    """Load a reward model from a local folder, in evaluation mode. Raises ModelError if there is no such model, weights
    are missing, the label does not exist, or there are several labels and none is named."""
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    with as_model_error(path, "reward model"), quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_pad_id(path, config)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:5])
        raise ModelError(
            f"{path}: {len(info['missing_keys'])} weights are not in the checkpoint ({names}), so scores would be "
            "random. Name a model that was trained as a reward model."
        )
    check_names(path, model, info, other_heads=LANGUAGE_HEAD)
    check_finite(path, model.state_dict().items())
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
