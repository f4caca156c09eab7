"""Rollout correction and its metrics beside verl's, PF-PPO's weights too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.core.mismatch import off_policy_metrics
from steepest.core.policy_losses import LossInputs
from steepest.core.rollout_correction import REJECTIONS, Rejection, Weighting, bypass_reinforce, correct
from steepest.core.row_selection import pf_ppo_weights
from tests.parity import verl_side
from tests.parity.batches import Rows, every_batch, rows
from tests.parity.conftest import Parity

pytestmark = pytest.mark.parity


def theirs(r: Rows, **options: Any) -> tuple[torch.Tensor | None, torch.Tensor, dict[str, float]]:
    """verl's weights, edited mask and metrics."""
    weights, mask, metrics = verl_side.correction().compute_rollout_correction_and_rejection_mask(
        r.old_log_probs, r.rollout_log_probs, r.ones, **options
    )
    return None if weights is None else weights.batch["rollout_is_weights"], mask, metrics


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("threshold", ["1.2", "0.6_1.5"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights(parity: Parity, level: Any, threshold: str, normalize: bool) -> None:
    bounds = [float(x) for x in threshold.split("_")]
    weighting = Weighting(
        level, high=bounds[-1], low=bounds[0] if len(bounds) == 2 else None, batch_normalize=normalize
    )
    for r in every_batch():
        found = correct(r.rollout_log_probs, r.old_log_probs, r.mask, weighting=weighting)
        weights, _, metrics = theirs(
            r, rollout_is=level, rollout_is_threshold=threshold, rollout_is_batch_normalize=normalize
        )
        assert found.weights is not None and weights is not None
        name = f"rollout_is {level} {'TIS' if len(bounds) == 1 else 'IcePop'}{' normalised' if normalize else ''}"
        parity.same(name, found.weights, weights)
        for key in ("mean", "eff_sample_size", "seq_mean"):
            key = f"rollout_corr/rollout_is_{key}"
            parity.same(f"{key} {level}", found.metrics[key], metrics[key])


@pytest.mark.parametrize("kind", REJECTIONS)
def test_rejection(parity: Parity, kind: str) -> None:
    # a threshold that takes about half of them
    high = {"token": 1.3, "seq_sum": 2.0, "seq_mean": 1.15}.get(kind.rpartition("_")[0], 0.2)
    if not kind.endswith("k1"):
        high = {"token": 0.05, "seq_sum": 0.4, "seq_mean": 0.08}.get(kind.rpartition("_")[0], 0.2)
    left_out = 0
    for r in every_batch():
        found = correct(r.rollout_log_probs, r.old_log_probs, r.mask, rejections=[Rejection(kind, high)])
        _, mask, metrics = theirs(r, rollout_rs=kind, rollout_rs_threshold=str(high))
        parity.same(f"rollout_rs {kind}", found.kept.double(), mask)
        for key in (
            f"{kind}_fraction_high",
            f"{kind}_masked_fraction",
            f"{kind}_seq_masked_fraction",
            "masked_fraction",
        ):
            key = f"rollout_corr/rollout_rs_{key}"
            parity.same(f"rollout_rs {kind} metrics", found.metrics[key], metrics[key])
        left_out += int((r.mask & ~found.kept).sum())
    assert left_out > 100


def test_rejections_together(parity: Parity) -> None:
    chain = [Rejection("token_k1", 2.0, 0.5), Rejection("seq_mean_k3", 0.1)]
    for r in every_batch():
        found = correct(r.rollout_log_probs, r.old_log_probs, r.mask, rejections=chain)
        _, mask, _ = theirs(r, rollout_rs="token_k1,seq_mean_k3", rollout_rs_threshold="0.5_2.0,0.1")
        parity.same("rollout_rs two together", found.kept.double(), mask)


def test_a_rejected_response_is_part_of_the_mean_weight_in_verl(parity: Parity) -> None:
    r = rows(9)
    rejection = Rejection("seq_mean_k3", 0.08)
    options = {"rollout_is": "token", "rollout_is_threshold": 2.0, "rollout_is_batch_normalize": True,
               "rollout_rs": "seq_mean_k3", "rollout_rs_threshold": "0.08"}  # fmt: skip
    found = correct(r.rollout_log_probs, r.old_log_probs, r.mask, rejections=[rejection],
                    weighting=Weighting("token", batch_normalize=True))  # fmt: skip
    weights, mask, _ = theirs(r, **options)
    assert found.weights is not None and weights is not None
    assert float(found.weights[found.kept].mean()) == pytest.approx(1.0)
    assert float(weights[mask.bool()].mean()) != pytest.approx(1.0, abs=1e-3)
    assert float(weights[r.mask].mean()) == pytest.approx(1.0)
    parity.differs(
        "rollout_is normalised", "with rejection: verl's mean includes what is rejected; kept tokens only here"
    )


def test_off_policy_metrics(parity: Parity) -> None:
    for r in every_batch():
        found = off_policy_metrics(r.rollout_log_probs, r.old_log_probs, r.mask)
        metrics = verl_side.correction().compute_offpolicy_metrics(r.old_log_probs, r.rollout_log_probs, r.ones)
        for key, value in metrics.items():
            # relative: a squared ratio of a response is large
            scale = max(1.0, abs(value))
            parity.same(f"rollout_corr/{key}", found[f"rollout_corr/{key}"] / scale, value / scale)


@pytest.mark.parametrize("level", ["token", "sequence", None])
def test_reinforce_of_bypass_mode(parity: Parity, level: Any) -> None:
    """The rollout's log-probs are the old ones; verl's function gets its weights from the one above."""
    for r in every_batch():
        ours_in, theirs_in = (r.log_probs.clone().requires_grad_() for _ in range(2))
        weighting = None if level is None else Weighting(level, high=1.5)
        per_token, _ = bypass_reinforce(LossInputs(ours_in, r.old_log_probs, r.advantages, r.mask), weighting=weighting)
        weights = None
        if level is not None:
            weights, _ = verl_side.correction().compute_rollout_correction_weights(
                r.log_probs - r.old_log_probs, r.ones, level, 1.5
            )
        loss, _ = verl_side.core_algos().compute_policy_loss_reinforce(
            r.old_log_probs, theirs_in, r.advantages, r.ones, "token-sum", verl_side.actor_config(), weights
        )
        parity.same(f"reinforce {level}", per_token[r.mask].sum(), loss)
        (a,), (b,) = torch.autograd.grad(per_token.sum(), ours_in), torch.autograd.grad(loss, theirs_in)
        parity.same(f"reinforce {level} gradient", a, b)


@pytest.mark.parametrize("method", ["pow", "max_min", "max_random"])
def test_pf_ppo_draws_as_often(parity: Parity, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl shows its weights to the draw only, so the draw is where they are read."""
    from verl import DataProto

    seen: list[torch.Tensor] = []
    draw = torch.multinomial

    def watched(weights: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(weights)
        return draw(weights, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", watched)
    for r in every_batch():
        data = DataProto.from_dict({"token_level_scores": r.outcome_rewards})
        verl_side.core_algos().compute_pf_ppo_reweight_data(data, method, 2.0)
        scores = r.outcome_rewards.sum(1)
        found = pf_ppo_weights(scores, torch.ones(len(scores), dtype=torch.bool), method=method, weight_pow=2.0)
        parity.same(f"pf_ppo {method}", found, seen.pop())
