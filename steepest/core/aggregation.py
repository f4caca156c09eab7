"""Turns a loss per token into the loss of a mini-batch. The result does not depend on the micro-batches.

The denominator is a number, counted once over the whole mini-batch and all processes. So the sum of `aggregate` over
micro-batches is the loss of the mini-batch, and the sum of their gradients is its gradient; nothing is rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.masked import masked_mean, masked_sum
from steepest.core.reducer import IDENTITY, Reducer
from steepest.errors import ConfigError, setting
from steepest.registry import nearest

LOSS_AGG_MODES: tuple[str, ...] = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


@dataclass(frozen=True)
class LossDenominators:
    """Counts of a whole mini-batch, over all its micro-batches and processes. Counts of parts may be added up."""

    num_tokens: float
    """Positions with response_mask true."""
    num_sequences: float
    """Rows with at least one such position."""

    @classmethod
    def of(cls, mask: Tensor, reducer: Reducer = IDENTITY) -> LossDenominators:
        """The counts of a (B, T) bool mask; `reducer` adds up over ranks that have a part of the rows each."""
        tokens, sequences = reducer.sum(torch.stack([mask.sum(), mask.any(1).sum()])).tolist()
        return cls(num_tokens=float(tokens), num_sequences=float(sequences))


def aggregate(
    per_token: Tensor,
    mask: Tensor,
    mode: str,
    denominators: LossDenominators,
    *,
    scale_factor: float | None = None,
) -> Tensor:
    """One micro-batch's share of the mini-batch loss, a scalar.

        token-mean               sum of true tokens / num_tokens             every token weighs the same
        token-sum                sum of true tokens
        seq-mean-token-sum       sum of true tokens / num_sequences
        seq-mean-token-mean      sum of the rows' means / num_sequences      every row weighs the same
        seq-mean-token-sum-norm  sum of true tokens / num_sequences / scale_factor       (Dr. GRPO)

    per_token and mask are (b, T). Masked positions and rows without a true token count neither in the numerator nor in
    the denominator, whatever values they hold. A mini-batch without any true token gives 0.

    Raises ConfigError for an unknown mode, and for the -norm mode without a positive scale_factor.
    """
    if mode not in LOSS_AGG_MODES:
        guess = nearest(mode, LOSS_AGG_MODES)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"loss_agg_mode={mode!r}: no such mode.{hint} Known: {', '.join(LOSS_AGG_MODES)}.")
    total = masked_mean(per_token, mask, dim=1).sum() if mode == "seq-mean-token-mean" else masked_sum(per_token, mask)
    if mode == "token-sum":
        return total
    if mode == "token-mean":
        return total / _at_least_something(denominators.num_tokens)
    total = total / _at_least_something(denominators.num_sequences)
    if mode != "seq-mean-token-sum-norm":
        return total
    if scale_factor is None or scale_factor <= 0:
        raise ConfigError(
            f"loss_agg_mode=seq-mean-token-sum-norm with loss_scale_factor={scale_factor}: needs a number above 0, "
            f"for example {setting('max_response_length')}. The padded width will not do: it differs from step to step."
        )
    return total / scale_factor


def _at_least_something(count: float) -> float:
    """The count, or 1 where it is 0. Then the numerator is 0 too, and the loss is 0."""
    return count if count > 0 else 1.0
