"""The algorithm's part of a step: rewards after the KL penalty, then advantages, by functions of `core` chosen once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from steepest.core.advantages import AdvantageInputs
from steepest.core.batch import Batch
from steepest.core.kl import apply_kl_penalty
from steepest.core.masked import whiten
from steepest.training.meters import Metrics

Estimator = Callable[[AdvantageInputs], tuple[Tensor, Tensor]]


class KLController(Protocol):
    @property
    def value(self) -> float: ...
    def update(self, kl: float, num_rows: int) -> None: ...
    def state_dict(self) -> dict[str, float]: ...
    def load_state_dict(self, state: dict[str, float]) -> None: ...


def with_options(function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` with those of `options` that it takes as keywords."""
    names = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return partial(function, **{name: value for name, value in options.items() if name in names})


def plain_rewards(batch: Batch) -> Metrics:
    """No KL term in the reward: token_level_rewards are the scores."""
    batch.token_level_rewards = batch.token_level_scores
    return {}


@dataclass
class KLShapedRewards:
    """r_t = score_t - coef * kl(old_log_probs_t, ref_log_probs_t), and the controller's update of coef.

    `actor/reward_kl_penalty` is the mean over rows of the row's mean KL (before this step's update), and
    `actor/reward_kl_penalty_coeff` the coefficient this step was penalised with. The controller counts the rows of
    that mean: those with a policy token. A step without one says nothing about the KL and moves nothing.
    """

    controller: KLController
    kind: str

    def __call__(self, batch: Batch) -> Metrics:
        assert batch.token_level_scores is not None
        assert batch.old_log_probs is not None and batch.ref_log_probs is not None
        coef = self.controller.value
        batch.token_level_rewards, mean_kl = apply_kl_penalty(
            batch.token_level_scores,
            batch.old_log_probs,
            batch.ref_log_probs,
            batch.response_mask,
            coef=coef,
            kind=self.kind,
        )
        kl = float(mean_kl)
        self.controller.update(kl, int(batch.response_mask.any(dim=1).sum()))
        return {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": coef}


@dataclass
class Advantages:
    """The estimator's advantages and returns; whitened over the step's policy tokens where `whitened` says so.

    The estimator sees every token of a response, whitening and the losses those of `batch.loss_mask` alone."""

    estimator: Estimator
    whitened: bool

    def returns_of(self, batch: Batch) -> Tensor:
        """The returns (b, T) of some rows, by an estimator that needs nothing but the row."""
        with torch.no_grad():
            return self.estimator(_inputs(batch))[1]

    def __call__(self, batch: Batch) -> None:
        with torch.no_grad():
            advantages, returns = self.estimator(_inputs(batch))
            mask = drop_from_losses(batch)
            batch.returns = torch.where(mask, returns, 0.0)
            batch.advantages = whiten(advantages, mask) if self.whitened else torch.where(mask, advantages, 0.0)


def drop_from_losses(batch: Batch) -> Tensor:
    """Narrow response_mask to `loss_mask`, if there is one: rewards have been read, only losses follow."""
    if batch.loss_mask is not None:
        batch.response_mask = batch.response_mask & batch.loss_mask
    return batch.response_mask


def _inputs(batch: Batch) -> AdvantageInputs:
    """The fields of the batch that have the same names."""
    assert batch.token_level_rewards is not None
    return AdvantageInputs(**{item.name: getattr(batch, item.name) for item in dataclasses.fields(AdvantageInputs)})
