"""Every estimator and every policy loss learns a task with a known optimum, and nothing from dealt-out rewards."""

from __future__ import annotations

import pytest

from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.policy_losses import POLICY_LOSSES
from tests.support.toy_policy import CASES, Case, train

STEPS = 40
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def chance(case: Case) -> float:
    """That one of `best_of` guesses among nine words is right."""
    return 1 - (8 / 9) ** case.best_of


def test_every_estimator_and_loss_has_a_case() -> None:
    assert {case.estimator for case in CASES} == set(ADVANTAGE_ESTIMATORS.names())
    assert {case.loss for case in CASES} == set(POLICY_LOSSES.names())


@by_name
@pytest.mark.parametrize("seed", [0, 1])
def test_learns(case: Case, seed: int) -> None:
    curve = train(case, steps=STEPS, seed=seed)
    assert curve[0] == pytest.approx(chance(case)) and curve[-1] >= 0.9


@by_name
def test_does_not_learn_from_dealt_out_rewards(case: Case) -> None:
    """The rewards of the batch, each at another row: the same numbers, and no teacher in them."""
    finals = [train(case, steps=STEPS, seed=seed, shuffled=True)[-1] for seed in range(3)]
    assert sum(finals) / 3 <= chance(case) + 0.19
