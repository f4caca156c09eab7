"""The keys of the policy losses: what null means with each of them, who takes which option, what is warned of."""

from __future__ import annotations

import pytest

from steepest.config.algorithms import LOSSES, LossSpec, same
from steepest.config.load import load_config
from steepest.config.schema import Config
from steepest.errors import ConfigError
from tests.support.commands import REQUIRED

ACTOR = "actor_rollout_ref.actor"
MODE = f"{ACTOR}.policy_loss.loss_mode"
SEVERAL = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=4", "critic.ppo_mini_batch_size=8"]


def load(*words: str) -> Config:
    return load_config([*REQUIRED, *SEVERAL, *words])


def clip_range(*words: str) -> tuple[float, float, float]:
    actor = load(*words).actor_rollout_ref.actor
    return actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c


def warnings(*words: str) -> list[str]:
    return list(load(*words).provenance.warnings)


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        ("vanilla", (0.2, 0.2, 3.0)),
        ("cispo", (0.2, 0.2, 3.0)),
        ("clip_cov", (0.2, 0.2, 3.0)),
        ("gspo", (3e-4, 4e-4, 3.0)),
        ("geo_mean", (0.4, 0.4, 3.0)),
        ("dppo_tv", (0.15, 0.15, 20.0)),
        ("dppo_kl", (0.05, 0.05, 20.0)),
    ],
)
def test_a_clip_range_that_is_not_given_is_the_papers(loss: str, want: tuple[float, float, float]) -> None:
    config = load(f"{MODE}={loss}")
    actor = config.actor_rollout_ref.actor
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == want
    assert (
        config.provenance.sources[f"{ACTOR}.clip_ratio_low"]
        == f"derived from {ACTOR + '.clip_ratio' if loss in ('vanilla', 'cispo', 'clip_cov') else MODE}"
    )


def test_a_clip_range_that_is_given_is_taken() -> None:
    assert clip_range(f"{MODE}=gspo", f"{ACTOR}.clip_ratio=0.01") == (0.01, 0.01, 3.0)
    assert clip_range(f"{MODE}=gspo", f"{ACTOR}.clip_ratio_high=0.001") == (3e-4, 0.001, 3.0)
    assert clip_range(f"{MODE}=dppo_tv", f"{ACTOR}.clip_ratio_low=0.3", f"{ACTOR}.clip_ratio_c=9") == (0.3, 0.15, 9.0)
    # the user's own function may mean anything by it, so it gets PPO's
    assert clip_range(f"{MODE}=mine.py:loss") == (0.2, 0.2, 3.0)


@pytest.mark.parametrize("loss", ["vanilla", "gpg", "cispo", "gspo", "geo_mean", "sapo"])
def test_the_mean_that_is_not_given_is_the_losss_and_the_critic_keeps_its_own(loss: str) -> None:
    config = load(f"{MODE}={loss}")
    want = "seq-mean-token-mean" if loss in ("gspo", "geo_mean", "sapo") else "token-mean"
    assert config.actor_rollout_ref.actor.loss_agg_mode == want
    assert config.critic.loss_agg_mode == "token-mean"
    given = load(f"{MODE}={loss}", f"{ACTOR}.loss_agg_mode=token-sum")
    assert given.actor_rollout_ref.actor.loss_agg_mode == given.critic.loss_agg_mode == "token-sum"


def test_options_of_another_loss_have_no_effect() -> None:
    assert warnings(f"{ACTOR}.tau_pos=2", f"{ACTOR}.policy_loss.kl_cov_ratio=0.1") == [
        f"{ACTOR}.tau_pos has no effect: only {MODE}=sapo takes it.",
        f"{ACTOR}.policy_loss.kl_cov_ratio has no effect: only {MODE}=kl_cov takes it.",
    ]
    assert warnings(f"{MODE}=sapo", f"{ACTOR}.tau_pos=2", f"{ACTOR}.tau_neg=3") == []
    assert warnings(f"{MODE}=sapo", f"{ACTOR}.clip_ratio_c=2") == [
        f"{ACTOR}.clip_ratio_c has no effect: only {MODE}=vanilla|dppo_tv|dppo_kl takes it."
    ]
    covariance = [f"{ACTOR}.policy_loss.{name}" for name in ("clip_cov_ratio=0.1", "clip_cov_lb=0", "clip_cov_ub=2")]
    assert warnings(f"{MODE}=clip_cov", *covariance, f"{ACTOR}.data_loader_seed=3") == []
    # it may take any option, and draw tokens
    assert warnings(f"{MODE}=mine.py:loss", f"{ACTOR}.tau_pos=2", f"{ACTOR}.data_loader_seed=3") == []


def test_a_loss_that_is_stated_has_its_name_its_defaults_and_its_options() -> None:
    spec = LossSpec(
        "own", options=same("tau_pos"), clip_range=(0.07, 0.09), ratio_bound=5.0, mean="token-sum", draws=True
    )
    with pytest.raises(ConfigError, match="no such policy loss"):
        load(f"{MODE}=own")
    with LOSSES.temporarily(spec):
        assert clip_range(f"{MODE}=own") == (0.07, 0.09, 5.0)
        assert load(f"{MODE}=own").actor_rollout_ref.actor.loss_agg_mode == "token-sum"
        assert warnings(f"{MODE}=own", f"{ACTOR}.tau_pos=2", f"{ACTOR}.tau_neg=2", f"{ACTOR}.data_loader_seed=3") == [
            f"{ACTOR}.tau_neg has no effect: only {MODE}=sapo takes it."
        ]
        assert warnings(f"{ACTOR}.tau_pos=2") == [f"{ACTOR}.tau_pos has no effect: only {MODE}=sapo|own takes it."]
    with pytest.raises(ConfigError, match="no such policy loss"):
        load(f"{MODE}=own")


def test_the_exact_kl_reads_the_reference_in_the_actors_micro_batches() -> None:
    ref = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu"
    words = [f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=full", f"{ref}=4"]
    reason = f"{ref} has no effect: {ACTOR}.kl_loss_type=full has the reference compute in the actor's micro-batches."
    assert warnings(*words, "algorithm.use_kl_in_reward=False") == [reason]
    assert warnings(*words, "algorithm.use_kl_in_reward=True") == []
    assert warnings(words[0], words[2], "algorithm.use_kl_in_reward=False") == []


@pytest.mark.parametrize("width", ["clip_ratio=0.2", "clip_ratio_high=0.03"])
def test_a_clip_of_gspo_that_never_acts_is_warned_of(width: str) -> None:
    (warning,) = warnings(f"{MODE}=gspo", f"{ACTOR}.{width}")
    assert "a response's ratio lies near 1, so this clip hardly ever acts. The paper's are 0.0003 and 0.0004" in warning
    assert warnings(f"{MODE}=gspo", f"{ACTOR}.clip_ratio=0.005") == warnings(f"{ACTOR}.{width}") == []


@pytest.mark.parametrize("loss", ["gspo", "geo_mean", "sapo"])
def test_a_mean_over_all_tokens_for_a_loss_of_rows_is_warned_of(loss: str) -> None:
    (warning,) = warnings(f"{MODE}={loss}", f"{ACTOR}.loss_agg_mode=token-mean")
    assert warning.startswith(
        f"{ACTOR}.loss_agg_mode=token-mean with policy_loss.loss_mode={loss}: a response weighs as"
    )
    assert warnings(f"{MODE}={loss}", f"{ACTOR}.loss_agg_mode=seq-mean-token-mean") == []


def test_updates_that_do_not_suit_the_loss_are_warned_of() -> None:
    one = f"{ACTOR}.ppo_mini_batch_size=8"
    (warning,) = warnings(f"{MODE}=gpg")
    assert warning.startswith(f"{MODE}=gpg with 2 updates a step: this loss has no ratio")
    assert "4 updates" in warnings(f"{MODE}=gpg", f"{ACTOR}.ppo_epochs=2")[0]
    (warning,) = warnings(f"{MODE}=kl_cov", one)
    assert warning.startswith(f"{MODE}=kl_cov with one update a step: its penalty is on the distance")
    assert warnings(f"{MODE}=gpg", one) == warnings(f"{MODE}=kl_cov") == []
