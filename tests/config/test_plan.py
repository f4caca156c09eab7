"""Derived numbers of a run."""

from __future__ import annotations

import pytest

from steepest.config.algorithms import EstimatorSpec
from steepest.config.load import load_config, load_sft_config
from steepest.config.plan import make_plan, make_sft_plan
from steepest.errors import ConfigError
from tests.support.commands import GRPO, REFERENCE, REQUIRED

ACTOR = "actor_rollout_ref.actor"


def test_the_reference_run_has_435_steps_of_four_updates() -> None:
    config = load_config([*REFERENCE, "actor_rollout_ref.rollout.name=builtin"])
    plan = make_plan(config, 7473)
    # 7473 // 256 = 29, 29 * 15 = 435, 256 / 64 = 4
    assert (plan.steps_per_epoch, plan.total_steps, plan.updates_per_step) == (29, 435, 4)
    assert (plan.rows_per_step, plan.mini_batch_rows, plan.critic_mini_batch_rows) == (256, 64, 64)
    assert plan.needs_critic and plan.needs_reference and plan.old_log_probs == "engine"
    assert plan.notes == (
        "KL in the reward is on (derived from algorithm.kl_ctrl.kl_coef); off: algorithm.use_kl_in_reward=False.",
        "The engine's log-probs are the old ones, checked on a sample of rows in each step; beyond the bound all are "
        "computed again. Always again: actor_rollout_ref.actor.old_log_probs=recompute.",
        "29 steps an epoch; the last 49 of 7473 rows of each epoch are left out.",
    )


def test_groups_multiply_rows_and_grpo_needs_no_critic() -> None:
    words = ["data.train_batch_size=32", f"{ACTOR}.ppo_mini_batch_size=16", f"{ACTOR}.ppo_epochs=3"]
    plan = make_plan(load_config([*GRPO, *words]), 64)
    assert (plan.rows_per_step, plan.mini_batch_rows, plan.updates_per_step) == (128, 64, 6)
    assert (plan.needs_critic, plan.needs_reference) == (False, False)
    assert (
        plan.notes[0]
        == "KL in the reward is off (derived from algorithm.adv_estimator); on: algorithm.use_kl_in_reward=True."
    )


def test_reference_exists_for_a_kl_loss_alone() -> None:
    plan = make_plan(load_config([*GRPO, f"{ACTOR}.use_kl_loss=True"]), 2048)
    assert plan.needs_reference and plan.reads_ref_log_probs and not plan.corrects
    exact = [f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=full"]
    for words, reads in ((exact, False), ([*exact, "algorithm.use_kl_in_reward=True"], True)):
        found = make_plan(load_config([*GRPO, *words]), 2048)
        assert found.needs_reference and found.reads_ref_log_probs is reads
    assert not [note for note in plan.notes if note.startswith("KL")]  # no advice for another KL than the chosen one


@pytest.mark.parametrize("words", [["algorithm.use_kl_in_reward=False"], ["algorithm.use_kl_in_reward=True"],
                                   ["--config-name=grpo"], ["--config-name=rloo"], ["--config-name=dapo"]])  # fmt: skip
def test_what_the_user_or_a_preset_chose_is_no_occasion_for_advice(words: list[str]) -> None:
    plan = make_plan(load_config([*REQUIRED, *words]), 2048)
    assert not [note for note in plan.notes if note.startswith("KL")]


def test_steps_win_over_epochs_and_one_update_is_told() -> None:
    words = ["data.train_batch_size=10", "trainer.total_training_steps=25", "trainer.total_epochs=2"]
    plan = make_plan(load_config([*REQUIRED, *words]), 100)
    assert (plan.steps_per_epoch, plan.total_steps) == (10, 25)
    assert "trainer.total_training_steps=25 wins over trainer.total_epochs=2 (20 steps): 2.5 epochs." in plan.notes
    assert "One update a step: the ratio is 1 throughout, so the clip never acts." in plan.notes
    assert plan.old_log_probs == "engine", "the KL in the reward reads log-probs before the update"
    assert any(note.startswith("The engine's log-probs serve the KL in the reward") for note in plan.notes)


def test_a_pass_that_is_redundant_is_left_out_and_told() -> None:
    words = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8"]
    plan = make_plan(load_config([*GRPO, *words]), 64, half_precision=True)
    assert plan.old_log_probs == "update" and any("left out" in note for note in plan.notes)


def test_values_come_from_the_one_update_of_a_critic_whose_rows_stand_alone() -> None:
    words = ["data.train_batch_size=8", "critic.ppo_mini_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=4"]
    plan = make_plan(load_config([*REQUIRED, *words]), 64)
    assert plan.values_by_update
    assert any(note.startswith("The critic's one update computes the values too") for note in plan.notes)
    whole = EstimatorSpec("whole", needs=("values",))
    assert not make_plan(load_config([*REQUIRED, *words]), 64, whole).values_by_update, "returns of several rows"
    no_critic = EstimatorSpec("no_critic", by_row=True)
    assert not make_plan(load_config([*GRPO, *words]), 64, no_critic).values_by_update
    for several in ("critic.ppo_mini_batch_size=4", "critic.ppo_epochs=2"):
        assert not make_plan(load_config([*REQUIRED, *words, several]), 64).values_by_update
    head = ["critic.share_base=head", "actor_rollout_ref.model.lora_rank=4"]
    assert not make_plan(load_config([*REQUIRED, *words, *head]), 64).values_by_update


@pytest.mark.parametrize(
    ("more", "half_precision", "why"),
    [
        (f"{ACTOR}.old_log_probs=recompute", False, f"({ACTOR}.old_log_probs=recompute)"),
        ("actor_rollout_ref.rollout.top_p=0.9", False, "the engine's are those of a filtered choice"),
        ("actor_rollout_ref.rollout.top_k=50", False, "the engine's are those of a filtered choice"),
        (f"{ACTOR}.ppo_epochs=2", True, "in half precision the engine's are not exact"),
    ],
)
def test_where_the_engine_does_not_speak_for_the_actor_there_is_a_pass(
    more: str, half_precision: bool, why: str
) -> None:
    words = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8", f"{ACTOR}.ppo_epochs=2"]
    assert make_plan(load_config([*GRPO, *words]), 64).old_log_probs == "engine"
    plan = make_plan(load_config([*GRPO, *words, more]), 64, half_precision=half_precision)
    assert plan.old_log_probs == "pass"
    assert any(why in note for note in plan.notes)


def test_recompute_asks_for_the_pass_before_a_single_update_too() -> None:
    words = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8", f"{ACTOR}.old_log_probs=recompute"]
    assert make_plan(load_config([*GRPO, *words]), 64).old_log_probs == "pass"


def test_warmup_is_a_number_of_steps_or_a_share() -> None:
    words = [
        f"{ACTOR}.optim.lr_warmup_steps_ratio=0.15",
        "critic.optim.lr_warmup_steps=7",
        "trainer.total_training_steps=50",
    ]
    plan = make_plan(load_config([*REQUIRED, *words]), 1024)
    assert (plan.actor_warmup_steps, plan.critic_lr_warmup_steps) == (7, 7)  # int(0.15 * 50) = 7
    words = [
        "critic.optim.lr_warmup_steps=3",
        "critic.optim.lr_warmup_steps_ratio=0.9",
        "trainer.total_training_steps=50",
    ]
    assert make_plan(load_config([*REQUIRED, *words]), 1024).critic_lr_warmup_steps == 3


def test_an_estimator_of_ones_own_says_whether_it_needs_a_critic() -> None:
    own = [*REQUIRED, "algorithm.adv_estimator=my.module:estimate"]
    plain, reads = EstimatorSpec("plain"), EstimatorSpec("reads", needs=("values",))
    assert not make_plan(load_config(own), 2048, plain).needs_critic
    assert make_plan(load_config(own), 2048, reads).needs_critic
    assert make_plan(load_config([*own, "critic.enable=True"]), 2048, plain).needs_critic
    with pytest.raises(
        ConfigError, match=r"^critic.enable=False: algorithm.adv_estimator=my.module:estimate needs values"
    ):
        make_plan(load_config([*own, "critic.enable=False"]), 2048, reads)
    with pytest.raises(ConfigError, match=r"^trainer.critic_warmup=2 without a critic"):
        make_plan(load_config([*own, "trainer.critic_warmup=2"]), 2048, plain)
    with pytest.raises(ValueError, match=r"my.module:estimate: pass the statement"):
        make_plan(load_config(own), 2048)


def test_a_critic_warmup_as_long_as_the_epochs_is_refused() -> None:
    words = ["data.train_batch_size=10", "trainer.total_epochs=2", "trainer.critic_warmup=20"]
    with pytest.raises(ConfigError, match=r"^trainer.critic_warmup=20: the actor would never be trained.* 20 steps"):
        make_plan(load_config([*REQUIRED, *words]), 105)
    assert make_plan(load_config([*REQUIRED, *words]), 110).total_steps == 22
    make_plan(load_config([*REQUIRED, *words, "trainer.val_only=True"]), 105)


def test_data_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(REQUIRED), 100)
    assert str(caught.value) == (
        "data.train_batch_size=1024: the training data has 100 usable rows, so no batch is ever full. "
        "Use data.train_batch_size <= 100, or more data."
    )


def test_sft_plan() -> None:
    config = load_sft_config(
        [
            "data.train_files=a",
            "model.path=m",
            "data.train_batch_size=8",
            "trainer.total_epochs=3",
            "optim.lr_warmup_steps_ratio=0.5",
        ]
    )
    plan = make_sft_plan(config, 21)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (2, 6, 3)
    assert plan.notes == ("2 steps an epoch; the last 5 of 21 rows of each epoch are left out.",)


def test_rollout_correction_chooses_where_old_log_probs_come_from() -> None:
    correction = "algorithm.rollout_correction"
    one = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8"]
    words = [*GRPO, *one, f"{correction}.rollout_rs=token_k1", f"{correction}.rollout_rs_threshold=2"]
    for asked in ([*GRPO, *one, f"{correction}.rollout_is=token"], words):
        plan = make_plan(load_config(asked), 64)
        assert plan.corrects
        assert plan.old_log_probs == "pass", "the engine's own, or the update's, would make every weight 1"
        assert any("algorithm.rollout_correction compares the engine's with them" in note for note in plan.notes)
    plan = make_plan(load_config([*GRPO, *one, f"{correction}.bypass_mode=True"]), 64, half_precision=True)
    assert plan.old_log_probs == "rollout" and any("rollout_correction.bypass_mode" in note for note in plan.notes)
