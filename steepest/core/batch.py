"""The batch of one step: every field with its shape, its type and who writes it.

B sequences, P prompt tokens, T response tokens, S = P + T.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class RowStatus(IntEnum):
    """Whether a row is trained and, if not, why the whole row is left out. `Batch.row_status` holds these numbers."""

    TRAINED = 0
    REWARD_FAILED = 1
    """The reward of the row failed, or the reward from which its baseline is computed."""
    TRUNCATED = 2
    """The response was cut at the length limit, and `algorithm.mask_truncated` is on."""
    EQUAL_GROUP = 3
    """All responses to the row's prompt have the same score, and `algorithm.mask_equal_groups` is on."""
    REJECTED = 4
    """Rollout correction rejected every token of the row."""


@dataclass
class Batch:
    """One step's sequences. Fields that default to None are filled in by the step, in the order written here.

    Lengths come from the rollout engine, never from comparing with a pad id: a pad id may equal an end id.

    Three masks of shape (B, T) select tokens, each for other readers. Each is a subset of the one before:

        response_mask   tokens that the policy produced; written by the rollout and never changed
        trained_mask    response_mask of the rows that are trained; read by the passes before the update and by the
                        advantage estimators: a reward may lie on a token that the losses leave out
        loss_mask       tokens of the losses; read by the updates, their denominators, whitening and statistics

    Rows are left out by `leave_out` alone. Example: two rows, pad id 0. Row 0 calls a tool (token 40 is its output) and
    was scored 1; row 1 was cut at the length limit, its reward failed.

        prompts          [[ 5,  6,  7],      padded on the left
                          [ 0,  0,  8]]
        responses        [[31, 40, 32,  2],  padded on the right; 2 ends the response
                          [33, 34,  0,  0]]
        prompt_lengths   [3, 1]
        response_lengths [4, 2]
        response_mask    [[ 1,  0,  1,  1],  0 on tool output and on padding
                          [ 1,  1,  0,  0]]
        row_status       [0, 1]              TRAINED, REWARD_FAILED
        trained_mask     [[ 1,  0,  1,  1],
                          [ 0,  0,  0,  0]]
        loss_mask        [[ 1,  0,  0,  1],  rollout correction has left token 32 out
                          [ 0,  0,  0,  0]]
        token_level_scores
                         [[ 0,  0,  0,  1],  the score lies on the last token of the policy
                          [ 0,  0,  0,  0]]
    """

    prompts: Tensor
    """(B, P) int64, left-padded token ids; from the data."""
    responses: Tensor
    """(B, T) int64, right-padded token ids; the engine's own ids, never re-encoded text."""
    prompt_lengths: Tensor
    """(B,) int64, real prompt tokens."""
    response_lengths: Tensor
    """(B,) int64, real response tokens, the end token included."""
    response_mask: Tensor
    """(B, T) bool, true on tokens the policy produced, the end token included; false on padding and tool output.

    Written by the rollout and not changed afterwards."""
    row_status: Tensor
    """(B,) int64, the `RowStatus` of each row; TRAINED until `leave_out` changes it."""
    loss_mask: Tensor
    """(B, T) bool, the tokens of losses, denominators and whitening: a subset of `trained_mask`, and equal to it until
    rollout correction leaves single tokens out."""
    group_ids: Tensor
    """(B,) int64, which prompt of the step a response belongs to."""
    truncated: Tensor
    """(B,) bool, true when the response hit the length limit instead of ending."""
    samples: Sequence[Any] = ()
    """B data rows (`data.prompts.Prompt`), the source of each response; for scoring and sample logs."""

    rollout_log_probs: Tensor | None = None
    """(B, T) f32, log-probs of the distribution sampled from, by the engine; 0 where masked."""
    token_level_scores: Tensor | None = None
    """(B, T) f32, the score on the last policy token of a row (`last_policy_token`), 0 elsewhere; by the reward."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Tensors (B, ...) by name that only some advantage estimators read; written if the estimator of the run needs
    them.

    named_rewards (B, K) f32     the K rewards of each response; written by the reward, 0 where it failed
    reward_baselines (B,) f32    the reward of the greedy response to the row's prompt; NaN where that reward failed
    sum_pi_squared (B, T) f32    sum over the vocabulary of the squared probabilities of the policy before the update,
                                 by the actor; 0 outside of trained_mask
    """
    kl_log_probs: Tensor | None = None
    """(B, T) f32, log-probs before the update that the KL penalty in the reward reads: old_log_probs, or the engine's
    log-probs where the loss's ratio uses those of the update itself. None where nothing reads them."""
    old_log_probs: Tensor | None = None
    """(B, T) f32, log-probs before the update that the loss's ratio reads, by the actor; 0 outside of trained_mask, or
    outside of loss_mask where the update itself computes them. Where the engine's log-probs are used instead, rows that
    are left out do not hold 0."""
    recomputed: Tensor | None = None
    """(B,) bool, rows whose old_log_probs the actor computed; the other rows hold the engine's. None: all rows."""
    entropies: Tensor | None = None
    """(B, T) f32, entropy of the policy before the update, by the actor; 0 outside of trained_mask."""
    ref_log_probs: Tensor | None = None
    """(B, T) f32, by the reference; 0 outside of trained_mask."""
    values: Tensor | None = None
    """(B, T) f32, V of the state before token t is produced, by the critic; 0 outside of trained_mask."""
    final_values: Tensor | None = None
    """(B,) f32, V of the state after the last response token, by the critic."""
    token_level_rewards: Tensor | None = None
    """(B, T) f32, token_level_scores after the KL penalty."""
    rollout_is_weights: Tensor | None = None
    """(B, T) f32, factors of the policy loss, by rollout correction; 0 where the loss leaves a token out."""
    advantages: Tensor | None = None
    """(B, T) f32, 0 outside of loss_mask."""
    returns: Tensor | None = None
    """(B, T) f32, the critic's targets, 0 outside of loss_mask."""

    def __len__(self) -> int:
        return self.responses.shape[0]

    @property
    def input_ids(self) -> Tensor:
        """(B, S) int64, prompt then response."""
        return torch.cat([self.prompts, self.responses], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, S) bool, true on real tokens."""
        num_pad = self.prompts.shape[1] - self.prompt_lengths
        prompt = torch.arange(self.prompts.shape[1], device=self.prompts.device) >= num_pad[:, None]
        response = torch.arange(self.responses.shape[1], device=self.prompts.device) < self.response_lengths[:, None]
        return torch.cat([prompt, response], dim=1)

    @property
    def position_ids(self) -> Tensor:
        """(B, S) int64, 0 at the first prompt token; 0 on left padding."""
        return (self.attention_mask.long().cumsum(1) - 1).clamp_(min=0)

    @property
    def lengths(self) -> Tensor:
        """(B,) int64, prompt and response tokens of each sequence."""
        return self.prompt_lengths + self.response_lengths

    @property
    def trained_mask(self) -> Tensor:
        """(B, T) bool, response_mask of the rows whose status is TRAINED; false in all others."""
        return self.response_mask & (self.row_status == RowStatus.TRAINED)[:, None]

    @property
    def last_policy_token(self) -> Tensor:
        """(B,) int64, the column of each row's last token with response_mask true; -1 in a row without one."""
        columns = torch.arange(self.response_mask.shape[1], device=self.response_mask.device)
        return torch.where(self.response_mask, columns, -1).amax(1)

    def leave_out(self, rows: Tensor, status: RowStatus) -> None:
        """Leave whole rows out of the training, for the reason that `status` names.

        rows is (B,) bool. A row that was left out before keeps its first reason. loss_mask becomes false in `rows`;
        response_mask stays. Raises ValueError for TRAINED: a row that was left out does not come back.
        """
        if status == RowStatus.TRAINED:
            raise ValueError("Batch.leave_out: TRAINED is no reason to leave a row out")
        first = rows & (self.row_status == RowStatus.TRAINED)
        self.row_status = torch.where(first, int(status), self.row_status)
        self.loss_mask = self.loss_mask & ~rows[:, None]

    def select(self, rows: Tensor | slice) -> Batch:
        """The batch of some rows, in the order given; padding widths are kept."""
        picked: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                picked[item.name] = value[rows]
            elif item.name == "extras":
                picked[item.name] = {name: extra[rows] for name, extra in value.items()}
            elif item.name == "samples" and len(value):
                indices = torch.arange(len(self))[rows].tolist()
                picked[item.name] = [value[i] for i in indices]
            else:
                picked[item.name] = value
        return type(self)(**picked)

    @classmethod
    def cat(cls, parts: Sequence[Batch], *, pad_id: int = 0) -> Batch:
        """Join the rows of several batches in order, padded to the widest; groups are numbered again from 0.

        Masks are false on the padding that is added. Every group must lie in one part. A field must be None in all
        parts or in none, an extra in all of them or in none; raises ValueError.
        """
        out: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            values = [getattr(part, item.name) for part in parts]
            if item.name == "extras":
                out[item.name] = _cat_extras(values)
            elif any(value is None for value in values):
                if not all(value is None for value in values):
                    raise ValueError(f"Batch.cat: {item.name} is None in some of the parts only")
                out[item.name] = None
            elif isinstance(values[0], Tensor):
                fill = pad_id if item.name in ("prompts", "responses") else 0
                out[item.name] = _cat(values, fill, left=item.name == "prompts")
            else:
                out[item.name] = [row for value in values for row in value]
        groups, start = [], 0
        for part in parts:
            found, number = torch.unique(part.group_ids, return_inverse=True)
            groups.append(number + start)
            start += len(found)
        return cls(**{**out, "group_ids": torch.cat(groups)})

    @classmethod
    def from_sequences(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        *,
        group_ids: Sequence[int],
        truncated: Sequence[bool],
        response_mask: Sequence[Sequence[bool]] | None = None,
        rollout_log_probs: Sequence[Sequence[float]] | None = None,
        samples: Sequence[Any] = (),
        pad_id: int = 0,
    ) -> Batch:
        """Pad ragged token lists: prompts on the left, responses on the right. All lists have length B.

        response_mask has one bool a response token, false on tool output; without it the policy produced every token.
        A row may have no policy token, e.g. the response of an agent that failed at once: it has status TRAINED, its
        score lies nowhere, and it counts in no loss, no group and no statistic but the lengths and rows/trained.
        Every row starts as TRAINED, and loss_mask as response_mask.

        Raises ValueError when the mask of a row is not as long as its response.
        """
        prompt_lengths = torch.tensor([len(p) for p in prompts])
        response_lengths = torch.tensor([len(r) for r in responses])
        width = max(1, int(response_lengths.max()))
        mask = torch.arange(width) < response_lengths[:, None]
        if response_mask is not None:
            mask = _pad_mask(response_mask, responses, width)
        return cls(
            prompts=_pad(prompts, int(prompt_lengths.max()), pad_id, left=True),
            responses=_pad(responses, width, pad_id),
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            response_mask=mask,
            row_status=torch.zeros(len(responses), dtype=torch.int64),
            loss_mask=mask.clone(),
            group_ids=torch.tensor(list(group_ids)),
            truncated=torch.tensor(list(truncated), dtype=torch.bool),
            samples=samples,
            rollout_log_probs=None if rollout_log_probs is None else _pad(rollout_log_probs, width, 0.0),
        )


def _pad_mask(masks: Sequence[Sequence[bool]], responses: Sequence[Sequence[int]], width: int) -> Tensor:
    """(B, width) bool; false on padding."""
    for row, (mask, response) in enumerate(zip(masks, responses, strict=True)):
        if len(mask) != len(response):
            raise ValueError(f"row {row}: response_mask has {len(mask)} entries for {len(response)} response tokens")
    return _pad(masks, width, 0).bool()


def _cat_extras(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    for name in {name for part in parts for name in part}:
        if not all(name in part for part in parts):
            raise ValueError(f"Batch.cat: extras[{name!r}] is missing in some of the parts only")
    return {name: _cat([part[name] for part in parts], 0, left=False) for name in parts[0]}


def _pad(rows: Sequence[Sequence[Any]], width: int, fill: float, *, left: bool = False) -> Tensor:
    dtype = torch.float32 if isinstance(fill, float) else torch.int64
    out = torch.full((len(rows), width), fill, dtype=dtype)
    lengths, column = torch.tensor([len(row) for row in rows]), torch.arange(width)
    real = column >= width - lengths[:, None] if left else column < lengths[:, None]
    out[real] = torch.tensor([value for row in rows for value in row], dtype=dtype)
    return out


def _cat(parts: Sequence[Tensor], fill: int, *, left: bool) -> Tensor:
    """Join tensors along the rows. Tensors of two dimensions are widened with `fill`, on the left or on the right."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    missing = [torch.full((len(part), width - part.shape[1]), fill, dtype=part.dtype) for part in parts]
    return torch.cat([torch.cat([m, p] if left else [p, m], dim=1) for p, m in zip(parts, missing, strict=True)])
