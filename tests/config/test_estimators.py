"""The keys of the advantage estimators: what the configuration says of each is what its function says."""

from __future__ import annotations

import inspect

import pytest

from steepest.config.estimators import IN_GROUPS, TAKES, takes
from steepest.config.load import load_config
from steepest.config.plan import Plan, make_plan
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.errors import ConfigError
from tests.config.commands import REQUIRED

ONE_UPDATE = ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]
KEYWORDS = {"norm_adv_by_std_in_grpo": "norm_by_std", "gdpo_reward_weights": "weights", "gdpo_reward_keys": "weights"}
"""Option of `algorithm` -> keyword of the functions, where they differ. The keys say which reward a weight is of."""


def plan(estimator: str, *words: str) -> Plan:
    config = load_config(
        [*REQUIRED, *ONE_UPDATE, f"algorithm.adv_estimator={estimator}", "actor_rollout_ref.rollout.n=2", *words]
    )
    return make_plan(config, 64, needs=ADVANTAGE_ESTIMATORS.get(estimator).facts.get("needs", ()))


def test_groups_are_asked_for_by_those_that_read_them() -> None:
    reads = [
        name
        for name in ADVANTAGE_ESTIMATORS.names()
        if "group_ids" in ADVANTAGE_ESTIMATORS.get(name).facts.get("needs", ())
    ]
    assert sorted(IN_GROUPS) == reads


@pytest.mark.parametrize("option", TAKES)
def test_options_are_those_of_the_functions(option: str) -> None:
    keyword = KEYWORDS.get(option, option)
    found = [
        name
        for name in ADVANTAGE_ESTIMATORS.names()
        if keyword in inspect.signature(ADVANTAGE_ESTIMATORS.get(name).value).parameters
    ]
    assert sorted(TAKES[option]) == found
    assert takes("my.module:own", option), "it may take any"


@pytest.mark.parametrize(
    "estimator",
    ["gpg", "grpo", "grpo_passk", "opo", "optimal_token_baseline", "reinforce_plus_plus",
     "reinforce_plus_plus_baseline", "rloo"],
)  # fmt: skip
def test_none_of_them_has_a_critic_or_a_kl_by_default(estimator: str) -> None:
    found = plan(estimator)
    assert not found.needs_critic and not found.needs_reference
    assert found.sums_squares == (estimator == "optimal_token_baseline")


def test_the_token_baseline_has_a_pass_before_the_update() -> None:
    assert plan("rloo").old_log_probs == "update"
    found = plan("optimal_token_baseline")
    assert found.old_log_probs == "pass"
    assert (
        "Old log-probs are computed by a pass of their own: algorithm.adv_estimator=optimal_token_baseline reads them."
        in found.notes
    )
    assert plan("optimal_token_baseline", "actor_rollout_ref.actor.ppo_epochs=2").old_log_probs == "pass"


def test_the_token_baseline_is_refused_in_bypass_mode() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("optimal_token_baseline", "algorithm.rollout_correction.bypass_mode=True")
    assert str(caught.value) == (
        "algorithm.rollout_correction.bypass_mode=True with algorithm.adv_estimator=optimal_token_baseline: the "
        "estimator reads the squared probabilities of the whole vocabulary, from the pass that bypass mode leaves out. "
        "Remove one of them."
    )
