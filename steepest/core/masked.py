"""Sums, means and variances over the true positions of a mask.

Values outside the mask never take part: they are replaced by selection, not multiplied by 0, so a NaN or inf in padding
does not reach the result. Their gradient is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.reducer import IDENTITY, Reducer


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x where mask is true; 0 where no position is true.

    x and mask have one shape. With `dim` the sum runs along it, else over everything.
    """
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is true; 0 where no position is true.

    x and mask have one shape. With `dim` the mean runs along it, else over everything.
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, reducer: Reducer = IDENTITY) -> Tensor:
    """Unbiased variance of x where mask is true: sum((x - mean)^2) / (n - 1).

    x and mask have one shape; the result is a scalar. With one true position or none it is 0. `reducer` adds up over
    ranks that have a part of the rows each: the result is that of all rows, on every rank.
    """
    count = reducer.sum(mask.sum())
    return _var(_centred(x, mask, count, reducer), count, reducer)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8, reducer: Reducer = IDENTITY) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over the true positions.

        y = (x - mean) / sqrt(var + eps)

    mean and the unbiased var are those of the true positions only, of the whole tensor. Call it on the whole batch,
    never on a micro-batch. x, mask and y have one shape; y is 0 where mask is false. With one true position y is 0.
    `reducer` adds up over ranks that have a part of the rows each: mean and var are those of all rows.
    """
    count = reducer.sum(mask.sum())
    centred = _centred(x, mask, count, reducer)
    return centred * torch.rsqrt(_var(centred, count, reducer) + eps)


def _centred(x: Tensor, mask: Tensor, count: Tensor, reducer: Reducer) -> Tensor:
    """x - mean where mask is true, 0 elsewhere: selected before anything squares it, for the gradient's sake."""
    mean = reducer.sum(masked_sum(x, mask)) / count.clamp(min=1)
    return torch.where(mask, x - mean, torch.zeros_like(x))


def _var(centred: Tensor, count: Tensor, reducer: Reducer) -> Tensor:
    return reducer.sum(centred.square().sum()) / (count - 1).clamp(min=1)
