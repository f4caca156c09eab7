"""Each health check on made-up steps: silent on healthy ones, speaks on sick ones, at most once every N steps."""

from __future__ import annotations

import json

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.batch import Batch
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.scoring import place_scores
from steepest.trainer.run.health.checks import Check, Seen
from steepest.trainer.run.health.learning import DeadCritic, KLRunaway, NaN
from steepest.trainer.run.health.rewards import LengthHacking, Validation
from steepest.trainer.run.health.watch import REPEAT_STEPS, Health, build_checks
from steepest.trainer.run.metrics import score_with_length

HEALTHY = {
    "actor/ratio_max_dev_first": 1e-6,
    "mismatch/k3_kl": 1e-7,
    "rollout/end_token_ratio": 1.0,
    "response_length/clip_ratio": 0.1,
    "response_length/mean": 20.0,
    "response_length/score_corr": 0.1,
    "group/equal_ratio": 0.4,
    "critic/score/max": 1.0,
    "critic/score/min": 0.0,
    "critic/score/mean": 0.5,
    "actor/entropy": 0.8,
    "actor/ppo_kl": 1e-3,
    "actor/reward_kl_penalty": 0.1,
    "reward/error_rate": 0.0,
    "critic/vf_explained_var": 0.3,
    "actor/skipped_steps": 0.0,
}
SICK = [
    ("ratio", {"actor/ratio_max_dev_first": 0.01}, 1, "ratio differs from 1 by 0.01 before the first update"),
    ("temperature", {"mismatch/k3_kl": 0.02}, 1, "have disagreed since the first step: KL 0.02 nats"),
    ("rejected", {"rollout_corr/rollout_rs_masked_fraction": 0.8}, 1, "80% of the tokens were rejected"),
    ("end_token", {"rollout/end_token_ratio": 0.25}, 1, "75% of the responses that ended have no end token"),
    ("cut_answers", {"response_length/clip_ratio": 0.9}, 3, "90% of the responses were cut"),
    ("equal_groups", {"group/equal_ratio": 1.0}, 5, "in 5 steps in a row all responses to each prompt"),
    ("constant_reward", {"critic/score/max": 0.0}, 5, "every response of a step had the same score (now 0)"),
    ("reward_errors", {"reward/error_rate": 0.05}, 1, "5.0% of the rewards failed"),
    ("entropy_collapse", {"actor/entropy": 0.001}, 3, "below 0.005 nats a token for 3 steps (now 0.001)"),
    ("dead_critic", {"critic/vf_explained_var": -0.5}, 20, "explained variance -0.5, mean of 10 steps"),
    ("kl_runaway", {"actor/reward_kl_penalty": 2.0}, 3, "2 nats a token away from the reference"),
    ("skipped_updates", {"actor/skipped_steps": 2.0}, 1, "2 update(s) skipped"),
    ("nan", {"actor/pg_loss": float("nan")}, 3, "actor/pg_loss was NaN or inf"),
    ("learning_rate", {"actor/ppo_kl": -0.3}, 1, "moved by a KL of 0.3 nats a token within one step (limit 0.2)"),
]


def checks(dtype: str = "float32", *words: str) -> list[Check]:
    """Those of a run whose files are never read."""
    files = ["data.train_files=a", "data.val_files=b", "actor_rollout_ref.model.path=c"]
    return build_checks(load_config([*files, *words]), dtype)


def said(health: Health, step: int, metrics: dict[str, float], **more) -> list[str]:
    health.examine(Seen(step, metrics, **more))
    return health.said


def test_healthy_steps_are_silent_and_every_check_has_a_metric():
    health = Health(checks())
    for step in range(1, 41):
        metrics = health.examine(Seen(step, HEALTHY, {10: 0.5, 20: 0.6, 30: 0.6}))
        assert health.said == [] and set(metrics.values()) == {0.0}
    names = {"stale_engine", "length_hacking", "validation", *(case[0] for case in SICK)}
    assert set(metrics) == {f"health/{name}" for name in names} and len(health.checks) == len(names)


@pytest.mark.parametrize(("name", "sick", "steps", "words"), SICK)
def test_a_sick_run_is_named_after_so_many_steps_and_again_after_a_while(name, sick, steps, words):
    health = Health(checks())
    first = [(step, text) for step in range(1, steps + REPEAT_STEPS + 1)
             for text in said(health, step, {**HEALTHY, **sick}) if words in text]  # fmt: skip
    assert [step for step, _ in first] == [steps, steps + REPEAT_STEPS]
    assert health.examine(Seen(100, {**HEALTHY, **sick}))[f"health/{name}"] == 1.0


def test_every_sentence_names_a_key_of_the_configuration():
    from steepest.config import tree
    from steepest.config.schema import Config

    keys = [key for key in tree.leaves(Config) if "." in key]
    for name, sick, steps, words in SICK:
        health = Health(checks())
        (text,) = [text for step in range(1, steps + 1)
                   for text in said(health, step, {**HEALTHY, **sick}) if words in text]  # fmt: skip
        assert [key for key in keys if key in text], name


def test_an_engine_that_agreed_before_is_stale():
    health = Health(checks())
    assert said(health, 1, HEALTHY) == []
    (text,) = said(health, 2, {**HEALTHY, "mismatch/k3_kl": 0.4})
    assert text.startswith("the rollout engine agreed with the trainer at first and does not any more: KL 0.4")


def test_bfloat16_is_judged_by_its_own_rounding():
    rounded = {**HEALTHY, "mismatch/k3_kl": 5e-3, "actor/ratio_max_dev_first": 0.1}
    assert said(Health(checks("bfloat16")), 1, rounded) == [] and len(said(Health(checks("float32")), 1, rounded)) == 2


def test_a_kl_loss_that_is_no_mean_over_tokens_is_not_judged():
    loss = {**HEALTHY, "actor/kl_loss": 50.0}
    loss.pop("actor/reward_kl_penalty")
    mode = "actor_rollout_ref.actor.loss_agg_mode="
    for words, speaks in ((f"{mode}token-mean", True), (f"{mode}seq-mean-token-sum", False)):
        health = Health(checks("float32", words))
        found = [bool(said(health, step, loss)) for step in (1, 2, 3)]
        assert found == [False, False, speaks], words


def test_one_fact_is_one_warning():
    """Equal scores everywhere are equal scores in every group, and leave a critic nothing to explain."""
    health = Health(checks())
    nothing = {**HEALTHY, "critic/score/max": 0.0, "group/equal_ratio": 1.0, "critic/vf_explained_var": -5e4}
    found = [text for step in range(1, 26) for text in said(health, step, nothing)]
    assert len(found) == 1 and "same score (now 0)" in found[0]


def test_a_young_critic_and_a_bad_step_of_an_old_one_are_not_called_dead():
    check = DeadCritic()
    values = [-0.5] * 9 + [0.3] * 10 + [-0.5]
    assert [check(Seen(step, {"critic/vf_explained_var": value})) for step, value in enumerate(values, 1)] == [
        None
    ] * 20
    # a mean of (0.3 * 5 - 0.5 * 5) / 10 = -0.1 in step 24
    found = [check(Seen(step, {"critic/vf_explained_var": -0.5})) for step in range(21, 25)]
    assert found[:2] == [None, None] and "explained variance -0.1" in str(found[3])


def test_skipped_updates_become_a_problem_in_the_third_step_in_a_row():
    health = Health(checks())
    skipped = {**HEALTHY, "critic/skipped_steps": 1.0}
    problems = []
    for step, metrics in enumerate([skipped, HEALTHY, skipped, skipped, skipped], 1):
        said(health, step, metrics)
        problems.append(list(health.problems))
    assert problems[:4] == [[], [], [], []] and "in 3 steps in a row a gradient was NaN" in problems[4][0]
    assert NaN().is_problem


def test_a_score_that_grows_with_the_length_speaks_and_longer_answers_alone_do_not():
    def last(scores, corr, lengths):
        check, found = LengthHacking(), None
        for step, (score, length) in enumerate(zip(scores, lengths, strict=True), 1):
            row = {"critic/score/mean": score, "response_length/mean": length, "response_length/score_corr": corr}
            found = check(Seen(step, row))
        return found

    up, level = [float(x) for x in range(10, 20)], [15.0, 15.1] * 5
    # lengths 10..14 and 15..19: means 12 and 17, 1.42 times
    assert "0.80 within a step, 1.00 over 10 steps, in which they became 1.4 times as long" in last(up, 0.8, up)
    assert last(up, 0.2, up) is None  # within a prompt longer ones are not better
    assert last(up, 0.8, level) is None  # they do not become longer
    assert last(level, 0.8, up) is None  # the score does not rise


def test_two_validations_below_the_best_speak_while_the_score_rises():
    def last(validations, scores):
        check, seen = Validation(), {}
        found = None
        for step, score in enumerate(scores, 1):
            found = check(Seen(step, {"critic/score/mean": score}, seen))
            if step in validations:  # after the step, as in a run
                seen[step] = validations[step]
        return found

    rising = [step / 40 for step in range(1, 42)]
    # the ten scores before step 10 have the mean 5.5 / 40 = 0.1375, those before step 40 35.5 / 40 = 0.8875
    text = last({10: 0.6, 20: 0.55, 30: 0.5, 40: 0.4}, rising)
    assert "from 0.6 (step 10) to 0.4 (step 40)" in text and "rose from 0.138 to 0.887" in text
    assert last({10: 0.6, 20: 0.5, 30: 0.6, 40: 0.4}, rising) is None  # one alone may be chance
    assert last({10: 0.6, 20: 0.58, 30: 0.57, 40: 0.56}, rising) is None  # less than a tenth
    assert last({10: 0.6, 20: 0.55, 30: 0.5, 40: 0.4}, [0.5] * 41) is None  # the score does not rise


def test_the_state_goes_through_json_and_a_resumed_run_speaks_in_the_same_steps():
    def steps(health, numbers):
        cut = {**HEALTHY, "response_length/clip_ratio": 0.9, "actor/entropy": 0.8}
        return [(step, text) for step in numbers for text in said(health, step, cut)]

    whole = steps(Health(checks(), repeat=4), range(1, 11))
    first = Health(checks(), repeat=4)
    found = steps(first, range(1, 3))
    second = Health(checks(), repeat=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert found + steps(second, range(3, 11)) == whole and [step for step, _ in whole] == [3, 7]


def test_a_state_is_a_copy():
    check = KLRunaway()
    health = Health([check])
    said(health, 1, HEALTHY)
    state = health.state_dict()
    said(health, 2, HEALTHY)
    assert state == {"spoke": {}, "kept": {"kl_runaway": {"sick": [0.0]}}}


def test_the_correlation_of_score_and_length_is_that_within_prompts():
    """Prompt 0: lengths 1, 3 with scores 0, 1; prompt 1: lengths 7, 5 with scores 5, 4. Less the means of a prompt both
    are (-1, 1), (1, -1) and (-.5, .5), (.5, -.5): 1. The lengths of the
    prompts themselves play no part."""
    batch = Batch.from_sequences(
        [[1]] * 4, [[5] * n for n in (1, 3, 7, 5)], group_ids=[0, 0, 1, 1], truncated=[False] * 4
    )
    place_scores(batch, [RewardResult(score) for score in (0.0, 1.0, 5.0, 4.0)])
    assert abs(score_with_length(batch)["response_length/score_corr"] - 1.0) < 1e-9
    alone = batch.select(torch.tensor([0, 2]))
    alone.group_ids = torch.tensor([0, 1])  # one response a prompt: over the rows
    assert abs(score_with_length(alone)["response_length/score_corr"] - 1.0) < 1e-9
    place_scores(batch, [RewardResult(1.0)] * 4)
    assert score_with_length(batch) == {}
