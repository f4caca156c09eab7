"""verl's public functions, imported when a test asks for them, and the configuration objects they want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.parity.batches import Rows


def core_algos() -> Any:
    from verl.trainer.ppo import core_algos

    return core_algos


def functional() -> Any:
    from verl.utils import torch_functional

    return torch_functional


def correction() -> Any:
    from verl.trainer.ppo import rollout_corr_helper

    return rollout_corr_helper


def actor_config(*, policy_loss: dict[str, Any] | None = None, **more: Any) -> Any:
    """verl's actor configuration with the fields that a loss reads."""
    from verl.workers.config import ActorConfig, PolicyLossConfig

    given: dict[str, Any] = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 3.0}
    given.update(more)
    if policy_loss:
        given["policy_loss"] = PolicyLossConfig(**policy_loss)
    return ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **given)


def algo_config(**more: Any) -> Any:
    from verl.trainer.config import AlgoConfig

    return AlgoConfig(**more)


def estimate(name: str, r: Rows, rewards: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """verl's estimator `name` on this batch; rewards are a copy, because some of them write into it."""
    function = core_algos().get_adv_estimator_fn(name)
    return function(token_level_rewards=rewards.clone(), response_mask=r.ones, index=r.groups.numpy(), **more)


def policy_loss(name: str, r: Rows, mode: str, config: Any, **more: Any) -> tuple[float, Tensor, dict[str, float]]:
    """verl's loss `name`: its number, its gradient for the log-probs, its metrics."""
    log_probs = r.log_probs.clone().requires_grad_()
    function = core_algos().get_policy_loss_fn(name)
    loss, metrics = function(
        old_log_prob=r.old_log_probs,
        log_prob=log_probs,
        advantages=r.advantages.clone(),
        response_mask=r.ones,
        loss_agg_mode=mode,
        config=config,
        **more,
    )
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return float(loss.detach()), gradient, metrics
