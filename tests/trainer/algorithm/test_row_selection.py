"""Length penalty, masks, PF-PPO and value pretraining in the step, each by hand and in a run of seconds."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.advantages import grpo
from steepest.core.batch import Batch, RowStatus
from steepest.loggers.jsonl import read_metrics
from steepest.rewards.api import RewardResult
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.row_selection import (
    DrawnRows,
    InTurn,
    OverlongPenalty,
    PretrainingReturns,
    all_rows,
    build_critic_targets,
    build_left_out,
    build_row_selection,
    build_shaping,
    estimated_returns,
    mask_equal_groups,
    mask_truncated,
)
from steepest.trainer.experience.api import Experience
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer, reward_metrics
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.run.metrics import batch_metrics
from tests.support.fake_parts import FakePool, NumberTokenizer, prompt
from tests.support.learner_parts import make_actor, make_batch, make_critic, same_bits, weights, with_log_probs
from tests.support.toy_run import make_toy, toy_overrides


def scored(scores: list[float], groups: list[int], truncated: list[bool] | None = None) -> Batch:
    made = Batch.from_sequences(
        [[1]] * len(scores),
        [[2, 3]] * len(scores),
        group_ids=groups,
        truncated=truncated or [False] * len(scores),
        samples=[prompt(1)] * len(scores),
    )
    made.token_level_scores = torch.tensor([[0.0, score] for score in scores])
    made.token_level_rewards = made.token_level_scores
    return made


def test_the_penalty_is_in_the_score_and_its_parts_are_logged():
    batch = Batch.from_sequences(
        [[1]] * 3, [[5], [5, 6, 7], [5, 6, 7, 8]], group_ids=[0, 0, 0], truncated=[False, False, True],
        samples=[prompt(1)] * 3,
    )  # fmt: skip
    # limit 4, buffer 2: 0, half and the whole of the factor 3
    results = [RewardResult(1.0, {"acc": 1.0}), RewardResult(1.0, {"acc": 1.0}), RewardResult(None, {}, "timeout")]
    shape = OverlongPenalty(4, 2, 3.0, log=True)
    shaped = shape(batch, results)
    assert [r.score for r in shaped] == [1.0, -0.5, None] and shaped[2] is results[2]
    assert shaped[1].parts == {"acc": 1.0, "overlong_reward": -1.5, "overlong": 1.0}
    assert (
        reward_metrics(shaped)["reward/overlong_reward"] == -0.75 and reward_metrics(shaped)["reward/overlong"] == 0.5
    )
    assert OverlongPenalty(4, 2, 3.0, log=False)(batch, results)[1] == RewardResult(-0.5, {"acc": 1.0})
    written = []
    scorer = StepScorer(Scorer(FakePool(lambda request: RewardResult(1.0)), NumberTokenizer()), shape)
    Finished(lambda step: Experience(batch, [scorer.rate(batch)]), write=lambda step, rows: written.extend(rows))(1)
    assert batch.token_level_scores.tolist() == [[1.0, 0, 0, 0], [0, 0, -0.5, 0], [0, 0, 0, -2.0]]
    assert [row["score"] for row in written] == [1.0, -0.5, -2.0] and written[2]["reward/overlong_reward"] == -3.0


def test_truncated_responses_leave_groups_losses_and_denominators():
    # group 0 without its truncated response: 1 and 0; its mean is 1/2, not 1/3
    batch = scored([1.0, 0.0, 0.0, 1.0, 1.0], [0, 0, 0, 1, 1], [False, False, True, False, False])
    assert mask_truncated(batch) == {"mask_truncated/ratio": pytest.approx(0.2)}
    Advantages(partial(grpo, norm_by_std=False), whitened=False)(batch)
    assert batch.advantages[:, 0].tolist() == [0.5, -0.5, 0.0, 0.0, 0.0]
    assert batch.row_status.tolist() == [0, 0, RowStatus.TRUNCATED, 0, 0]
    assert batch.loss_mask.any(1).tolist() == [True, True, False, True, True]
    assert batch_metrics(batch)["response_length/clip_ratio"] == pytest.approx(0.2), "lengths still count it"


def test_equal_groups_leave_the_denominator():
    batch = scored([1.0, 0.0, 1.0, 1.0, 0.5, 0.5], [0, 0, 1, 1, 2, 2])
    assert mask_equal_groups(batch) == {"mask_equal_groups/ratio": pytest.approx(4 / 6)}
    assert batch.row_status.tolist() == [0, 0, *[RowStatus.EQUAL_GROUP] * 4]
    assert batch.loss_mask.any(1).tolist() == [True, True, False, False, False, False]
    # with the truncated one gone group 0 has one response left, and nothing to compare
    batch = scored([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1], [True, False, False, False])
    metrics = InTurn([mask_truncated, mask_equal_groups])(batch)
    assert batch.row_status.tolist() == [RowStatus.TRUNCATED, RowStatus.EQUAL_GROUP, 0, 0]
    assert batch.loss_mask.any(1).tolist() == [False, False, True, True]
    assert metrics == {"mask_truncated/ratio": 0.25, "mask_equal_groups/ratio": pytest.approx(1 / 3)}


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_masked_response_is_as_if_it_were_not_there(mode):
    """Trap 10 for the whole update: actor and critic, whatever the aggregation."""
    from steepest.learner.actor import ActorLossSettings
    from steepest.learner.critic import CriticLossSettings

    whole = with_log_probs(make_batch(), make_actor(), shift=0.1)
    whole.truncated = torch.tensor([False, True, False, False, True, False, False, False])
    without = whole.select(~whole.truncated)
    mask_truncated(whole)
    found = []
    for batch in (whole, without):
        actor = make_actor(loss=ActorLossSettings(loss_agg_mode=mode))
        critic = make_critic(loss=CriticLossSettings(loss_agg_mode=mode))
        actor.update(batch, step=1)
        critic.update(batch, step=1)
        found.append((weights(actor), weights(critic)))
    for a, b in zip(*found, strict=True):
        assert max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6


def test_pf_ppo_draws_rows_by_their_scores_and_the_same_ones_after_a_resume():
    def drawn_scores(step: int, seed: int = 3) -> list[float]:
        return DrawnRows("pow", 2.0, seed)(batch, step)[0].token_level_scores.sum(1).tolist()

    batch = scored([0.0, 1.0, 0.0, 2.0], [0, 0, 1, 1])
    chosen, metrics = DrawnRows("pow", 2.0, seed=3)(batch, 4)
    drawn = chosen.token_level_scores.sum(1).tolist()
    assert set(drawn) <= {1.0, 2.0} and len(drawn) == 4
    assert metrics == {"pf_ppo/distinct_ratio": len(set(drawn)) / 4}
    assert len(batch) == 4 and batch.token_level_scores.sum(1).tolist() == [0, 1, 0, 2], "statistics keep the batch"
    draws = [tuple(drawn_scores(step)) for step in range(30)]
    assert len(set(draws)) > 1 and drawn_scores(4) == drawn
    assert [tuple(drawn_scores(step, seed=4)) for step in range(30)] != draws, "a seed of its own"
    # a quarter of the weight of 2: of 120 draws about 24 are 1s
    assert 10 <= sum(draw.count(1.0) for draw in draws) <= 40


def test_a_critic_is_pretrained_on_what_followed_and_then_by_the_estimator():
    targets = PretrainingReturns(num_steps=2, gamma=0.5)
    batch = scored([4.0, 0.0], [0, 1])
    batch.values, batch.returns = torch.ones(2, 2), torch.full((2, 2), 9.0)
    batch.loss_mask = torch.tensor([[True, False], [True, True]])
    # the reward 4 is worth 2 a token before, also where the losses leave its own token out
    assert targets(batch, 2).returns.tolist() == [[2.0, 4.0], [0.0, 0.0]]
    assert targets(batch, 3) is batch and batch.returns.tolist() == [[9.0, 9.0], [9.0, 9.0]]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


SHORT = (
    "data.train_batch_size=32", "actor_rollout_ref.actor.ppo_mini_batch_size=32", "trainer.val_before_train=False",
    "trainer.save_freq=1", "trainer.total_training_steps=3",
)  # fmt: skip
GROUPS = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")


def run(toy, folder, *more: str):
    run_ppo(load_config(toy_overrides(toy, folder, *SHORT, *more)))
    return read_metrics(folder / "metrics.jsonl")


def tensors(folder, step: int, name: str):
    from safetensors.torch import load_file

    return load_file(folder / f"global_step_{step}/{name}/model.safetensors")


def test_warm_up_leaves_the_actor_alone_and_teaches_the_critic_what_followed(toy, tmp_path):
    """`trainer.critic_warmup`: policy and reference are one, the critic's values approach the rewards' mean."""
    reward = tmp_path / "long.py"
    reward.write_text(
        "def digit(data_source, solution_str, ground_truth, extra_info=None):\n    return len(solution_str)\n"
    )
    words = ("trainer.critic_warmup=2", "algorithm.lam=0.5", "data.max_response_length=4", "critic.optim.lr=1e-2")
    words = (*words, f"custom_reward_function.path={reward}", "algorithm.use_kl_in_reward=False")
    rows = run(toy, tmp_path / "mc", *words, "trainer.critic_warmup_returns=monte_carlo")
    started = {}
    for step in (1, 2, 3):
        started[step] = (tensors(tmp_path / "mc", step, "actor"), tensors(tmp_path / "mc", step, "critic"))
    assert same_bits(started[1][0], started[2][0]) and not same_bits(started[2][0], started[3][0])
    assert not same_bits(started[1][1], started[2][1])
    assert "actor/grad_norm" not in rows[2] and "actor/grad_norm" in rows[3] and rows[2]["critic/grad_norm"] > 0
    plain = run(toy, tmp_path / "plain", *words)
    # values start at 0, so the first step's returns are the same only where lambda is 1
    assert plain[1]["critic/vf_loss"] != pytest.approx(rows[1]["critic/vf_loss"], rel=1e-6)
    assert not same_bits(tensors(tmp_path / "plain", 1, "critic"), started[1][1])


def test_pf_ppo_pretraining_and_a_critic_of_one_update_do_not_mix(tmp_path):
    required = ["data.train_files=a", "data.val_files=a", "actor_rollout_ref.model.path=m", "data.train_batch_size=8"]

    def by_update(*words: str) -> bool:
        config = load_config([*required, "critic.ppo_mini_batch_size=8", "trainer.total_epochs=1", *words])
        return make_plan(config, 64).values_by_update

    assert by_update()
    assert by_update("trainer.critic_warmup=2")
    assert not by_update("trainer.critic_warmup=2", "trainer.critic_warmup_returns=monte_carlo")
    assert not by_update("algorithm.use_pf_ppo=True")


@pytest.mark.parametrize(
    "method", ["pow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("max_min", "max_random"))]
)
def test_a_run_with_pf_ppo_resumes_to_the_same_bits(toy, tmp_path, method):
    words = ("algorithm.use_pf_ppo=True", f"algorithm.pf_ppo.reweight_method={method}", "data.train_batch_size=16")
    words = (*words, "actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.total_training_steps=2")
    rows = run(toy, tmp_path / "whole", *words)
    assert 0 < rows[1]["pf_ppo/distinct_ratio"] <= 1 and rows[2]["actor/grad_norm"] > 0
    if method != "pow":
        return
    run(toy, tmp_path / "cut", *words, "trainer.total_training_steps=1")
    run(toy, tmp_path / "cut", *words)
    for name in ("actor", "critic"):
        assert same_bits(tensors(tmp_path / "whole", 2, name), tensors(tmp_path / "cut", 2, name))


def test_a_run_whose_groups_are_masked_and_punished_for_length(toy, tmp_path):
    rows = run(
        toy, tmp_path / "m", *GROUPS, "algorithm.mask_equal_groups=True", "algorithm.mask_truncated=True",
        "reward_model.overlong_buffer.enable=True", "reward_model.overlong_buffer.len=3",
        "data.max_response_length=4", "trainer.total_training_steps=1",
    )  # fmt: skip
    assert {"mask_truncated/ratio", "mask_equal_groups/ratio", "reward/overlong", "reward/overlong_reward"} <= set(
        rows[1]
    )
    assert rows[1]["mask_truncated/ratio"] == rows[1]["response_length/clip_ratio"]


def test_a_step_that_is_masked_whole_is_a_step(toy, tmp_path):
    """One token a response: all are truncated, nothing is left, the run goes on."""
    rows = run(
        toy, tmp_path / "none", *GROUPS, "algorithm.mask_truncated=True", "actor_rollout_ref.rollout.ignore_eos=True"
    )
    assert sorted(rows) == [1, 2, 3] and rows[3]["mask_truncated/ratio"] == 1.0
    assert same_bits(tensors(tmp_path / "none", 1, "actor"), tensors(tmp_path / "none", 3, "actor"))


def test_what_is_off_adds_nothing():
    config = load_config(["data.train_files=a", "data.val_files=a", "actor_rollout_ref.model.path=m"])
    batch, results = scored([1.0, 1.0], [0, 0]), [RewardResult(1.0), RewardResult(1.0)]
    assert build_shaping(config)(batch, results) is results
    assert build_left_out(config)(batch) == {} and batch.loss_mask.all()
    assert build_row_selection(config) is all_rows and all_rows(batch, 1) == (batch, {})
    assert build_critic_targets(config) is estimated_returns and estimated_returns(batch, 1) is batch


def test_what_is_on_is_the_object_with_its_numbers():
    config = load_config(
        ["data.train_files=a", "data.val_files=a", "actor_rollout_ref.model.path=m", "algorithm.use_pf_ppo=True",
         "algorithm.pf_ppo.reweight_method=max_min", "algorithm.pf_ppo.weight_pow=3", "algorithm.gamma=0.5",
         "actor_rollout_ref.rollout.seed=7", "trainer.critic_warmup=2", "trainer.critic_warmup_returns=monte_carlo",
         "algorithm.mask_truncated=True", "algorithm.mask_equal_groups=True", "actor_rollout_ref.rollout.n=2"]
    )  # fmt: skip
    assert build_row_selection(config) == DrawnRows("max_min", 3.0, 7)
    assert build_critic_targets(config) == PretrainingReturns(2, 0.5)
    assert build_left_out(config) == InTurn([mask_truncated, mask_equal_groups])
