"""Each health check: silent on a healthy step, speaks on a sick one, once until it mends."""

from __future__ import annotations

import pytest

from steepest.trainer.run.health import CHECKS, Health, Limits

HEALTHY = {
    "actor/ratio_max_dev_first": 1e-6,
    "mismatch/k3_kl": 1e-7,
    "response_length/clip_ratio": 0.1,
    "group/equal_ratio": 0.4,
    "critic/score/max": 1.0,
    "critic/score/min": 0.0,
    "actor/entropy": 0.8,
    "reward/error_rate": 0.0,
    "critic/vf_explained_var": 0.3,
    "training/global_step": 100.0,
    "actor/skipped_steps": 0.0,
}
SICK = [
    ("actor/ratio_max_dev_first", 0.01, "ratio differs from 1"),
    ("mismatch/k3_kl", 0.02, "disagree"),
    ("response_length/clip_ratio", 0.9, "90% of the responses were cut"),
    ("rollout_corr/rollout_rs_masked_fraction", 0.8, "80% of the tokens were rejected"),
    ("group/equal_ratio", 1.0, "learns nothing"),
    ("critic/score/max", 0.0, "no reward signal"),
    ("actor/entropy", 0.001, "entropy fell"),
    ("reward/error_rate", 0.05, "5.0% of the rewards failed"),
    ("critic/vf_explained_var", -0.5, "explains none"),
    ("actor/skipped_steps", 2.0, "2 update(s) skipped"),
]


def test_a_healthy_step_is_silent():
    assert Health()(HEALTHY) == []


@pytest.mark.parametrize("name, value, words", SICK)
def test_a_sick_step_is_named_once_until_it_mends(name, value, words):
    health = Health()
    sick = {**HEALTHY, name: value}
    assert [words in message for message in health(sick)] == [True]
    assert health(sick) == []
    assert health(HEALTHY) == []
    assert len(health(sick)) == 1


def test_every_check_has_a_sick_case():
    assert len(SICK) == len(CHECKS)


def test_bfloat16_is_judged_by_its_own_rounding():
    m = {**HEALTHY, "mismatch/k3_kl": 5e-3}
    assert Health(Limits.for_dtype("bfloat16"))(m) == [] and len(Health(Limits.for_dtype("float32"))(m)) == 1


def test_a_step_without_reward_says_nothing_about_the_critic():
    m = {**HEALTHY, "critic/vf_explained_var": -5e4, "critic/score/max": 0.0, "critic/score/min": 0.0}
    assert [text for text in Health()(m) if "explains none" in text] == []


def test_a_young_critic_is_not_called_dead():
    m = {**HEALTHY, "critic/vf_explained_var": -0.5, "training/global_step": 3.0}
    assert Health()(m) == []


def test_one_fact_is_one_warning():
    """Equal scores everywhere are equal scores in every group."""
    health = Health()
    nothing = {**HEALTHY, "critic/score/max": 0.0, "critic/score/min": 0.0, "group/equal_ratio": 1.0}
    (message,) = health(nothing)
    assert "no reward signal" in message
    (message,) = health({**HEALTHY, "group/equal_ratio": 1.0})
    assert message.startswith("within every prompt")
