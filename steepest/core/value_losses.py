"""The critic's loss per token, and the share of the returns' variance that its values explain."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.masked import masked_var
from steepest.core.reducer import IDENTITY, Reducer


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    *,
    cliprange_value: float,
    response_mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The larger of two squared errors: of the values, and of the values clipped to the values before the update.

        near = clip(v, old_v - cliprange_value, old_v + cliprange_value)
        loss = 0.5 * max((v - R)^2, (near - R)^2)

    All tensors are (b, T) f32; the gradient flows through `values`. Returns (loss, stats), with stats `vf_clipfrac` 1
    where the clipped side is the active one, without gradient. With `response_mask` (b, T) bool both are 0 and
    without gradient where it is false, whatever the inputs hold there; without it the caller masks, and the inputs
    must be finite everywhere.

    As in Schulman's PPO code, as studied in https://arxiv.org/abs/2006.05990, with verl's factor 0.5.
    """
    if response_mask is not None:
        values, old_values, returns = (torch.where(response_mask, x, 0.0) for x in (values, old_values, returns))
    near = torch.minimum(torch.maximum(values, old_values - cliprange_value), old_values + cliprange_value)
    unclipped = (values - returns) ** 2
    clipped = (near - returns) ** 2
    stats = {"vf_clipfrac": (clipped > unclipped).detach().to(values.dtype)}
    return 0.5 * torch.maximum(unclipped, clipped), stats


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reducer: Reducer = IDENTITY) -> float | None:
    """Share of the returns' variance that the values explain, over the true positions.

        1 - var(R - V) / var(R)

    1 for a perfect critic, 0 for a constant one, below 0 for one that is worse than a constant. values, returns and
    mask are (B, T); masked positions are ignored. None when the returns do not vary: there is nothing to explain.
    `reducer` adds up over ranks that have a part of the rows each.
    """
    # Decided by comparison, not by the variance: that of equal numbers is a rounding error, not 0.
    high, minus_low = reducer.max(
        torch.stack([torch.where(mask, x, -torch.inf).amax() for x in (returns, -returns)])
    ).tolist()
    if high <= -minus_low:
        return None
    unexplained = masked_var(returns - values, mask, reducer)
    return 1.0 - float(unexplained / masked_var(returns, mask, reducer))
