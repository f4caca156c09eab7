"""Policy losses beside verl's: the aggregated number, its gradient for the log-probs, and the metrics."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from steepest.core.aggregation import LossDenominators, aggregate
from steepest.core.masked import masked_mean
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from steepest.core.policy_losses.covariance import STANDS_STILL
from tests.parity import verl_side
from tests.parity.batches import Rows, every_batch, rows
from tests.parity.conftest import Parity

pytestmark = pytest.mark.parity

MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
DUAL = {**CLIP, "clip_ratio_c": 3.0}
COV = {"clip_cov_lb": 0.2, "clip_cov_ub": 0.8}
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    # loss_mode -> our options, verl's fields beside the clip's, the metrics of the same meaning
    "vanilla": (DUAL, {}, ["pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"]),
    "gspo": (CLIP, {}, ["pg_clipfrac", "ppo_kl"]),
    "sapo": ({"tau_pos": 1.0, "tau_neg": 1.05}, {"tau_pos": 1.0, "tau_neg": 1.05}, ["ppo_kl"]),
    "gpg": ({}, {}, []),
    "cispo": (CLIP, {}, ["pg_clipfrac", "ppo_kl"]),
    "dppo_tv": (DUAL, {}, ["pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"]),
    "dppo_kl": (DUAL, {}, ["pg_clipfrac", "pg_clipfrac_lower", "ppo_kl"]),
    "geo_mean": (CLIP, {}, ["ppo_kl"]),
    # a ratio of 1 takes every candidate, so nothing is left to chance
    "clip_cov": ({**CLIP, **COV, "clip_cov_ratio": 1.0}, {"policy_loss": {**COV, "clip_cov_ratio": 1.0}}, ["ppo_kl"]),
    "kl_cov": (
        {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5},
        {"policy_loss": {"kl_cov_ratio": 0.1, "ppo_kl_coef": 0.5}},
        [],
    ),
}
ONE_MODE = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}
"""verl's sapo and geo_mean ignore loss_agg_mode."""


def ours(name: str, r: Rows, mode: str, **options: Any) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Our loss `name`, its gradient, and the means of its stats over the true tokens."""
    log_probs = r.log_probs.clone().requires_grad_()
    x = LossInputs(log_probs, r.old_log_probs, r.advantages, r.mask)
    per_token, stats = POLICY_LOSSES.get(name).value(x, **options)
    loss = aggregate(per_token, r.mask, mode, LossDenominators.of(r.mask))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    return float(loss.detach()), gradient, {key: float(masked_mean(value, r.mask)) for key, value in stats.items()}


def test_every_loss_is_compared() -> None:
    assert sorted(LOSSES) == POLICY_LOSSES.names()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", list(LOSSES))
def test_loss(parity: Parity, name: str, mode: str) -> None:
    if ONE_MODE.get(name, mode) != mode:
        pytest.skip(f"verl's {name} knows only {ONE_MODE[name]}")
    options, fields, metrics_of = LOSSES[name]
    config = verl_side.actor_config(**fields)
    for r in every_batch():
        if name == "geo_mean":  # defined for one advantage a row
            r = replace(r, advantages=r.advantages[:, :1].expand_as(r.advantages))
        if name == "kl_cov":  # every token has moved: what happens at a standstill has a test of its own
            moved = (r.log_probs - r.old_log_probs).abs() >= STANDS_STILL
            r = replace(r, log_probs=torch.where(moved, r.log_probs, r.old_log_probs - 2 * STANDS_STILL))
        loss, gradient, stats = ours(name, r, mode, **options)
        theirs, theirs_gradient, metrics = verl_side.policy_loss(name, r, mode, config)
        parity.same(f"{name} loss", loss, theirs)
        parity.same(f"{name} gradient", gradient, theirs_gradient)
        for key in metrics_of:
            parity.same(f"{name} {key}", stats[key], metrics[f"actor/{key}"])


def test_sapo_and_geo_mean_ignore_the_aggregation_in_verl(parity: Parity) -> None:
    r = rows(5)
    r = replace(r, advantages=r.advantages[:, :1].expand_as(r.advantages))
    for name, mode in ONE_MODE.items():
        options, fields, _ = LOSSES[name]
        config = verl_side.actor_config(**fields)
        theirs, _, _ = verl_side.policy_loss(name, r, "token-mean", config)
        assert theirs == pytest.approx(ours(name, r, mode, **options)[0])
        assert theirs != pytest.approx(ours(name, r, "token-mean", **options)[0], rel=1e-3)
        parity.differs(name, f"verl ignores loss_agg_mode and takes {mode}; the key is followed here")


def test_geo_mean_clips_one_row_in_both_directions_in_verl(parity: Parity) -> None:
    """A = (3, -1): mean 1. Log-ratios (0, -0.5), low 0.2. The row is to rise, and its second token has fallen.

    verl clips the second token by its own sign, at -0.2: -1 * exp((0 - 0.2) / 2) = -0.904837.
    Here by the row's sign, so nothing is clipped: -1 * exp((0 - 0.5) / 2) = -0.778801.
    """
    r = rows(0)
    old = torch.tensor([[-1.0, -1.0]], dtype=torch.float64)
    moved, advantages = old - torch.tensor([[0.0, 0.5]]), torch.tensor([[3.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 2, dtype=torch.bool)
    r = replace(r, mask=mask, old_log_probs=old, log_probs=moved, advantages=advantages)
    theirs, _, _ = verl_side.policy_loss("geo_mean", r, "token-mean", verl_side.actor_config())
    assert theirs == pytest.approx(-0.904837, abs=1e-6)
    assert ours("geo_mean", r, "token-mean", **CLIP)[0] == pytest.approx(-0.778801, abs=1e-6)
    parity.differs("geo_mean", "advantages that differ within a row: verl clips by each token's sign, the row's here")


def test_the_covariance_losses_depend_on_the_micro_batch_in_verl(parity: Parity) -> None:
    """verl-project/verl#7829: the choice is made anew in each micro-batch, at least one token in each."""
    options, fields, _ = LOSSES["kl_cov"]
    r = rows(6)
    config = verl_side.actor_config(**fields)
    config.global_batch_info.update(batch_num_tokens=r.ones.sum())
    whole, _, _ = verl_side.policy_loss("kl_cov", r, "token-mean", config)

    def part(start: int) -> Rows:
        return Rows(**{key: value[start : start + 1] for key, value in vars(r).items()})

    parts = sum(verl_side.policy_loss("kl_cov", part(i), "token-mean", config)[0] for i in range(len(r.mask)))
    assert abs(parts - whole) > 1e-3
    parity.same("kl_cov loss", ours("kl_cov", r, "token-mean", **options)[0], whole)
    parity.differs(
        "kl_cov, clip_cov", "verl chooses tokens in each micro-batch (#7829); over the whole mini-batch here"
    )


def test_kl_cov_pushes_a_token_that_stands_still_in_verl(parity: Parity) -> None:
    """One chosen token whose two log-probs differ by rounding, advantage 0: all of verl's gradient is the penalty's."""
    r = rows(0)
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    r = replace(r, mask=torch.ones(1, 1, dtype=torch.bool), old_log_probs=old, log_probs=old + 1e-7,
                advantages=torch.zeros(1, 1, dtype=torch.float64))  # fmt: skip
    options, fields, _ = LOSSES["kl_cov"]
    _, theirs, _ = verl_side.policy_loss("kl_cov", r, "token-mean", verl_side.actor_config(**fields))
    assert theirs.item() == pytest.approx(0.5)
    assert ours("kl_cov", r, "token-mean", **options)[1].item() == 0.0
    parity.differs("kl_cov", "a token that moved by rounding alone: verl's penalty has its whole gradient; none here")


def test_kl_cov_logs_the_absolute_distance_in_verl(parity: Parity) -> None:
    options, fields, _ = LOSSES["kl_cov"]
    r = rows(7)
    _, _, metrics = verl_side.policy_loss("kl_cov", r, "token-mean", verl_side.actor_config(**fields))
    distance = r.old_log_probs - r.log_probs
    parity.same("kl_cov ppo_kl, verl's number", masked_mean(distance.abs(), r.mask), metrics["actor/ppo_kl"])
    assert ours("kl_cov", r, "token-mean", **options)[2]["ppo_kl"] == pytest.approx(
        float(masked_mean(distance, r.mask))
    )
    parity.differs(
        "kl_cov", "ppo_kl: verl logs the mean of |d| under this loss alone; the mean of d as everywhere here"
    )


def test_clip_cov_s_clipfrac_is_the_chosen_share_in_verl(parity: Parity) -> None:
    options, fields, _ = LOSSES["clip_cov"]
    for r in every_batch():
        _, _, stats = ours("clip_cov", r, "token-mean", **options)
        _, _, metrics = verl_side.policy_loss("clip_cov", r, "token-mean", verl_side.actor_config(**fields))
        parity.same("clip_cov chosen share", stats["cov_clipfrac"], metrics["actor/pg_clipfrac"])
    parity.differs(
        "clip_cov", "verl's pg_clipfrac is the share of chosen tokens; cov_clipfrac here, pg_clipfrac is PPO's"
    )


def test_what_padding_holds_reaches_verl_s_losses(parity: Parity) -> None:
    """A NaN log-prob in padding: times a mask of 0 it is NaN, in every row mean."""
    r = rows(8)
    spoilt = replace(r, log_probs=torch.where(r.mask, r.log_probs, torch.nan))
    mode, config = "seq-mean-token-mean", verl_side.actor_config()
    for name, options in (("vanilla", DUAL), ("gspo", CLIP)):
        clean, clean_gradient, _ = ours(name, r, mode, **options)
        found, gradient, _ = ours(name, spoilt, mode, **options)
        assert clean == found and torch.equal(clean_gradient, gradient)
        theirs, _, _ = verl_side.policy_loss(name, spoilt, mode, config)
        assert theirs != theirs
        parity.differs(name, "NaN log-probs in padding: NaN in verl's loss (seq-mean modes); not here")
