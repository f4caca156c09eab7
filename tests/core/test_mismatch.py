"""Engine against trainer: each number by hand, exactly 0 for equal log-probs."""

from __future__ import annotations

import math

import pytest
import torch

from steepest.core.mismatch import mismatch_metrics, off_policy_metrics

NAN = math.nan


def test_by_hand() -> None:
    # engine 1/4 and 1/2, trainer 1/2 and 1/2: d = ln 2 and 0, weights 2 and 1, probabilities differ by 1/4 and 0
    rollout = torch.tensor([[math.log(0.25), math.log(0.5), NAN]])
    old = torch.tensor([[math.log(0.5), math.log(0.5), NAN]])
    mask = torch.tensor([[True, True, False]])
    ln2 = math.log(2.0)
    assert mismatch_metrics(rollout, old, mask) == pytest.approx(
        {
            "mismatch/kl": -ln2 / 2,
            "mismatch/k3_kl": (2 - 1 - ln2) / 2,
            "mismatch/max_ratio": 2.0,
            "mismatch/mean_abs_diff": ln2 / 2,
            "mismatch/max_abs_diff": ln2,
            "mismatch/ess": 9 / (2 * 5),  # (2 + 1)^2 / (2 * (4 + 1))
            "training/rollout_probs_diff_mean": 0.125,
            "training/rollout_probs_diff_max": 0.25,
            "training/rollout_probs_diff_std": math.sqrt(2 * 0.125**2),  # n - 1 = 1
        },
        abs=1e-6,
    )


def test_a_token_that_the_trainer_finds_rarer() -> None:
    # engine 1/2, trainer 1/4: d = -ln 2; the padding, with d = 0 and a weight of 1, must not be the largest
    rollout, old = torch.tensor([[math.log(0.5), 0.0]]), torch.tensor([[math.log(0.25), 0.0]])
    got = mismatch_metrics(rollout, old, torch.tensor([[True, False]]))
    assert got["mismatch/kl"] == pytest.approx(math.log(2.0))
    assert got["mismatch/k3_kl"] == pytest.approx(0.5 - 1 + math.log(2.0))
    assert got["mismatch/max_ratio"] == pytest.approx(0.5)
    assert got["mismatch/mean_abs_diff"] == pytest.approx(math.log(2.0))
    assert got["training/rollout_probs_diff_max"] == pytest.approx(0.25)


@pytest.mark.parametrize("masked", [False, True])
def test_equal_log_probs_and_empty_masks_are_exactly_zero(masked: bool) -> None:
    # Trap 19: in fp32 on the same weights there is no mismatch at all
    log_probs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 5
    other = torch.full_like(log_probs, NAN) if masked else log_probs.clone()
    mask = torch.full_like(log_probs, not masked, dtype=torch.bool)
    got = mismatch_metrics(log_probs, other, mask)
    assert got.pop("mismatch/max_ratio") == 1.0
    assert got.pop("mismatch/ess") == pytest.approx(1.0, abs=1e-6)
    assert len(got) == 7
    for name, number in got.items():
        assert number == 0.0 and math.copysign(1.0, number) == 1.0, name


def test_a_huge_weight_leaves_one_effective_sample() -> None:
    # weights e^100, 1, 1, 1 overflow fp32, their shares do not: one sample in four
    rollout = torch.tensor([[-101.0, -1.0, -1.0, -1.0]])
    got = mismatch_metrics(rollout, torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.bool))
    assert got["mismatch/ess"] == pytest.approx(0.25)


def test_verls_numbers_by_hand() -> None:
    # row 0: engine 1/4, 1/2, trainer 1/2, 1/2: d = ln 2, 0. row 1: engine 1/2, trainer 1/4: d = -ln 2. row 2: none
    rollout = torch.tensor([[0.25, 0.5], [0.5, NAN], [NAN, NAN]]).log()
    old = torch.tensor([[0.5, 0.5], [0.25, NAN], [0.0, 0.0]]).log()
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    ln2, name = math.log(2.0), "rollout_corr"
    # log-perplexities: trainer ln 2 and 2 ln 2, engine 1.5 ln 2 and ln 2; trainer less engine: -ln2 / 2 and ln 2
    assert off_policy_metrics(rollout, old, mask) == pytest.approx(
        {
            f"{name}/kl": 0.0,
            f"{name}/k3_kl": ((2 - 1 - ln2) + 0 + (0.5 - 1 + ln2)) / 3,
            f"{name}/training_ppl": (2 + 4) / 2,
            f"{name}/training_log_ppl": 1.5 * ln2,
            f"{name}/rollout_ppl": (2**1.5 + 2) / 2,
            f"{name}/rollout_log_ppl": 1.25 * ln2,
            f"{name}/log_ppl_diff": 0.25 * ln2,
            f"{name}/log_ppl_abs_diff": 0.75 * ln2,
            f"{name}/log_ppl_diff_max": ln2,
            f"{name}/log_ppl_diff_min": -0.5 * ln2,
            f"{name}/ppl_ratio": (2**-0.5 + 2) / 2,
            f"{name}/chi2_token": (4 + 1 + 0.25) / 3 - 1,
            f"{name}/chi2_seq": (4 + 0.25) / 2 - 1,
            # probabilities 1/2 1/2 1/4 against 1/4 1/2 1/2, each less its mean 5/12: sum of products / sum of squares
            "training/rollout_actor_probs_pearson_corr": -0.5,
        },
        abs=1e-6,
    )


def test_verls_kl_has_the_engine_first() -> None:
    # engine 1/2, trainer 1/4: the trainer finds the token rarer, log(1/2) - log(1/4) = ln 2
    rollout, old = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    got = off_policy_metrics(rollout, old, torch.ones(1, 1, dtype=torch.bool))
    assert got["rollout_corr/kl"] == pytest.approx(math.log(2.0))
    assert got["rollout_corr/log_ppl_diff"] == pytest.approx(math.log(2.0))


def test_verls_numbers_of_equal_and_of_no_log_probs() -> None:
    log_probs = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) * 5
    same = off_policy_metrics(log_probs, log_probs.clone(), torch.ones(3, 4, dtype=torch.bool))
    assert same["training/rollout_actor_probs_pearson_corr"] == pytest.approx(1.0)
    for name in ("kl", "k3_kl", "log_ppl_diff", "log_ppl_abs_diff", "chi2_token", "chi2_seq"):
        assert same[f"rollout_corr/{name}"] == 0.0, name
    nothing = off_policy_metrics(log_probs, torch.full_like(log_probs, NAN), torch.zeros(3, 4, dtype=torch.bool))
    assert set(nothing.values()) == {0.0}
