"""Whitening, aggregation, KL, value loss, log-probs and the numbers about a mismatch, beside verl's."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.core.aggregation import LOSS_AGG_MODES, LossDenominators, aggregate
from steepest.core.exact_kl import exact_kl
from steepest.core.kl import AdaptiveKLController, FixedKLController, apply_kl_penalty, kl_estimate
from steepest.core.log_probs import token_log_probs
from steepest.core.masked import masked_mean, masked_sum, masked_var, whiten
from steepest.core.mismatch import mismatch_metrics
from steepest.core.value_losses import clipped_value_loss
from tests.parity import verl_side
from tests.parity.batches import every_batch, rows
from tests.parity.conftest import Parity

pytestmark = pytest.mark.parity

KINDS = [base + plus for base in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3") for plus in ("", "+")]


def test_masked_sums_and_whitening(parity: Parity) -> None:
    verl = verl_side.functional()
    for r in every_batch():
        x, m = r.advantages, r.ones
        parity.same("masked_sum", masked_sum(x, r.mask), verl.masked_sum(x, m))
        parity.same("masked_mean", masked_mean(x, r.mask), verl.masked_mean(x, m))
        parity.same("masked_mean of rows", masked_mean(x, r.mask, dim=1), verl.masked_mean(x, m, axis=-1))
        parity.same("masked_var", masked_var(x, r.mask), verl.masked_var(x, m))
        parity.same("masked_whiten", whiten(x, r.mask), verl.masked_whiten(x, m), r.mask)


def test_whitening_of_one_token_is_an_error_in_verl_and_0_here(parity: Parity) -> None:
    verl = verl_side.functional()
    x, mask = torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 1] = True
    with pytest.raises(ValueError, match="sum of the mask is one"):
        verl.masked_whiten(x, mask.float())
    assert whiten(x, mask).tolist() == [[0.0] * 3, [0.0] * 3]
    parity.differs("masked_whiten", "one true token: an error in verl, which ends the run; 0 here")


def test_a_nan_in_padding_reaches_verl_and_stays_out_here(parity: Parity) -> None:
    r = rows(0)
    spoilt = torch.where(r.mask, r.advantages, math.nan)
    assert torch.isnan(verl_side.functional().masked_whiten(spoilt, r.ones)[~r.mask]).all()
    parity.same("masked_whiten", whiten(spoilt, r.mask), whiten(r.advantages, r.mask))
    seq_mean = verl_side.core_algos().agg_loss(spoilt, r.ones, "seq-mean-token-mean")
    assert torch.isnan(seq_mean)  # NaN * 0
    ours = aggregate(spoilt, r.mask, "seq-mean-token-mean", LossDenominators.of(r.mask))
    assert torch.isfinite(ours)
    parity.differs("agg_loss", "seq-mean modes: NaN in padding makes verl's loss NaN; selected away here")


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_aggregation(parity: Parity, mode: str) -> None:
    verl = verl_side.core_algos()
    for r in every_batch():
        ours = aggregate(r.advantages, r.mask, mode, LossDenominators.of(r.mask), scale_factor=64.0)
        theirs = verl.agg_loss(r.advantages, r.ones, mode, loss_scale_factor=64)
        parity.same(f"agg_loss {mode}", ours, theirs)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_aggregation_of_micro_batches_with_global_counts(parity: Parity, mode: str) -> None:
    verl = verl_side.core_algos()
    for r in every_batch():
        whole = LossDenominators.of(r.mask)
        for part in (slice(0, 5), slice(5, 16)):
            ours = aggregate(r.advantages[part], r.mask[part], mode, whole, scale_factor=64.0)
            theirs = verl.agg_loss(
                r.advantages[part], r.ones[part], mode, batch_num_tokens=r.ones.sum(), global_batch_size=len(r.mask),
                loss_scale_factor=64,
            )  # fmt: skip
            parity.same(f"agg_loss {mode}", ours, theirs)


def test_masked_rows_dilute_verl_s_mean_over_rows(parity: Parity) -> None:
    """One of two rows masked away: the mean over rows is that of the row left, not half of it."""
    per_token = torch.full((2, 4), 3.0)
    mask = torch.tensor([[True] * 4, [False] * 4])
    ours = aggregate(per_token, mask, "seq-mean-token-mean", LossDenominators.of(mask))
    theirs = verl_side.core_algos().agg_loss(per_token, mask.float(), "seq-mean-token-mean", global_batch_size=2)
    assert (float(ours), pytest.approx(float(theirs))) == (3.0, 1.5)
    parity.differs("agg_loss", "rows without a true token count in verl's global_batch_size, and dilute the others")


def test_the_norm_mode_falls_back_on_the_padded_width_in_verl(parity: Parity) -> None:
    r = rows(1)
    wider = torch.nn.functional.pad
    verl = verl_side.core_algos().agg_loss
    plain = float(verl(r.advantages, r.ones, "seq-mean-token-sum-norm"))
    padded = float(verl(wider(r.advantages, (0, 12)), wider(r.ones, (0, 12)), "seq-mean-token-sum-norm"))
    assert padded == pytest.approx(plain / 2)  # only padding was added
    parity.differs(
        "agg_loss", "-norm without a factor: verl divides by the padded width; a factor has to be given here"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimators_and_their_gradients(parity: Parity, kind: str) -> None:
    verl = verl_side.core_algos()
    for r in every_batch():
        ours_in, theirs_in = (r.log_probs.clone().requires_grad_() for _ in range(2))
        ours = kl_estimate(ours_in, r.ref_log_probs, kind, response_mask=r.mask)
        theirs = verl.kl_penalty(theirs_in, r.ref_log_probs, kind)
        parity.same(f"kl_penalty {kind}", ours, theirs, r.mask)
        ours[r.mask].sum().backward()
        theirs[r.mask].sum().backward()
        assert ours_in.grad is not None and theirs_in.grad is not None
        parity.same(f"kl_penalty {kind} gradient", ours_in.grad, theirs_in.grad, r.mask)


def test_a_clamped_k3_has_no_gradient_in_verl(parity: Parity) -> None:
    """ref - log_prob = 4: exp(4) - 1 - 4 = 49.6, held at 10. d k3 / d log_prob = 1 - exp(4) = -53.6."""
    ours_in, theirs_in = (torch.tensor([[-5.0]], dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref = torch.tensor([[-1.0]], dtype=torch.float64)
    ours = kl_estimate(ours_in, ref, "k3")
    theirs = verl_side.core_algos().kl_penalty(theirs_in, ref, "k3")
    assert ours.item() == theirs.item() == 10.0
    (gradient,) = torch.autograd.grad(ours.sum(), ours_in)
    (dead,) = torch.autograd.grad(theirs.sum(), theirs_in)
    assert float(gradient) == pytest.approx(1 - math.exp(4)) and float(dead) == 0.0
    parity.differs(
        "kl_penalty k3", "above 10 the value is clamped in both; verl's gradient dies with it, ours does not"
    )


def test_the_exact_kl_does_not_exist_in_verl(parity: Parity) -> None:
    """Policy (0.75, 0.25), reference even: 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812."""
    with pytest.raises(NotImplementedError):
        verl_side.core_algos().kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "full")
    eye = torch.eye(2)
    states = torch.tensor([[math.log(3.0), 0.0]])
    found = exact_kl((states, eye, None), (torch.zeros(1, 2), eye, None))
    assert found.item() == pytest.approx(0.130812, abs=1e-6)
    parity.differs("kl_penalty full", "NotImplementedError in verl; the exact KL over the vocabulary here")


@pytest.mark.parametrize("kind", ["kl", "abs", "mse", "low_var_kl"])
def test_kl_in_the_reward(parity: Parity, kind: str) -> None:
    """verl's apply_kl_penalty stands in a module that imports its servers; these are the functions it is made of."""
    estimate, row_mean = verl_side.core_algos().kl_penalty, verl_side.functional().masked_mean
    for r in every_batch():
        rewards, kl = apply_kl_penalty(
            r.outcome_rewards, r.old_log_probs, r.ref_log_probs, r.mask, coef=0.03, kind=kind
        )
        theirs = estimate(r.old_log_probs, r.ref_log_probs, kind) * r.ones
        parity.same(f"apply_kl_penalty {kind}", rewards, r.outcome_rewards - 0.03 * theirs)
        parity.same(f"apply_kl_penalty {kind}", kl, row_mean(theirs, r.ones, axis=-1).mean())


def test_kl_controllers(parity: Parity) -> None:
    verl = verl_side.core_algos()
    ours, theirs = AdaptiveKLController(0.2, 0.1, 500.0), verl.AdaptiveKLController(0.2, 0.1, 500.0)
    for kl in (0.0, 0.05, 0.09, 0.11, 0.3, 5.0, 0.1):
        ours.update(kl, 32)
        theirs.update(kl, 32)
        parity.same("AdaptiveKLController", ours.value, theirs.value)
    fixed, theirs_fixed = FixedKLController(0.2), verl.FixedKLController(0.2)
    fixed.update(9.0, 32)
    theirs_fixed.update(9.0, 32)
    parity.same("FixedKLController", fixed.value, theirs_fixed.value)


def test_one_kl_that_is_nan_spoils_verl_s_coefficient_for_good(parity: Parity) -> None:
    ours, theirs = AdaptiveKLController(0.2, 0.1, 500.0), verl_side.core_algos().AdaptiveKLController(0.2, 0.1, 500.0)
    for kl in (math.nan, 0.1):
        ours.update(kl, 32)
        theirs.update(kl, 32)
    assert ours.value == 0.2 and math.isnan(theirs.value)
    parity.differs("AdaptiveKLController", "a step with KL nan makes verl's coefficient nan for good; ignored here")


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_value_loss(parity: Parity, mode: str) -> None:
    verl = verl_side.core_algos()
    for r in every_batch():
        ours_in, theirs_in = (r.values.clone().requires_grad_() for _ in range(2))
        per_token, stats = clipped_value_loss(
            ours_in, r.old_values, r.returns, cliprange_value=0.4, response_mask=r.mask
        )
        ours = aggregate(per_token, r.mask, mode, LossDenominators.of(r.mask))
        theirs, clipfrac = verl.compute_value_loss(theirs_in, r.returns, r.old_values, r.ones, 0.4, mode)
        parity.same(f"compute_value_loss {mode}", ours, theirs)
        parity.same("compute_value_loss clipfrac", masked_mean(stats["vf_clipfrac"], r.mask), clipfrac)
        (a,), (b,) = torch.autograd.grad(ours, ours_in), torch.autograd.grad(theirs, theirs_in)
        parity.same("compute_value_loss gradient", a, b)


def test_log_probs_and_entropy(parity: Parity) -> None:
    """In float32: ours are computed in chunks, and in no other precision."""
    verl = verl_side.functional()
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        hidden, weight = torch.randn(20, 16, generator=g), 0.2 * torch.randn(8, 16, generator=g)
        targets = torch.randint(8, (20,), generator=g)
        logits = hidden @ weight.T / 0.7
        ours, entropy = token_log_probs(hidden, weight, None, targets, temperature=0.7, with_entropy=True)
        parity.same("logprobs_from_logits", ours, verl.logprobs_from_logits_naive(logits, targets))
        assert entropy is not None
        parity.same("entropy_from_logits", entropy, verl.entropy_from_logits(logits))


def test_mismatch(parity: Parity) -> None:
    verl = verl_side.correction()
    for r in every_batch():
        ours = mismatch_metrics(r.rollout_log_probs, r.old_log_probs, r.mask)
        theirs = verl.compute_offpolicy_metrics(r.old_log_probs, r.rollout_log_probs, r.ones)
        parity.same("compute_offpolicy_metrics kl", ours["mismatch/kl"], theirs["kl"])
        parity.same("compute_offpolicy_metrics k3_kl", ours["mismatch/k3_kl"], theirs["k3_kl"])
