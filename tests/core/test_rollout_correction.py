"""Old against rollout policy: weights and rejections by hand, by loops, and by enumeration of three policies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steepest.core.aggregation import LOSS_AGG_MODES, LossDenominators, aggregate
from steepest.core.policy_losses import LossInputs, ppo_clip
from steepest.core.rollout_correction import REJECTIONS, Rejection, Weighting, bypass_reinforce, correct
from steepest.errors import ConfigError

NAN, LN2 = math.nan, math.log(2.0)
# probabilities of three rows; the last position of row 0 and all of row 2 are padding
ROLLOUT = [[0.25, 0.5, NAN], [0.5, 0.5, 0.5], [NAN, NAN, NAN]]
OLD = [[0.5, 0.5, 0.0], [0.25, 0.5, 0.125], [0.5, NAN, 0.0]]
MASK = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
# r = old / rollout: row 0 is 2, 1; row 1 is 1/2, 1, 1/4


def logs(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows).log()


def corrected(weighting: Weighting | None = None, *rejections: Rejection):
    return correct(logs(ROLLOUT), logs(OLD), MASK, weighting=weighting, rejections=rejections)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (Weighting("token", high=1.5), [[1.5, 1, 0], [0.5, 1, 0.25], [0, 0, 0]]),
        # the band: 2 is above 1.5, 1/4 below 0.4
        (Weighting("token", high=1.5, low=0.4), [[0, 1, 0], [0.5, 1, 0], [0, 0, 0]]),
        # products: 2 * 1 and 1/2 * 1 * 1/4
        (Weighting("sequence", high=5.0), [[2, 2, 0], [0.125, 0.125, 0.125], [0, 0, 0]]),
        (Weighting("sequence", high=1.5), [[1.5, 1.5, 0], [0.125, 0.125, 0.125], [0, 0, 0]]),
        (Weighting("sequence", high=3.0, low=0.2), [[2, 2, 0], [0, 0, 0], [0, 0, 0]]),
        # mean over the five tokens: (2 + 1 + 1/2 + 1 + 1/4) / 5 = 0.95
        (
            Weighting("token", high=5.0, batch_normalize=True),
            [[2 / 0.95, 1 / 0.95, 0], [0.5 / 0.95, 1 / 0.95, 0.25 / 0.95], [0, 0, 0]],
        ),
        # mean over the two responses, not their tokens: (2 + 1/8) / 2 = 1.0625
        (
            Weighting("sequence", high=5.0, batch_normalize=True),
            [[2 / 1.0625, 2 / 1.0625, 0], [0.125 / 1.0625] * 3, [0, 0, 0]],
        ),
    ],
)
def test_weights_by_hand(weighting, expected):
    found = corrected(weighting)
    torch.testing.assert_close(found.weights, torch.tensor(expected, dtype=torch.float32))
    assert torch.equal(found.kept, MASK)


@pytest.mark.parametrize(
    ("rejection", "kept"),
    [
        # k1 = log(rollout / old): rollout / old is 1/2, 1 and 2, 1, 4
        (Rejection("token_k1", high=3.0), [[1, 1, 0], [1, 1, 0], [0, 0, 0]]),
        (Rejection("token_k1", high=3.0, low=0.6), [[0, 1, 0], [1, 1, 0], [0, 0, 0]]),
        # k2 = d^2 / 2 is 0.24, 0 and 0.24, 0, 0.96
        (Rejection("token_k2", high=0.5), [[1, 1, 0], [1, 1, 0], [0, 0, 0]]),
        (Rejection("token_k2", high=0.2), [[0, 1, 0], [0, 1, 0], [0, 0, 0]]),
        # k3 = r - 1 - log r is 0.307, 0 and 0.193, 0, 0.636
        (Rejection("token_k3", high=0.25), [[0, 1, 0], [1, 1, 0], [0, 0, 0]]),
        # sums of k1: rollout / old of the rows is 1/2 and 8; of the mean's: 0.707 and 2
        (Rejection("seq_sum_k1", high=7.0), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_sum_k1", high=9.0, low=0.6), [[0, 0, 0], [1, 1, 1], [0, 0, 0]]),
        (Rejection("seq_mean_k1", high=2.1), [[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        (Rejection("seq_mean_k1", high=1.9), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_mean_k1", high=1.3), [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        # k2: sums 0.240 and 1.201, means 0.120 and 0.400, largest 0.240 and 0.961
        (Rejection("seq_sum_k2", high=1.0), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_sum_k2", high=1.25), [[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        (Rejection("seq_mean_k2", high=0.3), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_mean_k2", high=0.41), [[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        (Rejection("seq_max_k2", high=0.9), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        # k3: sums 0.307 and 0.829, means 0.153 and 0.276, largest 0.307 and 0.636
        (Rejection("seq_sum_k3", high=0.5), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_mean_k3", high=0.2), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
        (Rejection("seq_max_k3", high=0.65), [[1, 1, 0], [1, 1, 1], [0, 0, 0]]),
        (Rejection("seq_max_k3", high=0.31), [[1, 1, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_rejections_by_hand(rejection, kept):
    found = corrected(None, rejection)
    assert torch.equal(found.kept, torch.tensor(kept, dtype=torch.bool))
    assert found.weights is None
    left = int(MASK.sum() - found.kept.sum())
    assert found.metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(left / 5)
    assert found.metrics[f"rollout_corr/rollout_rs_{rejection.kind}_masked_fraction"] == pytest.approx(left / 5)


def test_every_rejection_has_a_hand_case():
    cases = next(m for m in test_rejections_by_hand.pytestmark if m.name == "parametrize").args[1]
    assert {case[0].kind for case in cases} == set(REJECTIONS)


def test_several_rejections_must_all_be_passed_and_the_mean_follows_them():
    both = corrected(
        Weighting("token", high=5.0, batch_normalize=True),
        Rejection("token_k2", high=0.5),  # takes the last token of row 1
        Rejection("seq_sum_k1", high=100.0, low=0.6),  # takes row 0
    )
    assert torch.equal(both.kept, torch.tensor([[0, 0, 0], [1, 1, 0], [0, 0, 0]]).bool())
    # weights 1/2 and 1 of the kept tokens, their mean 3/4
    torch.testing.assert_close(both.weights, torch.tensor([[0, 0, 0], [2 / 3, 4 / 3, 0], [0, 0, 0]]))
    assert both.metrics["rollout_corr/rollout_is_batch_norm_factor"] == pytest.approx(0.75)
    assert both.metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(3 / 5)
    assert both.metrics["rollout_corr/rollout_rs_seq_masked_fraction"] == 1.0  # each response lost something


def test_metrics_of_weights_by_hand():
    found = corrected(Weighting("token", high=1.5, low=0.4)).metrics
    name = "rollout_corr/rollout_is"
    # bounded 0, 1, 1/2, 1, 0 of raw 2, 1, 1/2, 1, 1/4; rows' means 1/2 and 1/2, raw 3/2 and 7/12
    assert found == pytest.approx(
        {
            f"{name}_mean": 0.5,
            f"{name}_max": 1.0,
            f"{name}_min": 0.0,
            f"{name}_std": 0.5,  # (1/4 + 1/4 + 0 + 1/4 + 1/4) / 4 = 1/4
            f"{name}_eff_sample_size": 2.5**2 / (5 * 2.25),
            f"{name}_ratio_fraction_high": 0.2,
            f"{name}_ratio_fraction_low": 0.2,
            f"{name}_oob_ratio": 0.4,
            f"{name}_seq_mean": 0.5,
            f"{name}_seq_max": 0.5,
            f"{name}_seq_min": 0.5,
            f"{name}_seq_std": 0.0,
            f"{name}_seq_max_deviation": 0.5,
            f"{name}_seq_fraction_high": 0.0,  # 3/2 is not above 3/2
            f"{name}_seq_fraction_low": 0.0,
        },
        abs=1e-6,
    )


def test_without_a_lower_bound_low_is_one_over_high():
    # raw 2, 1, 1/2, 1, 1/4 and high 3: above nothing, below 1/3 the last; rows' means 3/2 and 7/12
    found = corrected(Weighting("token", high=3.0)).metrics
    assert found["rollout_corr/rollout_is_ratio_fraction_high"] == 0.0
    assert found["rollout_corr/rollout_is_ratio_fraction_low"] == pytest.approx(0.2)
    assert "rollout_corr/rollout_is_oob_ratio" not in found
    tight = corrected(Weighting("token", high=1.6)).metrics  # 1 / 1.6 = 0.625 is above 7/12
    assert tight["rollout_corr/rollout_is_seq_fraction_low"] == 0.5


def test_metrics_of_a_rejection_by_hand():
    found = corrected(None, Rejection("seq_sum_k1", high=7.0)).metrics
    name = "rollout_corr/rollout_rs_seq_sum_k1"
    # the rows' k1 are -log 2 and log 8 = 3 log 2; bounds are -log 7 and log 7; a row counts once
    assert found == pytest.approx(
        {
            f"{name}_mean": LN2,
            f"{name}_max": 3 * LN2,
            f"{name}_min": -LN2,
            f"{name}_std": math.sqrt(8) * LN2,
            f"{name}_fraction_high": 0.5,
            f"{name}_fraction_low": 0.0,
            f"{name}_masked_fraction": 0.6,
            f"{name}_seq_masked_fraction": 0.5,
            "rollout_corr/rollout_rs_masked_fraction": 0.6,
            "rollout_corr/rollout_rs_seq_masked_fraction": 0.5,
        },
        abs=1e-6,
    )


def random_case(seed: int, rows: int = 5, width: int = 6):
    draw = torch.Generator().manual_seed(seed)
    old, rollout = (-3 * torch.rand(rows, width, generator=draw) for _ in range(2))
    return rollout, old, torch.rand(rows, width, generator=draw) < 0.7


def k_of(d: float, name: str) -> float:
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[name]


@pytest.mark.parametrize("kind", REJECTIONS)
def test_rejection_is_the_textbook_loop(kind):
    level, _, k = kind.rpartition("_")
    for seed in range(20):
        rollout, old, mask = random_case(seed)
        high = 1.7 if k == "k1" else 0.4 * (3 if level == "seq_sum" else 1)
        found = correct(rollout, old, mask, rejections=[Rejection(kind, high)]).kept
        for i in range(len(mask)):
            values = {j: k_of(float(old[i, j] - rollout[i, j]), k) for j in range(mask.shape[1]) if mask[i, j]}
            for j, value in values.items():
                of_row = list(values.values())
                seen = {
                    "token": value,
                    "seq_sum": sum(of_row),
                    "seq_mean": sum(of_row) / len(of_row),
                    "seq_max": max(of_row),
                }[level]
                stays = abs(seen) <= math.log(high) if k == "k1" else seen <= high
                assert bool(found[i, j]) == stays, (seed, i, j)
        assert not bool((found & ~mask).any())


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("low", [None, 0.5])
def test_weights_are_the_textbook_loop(level, low):
    for seed in range(20):
        rollout, old, mask = random_case(seed)
        found = correct(rollout, old, mask, weighting=Weighting(level, 1.8, low)).weights
        for i in range(len(mask)):
            ratios = {j: math.exp(float(old[i, j] - rollout[i, j])) for j in range(mask.shape[1]) if mask[i, j]}
            for j in range(mask.shape[1]):
                raw = math.prod(ratios.values()) if level == "sequence" else ratios.get(j, 0.0)
                if low is None:
                    raw = min(raw, 1.8)
                elif not low <= raw <= 1.8:
                    raw = 0.0
                assert float(found[i, j]) == pytest.approx(raw if j in ratios else 0.0, rel=1e-5)


TOKENS = 5


def three_policies():
    """Distributions over five tokens that differ widely: the engine's, the one before the update, the one trained."""
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(TOKENS, generator=draw, dtype=torch.float64) for _ in range(3)]


def test_three_policies_enumerated():
    """Trap 20: with the rollout's samples, weight times ratio is the trained policy over the rollout's, once.

    The expectation over mu of the loss's gradient is that of -E[A] under the trained policy, exactly, by enumeration
    of all tokens; without the weight, with it twice, or with mu for old in the ratio it is another.
    """
    mu, old, logits = three_policies()
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    mask = torch.ones(TOKENS, 1, dtype=torch.bool)
    mu_log, old_log = mu.log_softmax(0)[:, None], old.log_softmax(0)[:, None]
    weights = correct(mu_log, old_log, mask, weighting=Weighting("token", high=1e6)).weights
    assert weights is not None
    torch.testing.assert_close(weights[:, 0], (old.softmax(0) / mu.softmax(0)))

    def gradient(factor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        theta = logits.clone().requires_grad_()
        x = LossInputs(theta.log_softmax(0)[:, None], before, advantages[:, None], mask)
        loss, _ = ppo_clip(x, clip_ratio_low=1.0, clip_ratio_high=1e6, clip_ratio_c=1e6)
        (mu.softmax(0)[:, None] * factor * loss).sum().backward()
        return theta.grad

    theta = logits.clone().requires_grad_()
    (-(theta.softmax(0) * advantages).sum()).backward()
    torch.testing.assert_close(gradient(weights, old_log), theta.grad)
    torch.testing.assert_close(gradient(torch.ones_like(weights), mu_log), theta.grad)  # bypass: two policies
    for wrong in (
        gradient(torch.ones_like(weights), old_log),
        gradient(weights**2, old_log),
        gradient(weights, mu_log),
    ):
        assert float((wrong - theta.grad).abs().max()) > 0.05


def test_a_sequence_weight_makes_two_steps_exact():
    """All 25 sequences of two tokens: the product of ratios corrects the distribution of whole responses."""
    mu, old, _ = three_policies()
    pairs = torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOKENS))
    reward = torch.randn(len(pairs), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mu_log, old_log = mu.log_softmax(0)[pairs], old.log_softmax(0)[pairs]
    mask = torch.ones_like(pairs, dtype=torch.bool)
    weights = correct(mu_log, old_log, mask, weighting=Weighting("sequence", high=1e6)).weights
    under_mu = mu_log.sum(1).exp()

    def expected_score(w: torch.Tensor) -> torch.Tensor:
        """Gradient of REINFORCE at the old policy, in expectation over mu."""
        theta = old.clone().requires_grad_()
        (under_mu * w * reward * theta.log_softmax(0)[pairs].sum(1)).sum().backward()
        return theta.grad

    theta = old.clone().requires_grad_()
    (theta.log_softmax(0)[pairs].sum(1).exp() * reward).sum().backward()
    torch.testing.assert_close(expected_score(weights[:, 0]), theta.grad)
    token = correct(mu_log, old_log, mask, weighting=Weighting("token", high=1e6)).weights
    assert float((expected_score(token[:, 0]) - theta.grad).abs().max()) > 0.01  # biased, as its docstring says


def test_bypass_reinforce_by_hand_and_in_expectation():
    # training 1/2, rollout 1/4: weight 2, cut to 1.5; loss -1.5 * log(1/2) * 3, gradient of log-prob -1.5 * 3
    log_prob = torch.tensor([[math.log(0.5), NAN]], requires_grad=True)
    x = LossInputs(
        log_prob, torch.tensor([[math.log(0.25), NAN]]), torch.tensor([[3.0, NAN]]), torch.tensor([[True, False]])
    )
    loss, stats = bypass_reinforce(x, weighting=Weighting("token", high=1.5))
    assert loss.tolist() == [[pytest.approx(1.5 * LN2 * 3), 0.0]]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [[pytest.approx(-4.5), 0.0]]
    assert stats["ratio"].tolist() == [[pytest.approx(2.0), 1.0]]
    assert stats["ppo_kl"].tolist() == [[pytest.approx(-LN2), 0.0]]
    unweighted, _ = bypass_reinforce(x)
    assert float(unweighted[0, 0].detach()) == pytest.approx(LN2 * 3)

    mu, _, logits = three_policies()
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    theta, exact = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    mask = torch.ones(TOKENS, 1, dtype=torch.bool)
    x = LossInputs(theta.log_softmax(0)[:, None], mu.log_softmax(0)[:, None], advantages[:, None], mask)
    loss, _ = bypass_reinforce(x, weighting=Weighting("token", high=1e6))
    (mu.softmax(0)[:, None] * loss).sum().backward()
    (-(exact.softmax(0) * advantages).sum()).backward()
    torch.testing.assert_close(theta.grad, exact.grad)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_rejected_row_is_a_batch_without_that_row(mode, level):
    """Trap 10: loss, gradient, denominators and normalised weights."""
    rollout, old, mask = random_case(4)
    rollout[2, mask[2].nonzero()[0, 0]] = -30.0  # one token of row 2 was all but impossible to the engine
    weighting = Weighting(level, 2.0, None, True)
    rejections = [Rejection("seq_max_k2", 10.0)]
    others = torch.tensor([0, 1, 3, 4])

    def loss_of(rollout, old, mask):
        found = correct(rollout, old, mask, weighting=weighting, rejections=rejections)
        log_probs = (old - 0.1).requires_grad_()
        x = LossInputs(log_probs, old, torch.ones_like(old), found.kept)
        loss, _ = ppo_clip(x, clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0)
        total = aggregate(loss * found.weights, found.kept, mode, LossDenominators.of(found.kept), scale_factor=6.0)
        total.backward()
        return total.detach(), log_probs.grad

    whole, gradient = loss_of(rollout, old, mask)
    without, other_gradient = loss_of(rollout[others], old[others], mask[others])
    torch.testing.assert_close(whole, without)
    torch.testing.assert_close(gradient[others], other_gradient)
    assert bool((gradient[2] == 0).all()) and float(whole) != 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    pad=st.sampled_from([0, 1, 7]),
    kind=st.sampled_from(REJECTIONS),
    level=st.sampled_from(["token", "sequence"]),
    normalize=st.booleans(),
)
def test_padding_and_row_order_change_nothing_and_nan_never_leaks(seed, pad, kind, level, normalize):
    rollout, old, mask = random_case(seed)
    options = {
        "weighting": Weighting(level, 2.0, 0.3, normalize),
        "rejections": [Rejection(kind, 1.6 if kind.endswith("k1") else 0.5)],
    }
    plain = correct(rollout, old, mask, **options)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))

    def moved(x: torch.Tensor, fill: float) -> torch.Tensor:
        x = torch.where(mask, x, fill)[order]
        return torch.cat([x, torch.full((len(x), pad), fill)], 1)

    wide = torch.cat([mask[order], torch.zeros(len(mask), pad, dtype=torch.bool)], 1)
    other = correct(moved(rollout, NAN), moved(old, -math.inf), wide, **options)
    assert torch.equal(other.kept[:, : mask.shape[1]], plain.kept[order]) and not bool(
        other.kept[:, mask.shape[1] :].any()
    )
    torch.testing.assert_close(other.weights[:, : mask.shape[1]], plain.weights[order])
    assert bool((other.weights[:, mask.shape[1] :] == 0).all())
    assert other.metrics == pytest.approx(plain.metrics, abs=1e-5)


def test_equal_policies_are_left_alone_exactly():
    rollout, _, mask = random_case(0)
    found = correct(
        rollout,
        rollout.clone(),
        mask,
        weighting=Weighting("sequence", 2.0, 0.5, True),
        rejections=[Rejection(kind, 1.001 if kind.endswith("k1") else 1e-9) for kind in REJECTIONS],
    )
    assert torch.equal(found.kept, mask)
    assert torch.equal(found.weights, mask.float())


def test_an_empty_mask_and_a_batch_that_is_rejected_whole():
    rollout, old, mask = random_case(0)
    weighting = Weighting("token", batch_normalize=True)
    nothing = correct(
        rollout, old, torch.zeros_like(mask), weighting=weighting, rejections=[Rejection("token_k2", 1.0)]
    )
    assert not bool(nothing.kept.any()) and bool((nothing.weights == 0).all())
    assert all(math.isfinite(value) for value in nothing.metrics.values())
    all_out = correct(rollout - 50.0, old, mask, weighting=weighting, rejections=[Rejection("token_k2", 1.0)])
    assert not bool(all_out.kept.any()) and bool((all_out.weights == 0).all())
    assert all_out.metrics["rollout_corr/rollout_rs_masked_fraction"] == 1.0


def test_a_log_prob_that_is_no_number_is_rejected_and_otherwise_spoils_its_weight_in_the_open():
    rollout, old = torch.tensor([[-1.0, NAN]]), torch.tensor([[-1.0, -1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert correct(rollout, old, mask, rejections=[Rejection("token_k1", 2.0)]).kept.tolist() == [[True, False]]
    for low in (None, 0.5):
        weights = correct(rollout, old, mask, weighting=Weighting("token", 2.0, low)).weights
        assert weights[0, 0] == 1.0 and bool(weights[0, 1].isnan())


def test_names_that_are_not():
    with pytest.raises(ConfigError, match=r"rollout_rs='seq_max_k1': no such rejection. Did you mean 'seq_max_k"):
        Rejection("seq_max_k1", 2.0)
    with pytest.raises(ConfigError, match=r"rollout_is='row': no such level. Known: token, sequence."):
        Weighting("row")
