"""The keys of the advantage estimators: what follows from the statement of each."""

from __future__ import annotations

import pytest

from steepest.config.algorithms import ESTIMATORS, EstimatorSpec, same
from steepest.config.load import load_config
from steepest.config.plan import Plan, make_plan
from steepest.config.schema import Config
from steepest.config.sections.advantages import estimator_options
from steepest.errors import ConfigError
from tests.support.commands import REQUIRED

ONE_UPDATE = ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]


def plan(estimator: str, *words: str) -> Plan:
    config = load_config(
        [*REQUIRED, *ONE_UPDATE, f"algorithm.adv_estimator={estimator}", "actor_rollout_ref.rollout.n=2", *words]
    )
    return make_plan(config, 64)


def test_an_estimator_that_is_stated_has_its_defaults_and_its_options() -> None:
    """The second built-in that reads values: nobody has to enable its critic, and the KL stays off."""
    second = EstimatorSpec("second", options=same("lam"), needs=("values",))
    with ESTIMATORS.temporarily(second):
        config = load_config([*REQUIRED, *ONE_UPDATE, "algorithm.adv_estimator=second"])
        assert config.critic.enable is True and config.algorithm.use_kl_in_reward is False
        assert config.provenance.sources["critic.enable"] == "derived from algorithm.adv_estimator"
        found = make_plan(config, 64)
        assert found.needs_critic and found.estimator_needs == ("values",) and not found.values_by_update
        assert make_plan(with_words(config, "critic.enable=True"), 64).needs_critic
        with pytest.raises(ConfigError) as caught:
            with_words(config, "critic.enable=False")
        assert "critic.enable=False with algorithm.adv_estimator=second: second needs values. Remove it." in str(
            caught.value
        )
        words = ["algorithm.lam=0.9", "algorithm.gamma=0.9", "algorithm.bootstrap_truncated=True"]
        assert with_words(config, *words).provenance.warnings == (
            "algorithm.gamma has no effect: algorithm.adv_estimator is none of gae and reinforce_plus_plus.",
            "algorithm.bootstrap_truncated has no effect: algorithm.adv_estimator is not gae.",
        )
    with pytest.raises(ConfigError, match="no such advantage estimator"):
        load_config([*REQUIRED, "algorithm.adv_estimator=second"])


def with_words(config: Config, *words: str) -> Config:
    return load_config([*REQUIRED, *ONE_UPDATE, f"algorithm.adv_estimator={config.algorithm.adv_estimator}", *words])


def test_an_estimator_that_compares_responses_needs_two() -> None:
    with ESTIMATORS.temporarily(EstimatorSpec("pairs", needs=("group_ids",))), pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, "algorithm.adv_estimator=pairs"])
    assert "actor_rollout_ref.rollout.n=1 with algorithm.adv_estimator=pairs: a group of one" in str(caught.value)


def test_an_estimator_of_ones_own_may_take_any_option() -> None:
    words = ["algorithm.lam=0.5", "algorithm.gdpo_reward_keys=[a,b]", "critic.enable=True"]
    config = load_config([*REQUIRED, "algorithm.adv_estimator=my.module:own", *words])
    assert config.provenance.warnings == () and config.critic.enable is True
    assert load_config([*REQUIRED, "algorithm.adv_estimator=my.module:own"]).critic.enable is None


def test_weights_are_of_named_rewards() -> None:
    config = load_config([*REQUIRED, "algorithm.adv_estimator=m:f", "reward.functions={exact: 2.0, length: -1.0}"])
    options = {**same("gamma"), "gdpo_reward_weights": "weights"}
    named = EstimatorSpec("named", options=options, needs=("named_rewards",))
    assert estimator_options(named, config) == {"gamma": 1.0, "weights": (2.0, -1.0)}
    assert estimator_options(EstimatorSpec("plain", options=options), config) == {"gamma": 1.0}


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
