"""Advantages and returns of a step, by an estimator of `core` that is chosen once, at start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.core.advantages import AdvantageInputs
from steepest.core.batch import Batch
from steepest.core.masked import whiten

Estimator = Callable[[AdvantageInputs], tuple[Tensor, Tensor]]


@dataclass
class Advantages:
    """The estimator's advantages and returns; whitened over the tokens of loss_mask where `whitened` says so.

    The estimator reads the tokens of trained_mask, so that a reward on a token that the losses leave out still counts.
    Advantages and returns are 0 where loss_mask is false.
    """

    estimator: Estimator
    whitened: bool

    def __call__(self, batch: Batch) -> None:
        with torch.no_grad():
            advantages, returns = self.estimator(AdvantageInputs.of(batch))
            mask = batch.loss_mask
            batch.returns = torch.where(mask, returns, 0.0)
            batch.advantages = whiten(advantages, mask) if self.whitened else torch.where(mask, advantages, 0.0)
