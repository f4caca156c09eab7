"""Dynamic sampling: which prompts are drawn, kept and filled in, what it says, and a resume in the middle."""

from __future__ import annotations

import threading

import pytest
import torch

from steepest.config.load import load_config
from steepest.console import once
from steepest.data.sampler import PromptSampler
from steepest.errors import RewardError
from steepest.loggers.jsonl import read_metrics
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer.experience.dynamic_sampling import DynamicSampling, PromptPosition, values_of
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer
from steepest.trainer.experience.single_turn import SingleTurn, StepRollouts, step_seed
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.fake_parts import EchoEngine, FakeCluster, FakePool, NumberTokenizer, exact, prompt
from tests.support.toy_run import make_toy, toy_overrides


def hard(request) -> RewardResult:
    """Prompts 0, 3, 6, 9 are right in one of two responses; of the others all fail."""
    right = exact(request).score if int(request.ground_truth) % 3 == 0 else 0.0
    return RewardResult(right, {"acc": right, "length": float(len(request.solution))})


def sampling(function=hard, *, num_prompts=12, groups=4, rounds=3, metric="reward", said=None, position=None, **more):
    engine = EchoEngine()
    sampler = PromptSampler(num_prompts, groups, shuffle=False)
    prompts = [prompt(n) for n in range(num_prompts)]
    rollouts = StepRollouts(engine, prompts, sampler, SamplingParams(max_tokens=1, n=2, seed=7), pad_id=0)
    scorer = StepScorer(Scorer(FakePool(function), NumberTokenizer()))
    made = DynamicSampling(
        SingleTurn(rollouts, scorer, FakeCluster().generation_flops), position or PromptPosition(), num_groups=groups,
        metric=metric, max_rounds=rounds, epoch=sampler.epoch, pad_id=0,
        warn_once=once((said if said is not None else []).append), **more,
    )  # fmt: skip
    return made, engine


def prompts_of(batch) -> list[int]:
    return [int(sample.ground_truth) for sample in batch.samples]


def test_rounds_go_on_until_the_groups_that_differ_fill_the_batch():
    # rounds 0-3, 4-7, 8-11 hold the prompts 0 3, 6, 9 that differ: after the third there are four
    said, released = [], []
    made, engine = sampling(said=said)
    made.release = lambda: released.append(len(engine.calls))
    found = Finished(made)(1)
    batch = found.batch
    assert prompts_of(batch) == [0, 0, 3, 3, 6, 6, 9, 9]
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.token_level_scores[:, 0].tolist() == [1.0, 0.0] * 4
    assert released == [3] and said == []
    assert [params.seed for _, params in engine.calls] == [step_seed(7, n) for n in (1, 2, 3)]
    assert made.position.taken == found.prompts_taken == 3
    assert [part.batch.samples[0].uid for part in found.responses] == ["rows:0", "rows:4", "rows:8"]
    assert found.flops == {"gen": 24.0, "reward": 0.0} and set(found.seconds) == {"gen", "reward"}
    assert found.metrics == pytest.approx(
        {
            "reward/error_rate": 0.0,
            "reward/acc": 4 / 24,
            "reward/length": (10 * 1 + 2 * 2 + 12 * 3) / 24,  # "0" to "9", "10", "11"; sample 1 says "100" to "111"
            "training/epoch": 0.0,
            "train/num_gen_batches": 3.0,
            "filter_groups/generated": 12.0,
            "filter_groups/dropped": 8.0,
            "filter_groups/unused": 0.0,
            "filter_groups/filled": 0.0,
            "filter_groups/score_mean": 4 / 24,
        }
    )


def test_the_next_step_goes_on_with_the_next_prompts_and_the_next_epoch():
    made, engine = sampling(groups=2)
    made(1)  # 0 1, 2 3: the prompts 0 and 3
    assert prompts_of(made(2).batch) == [6, 6, 9, 9]  # 4 5, 6 7, 8 9
    assert made.position.taken == 5
    assert prompts_of(made(3).batch) == [0, 0, 3, 3]  # 10 11, then the second epoch: 0 1, 2 3
    assert made(4).metrics["training/epoch"] == 1.0
    assert [rows[0] for rows, _ in engine.calls][6:8] == [(0,), (2,)]
    seeds = [params.seed for _, params in engine.calls]
    assert len(set(seeds)) == len(seeds), "the second epoch draws other responses"


def test_groups_beyond_the_batch_are_not_used():
    made, _ = sampling(lambda request: exact(request), rounds=3)
    batch = made(1).batch
    assert prompts_of(batch) == [0, 0, 1, 1, 2, 2, 3, 3] and made.position.taken == 1
    one_of_three = sampling(groups=3, rounds=9)[0]
    batch = one_of_three(1).batch  # 0 1 2, 3 4 5, 6 7 8: exactly one each
    assert prompts_of(batch) == [0, 0, 3, 3, 6, 6]
    found = sampling(groups=4, rounds=9, num_prompts=8)[0](1)
    batch = found.batch  # 0 3, 6, then 0 3 again: five, one too many
    assert prompts_of(batch) == [0, 0, 3, 3, 6, 6, 0, 0]
    assert batch.group_ids.tolist() == [0, 0, 1, 1, 2, 2, 3, 3], "the same prompt twice is two groups"
    assert found.metrics["filter_groups/unused"] == 1.0


def test_what_is_missing_at_the_bound_is_filled_and_told_once():
    said = []
    made, engine = sampling(rounds=2, said=said)
    found = made(1)  # 0 3 and 6 differ; 1 was dropped first
    assert prompts_of(found.batch) == [0, 0, 3, 3, 6, 6, 1, 1] and len(engine.calls) == 2
    assert found.metrics["filter_groups/filled"] == 1.0 and found.metrics["filter_groups/dropped"] == 5.0
    made(2)
    assert len(said) == 1 and said[0].startswith(
        "warning: dynamic sampling found 3 of 4 prompts whose responses differ"
    )
    nothing, _ = sampling(lambda request: RewardResult(0.0), rounds=1)
    assert prompts_of(nothing(1).batch) == [0, 0, 1, 1, 2, 2, 3, 3], "a full batch, and nothing to learn"


def test_another_metric_and_one_that_no_reward_reports():
    # all lengths differ between sample 0 ("5") and sample 1 ("105"), so nothing is dropped
    made, engine = sampling(metric="length")
    assert prompts_of(made(1).batch) == [0, 0, 1, 1, 2, 2, 3, 3] and len(engine.calls) == 1
    with pytest.raises(RewardError, match=r"metric=lenght: a reward reported no such part. Did you mean length\? It"):
        sampling(metric="lenght")[0](1)
    assert values_of([RewardResult(None, {}, "timeout"), RewardResult(0.5)], "seq_reward").tolist() == [0.0, 0.5]


def test_failed_rewards_are_no_difference():
    def half_fails(request) -> RewardResult:
        return RewardResult(None, {}, "timeout") if len(request.solution) > 2 else exact(request)

    made, _ = sampling(half_fails, rounds=1)
    found = made(1)
    assert found.metrics["filter_groups/dropped"] == 4.0
    assert found.batch.trained_mask.any(1).tolist() == [True, False] * 4


def test_every_response_is_written_dropped_ones_included():
    written = []
    made, _ = sampling()
    Finished(made, write=lambda step, rows: written.append((step, [row["id"] for row in rows])))(5)
    assert written == [(5, [f"rows:{n}" for n in range(12) for _ in range(2)])]


def test_the_position_of_a_run_without_dynamic_sampling_is_its_step():
    position = PromptPosition()
    position.restore(None, 4)
    assert position.taken == 4
    position.restore({"taken": 0}, 4)  # saved by a run that had it off
    assert position.taken == 4
    position.restore({"taken": 9}, 4)
    assert position.state_dict() == {"taken": 9}


def test_a_round_that_another_step_takes_in_between_is_not_this_step_s():
    made, _ = sampling()
    made.release = made.position.take  # before the experience is made
    found = made(1)
    assert found.prompts_taken == 3 and made.position.taken == 4 and found.metrics["training/epoch"] == 0.0


def test_a_checkpoint_stores_the_prompts_of_the_step_that_was_learnt_though_the_next_one_is_collected():
    position = PromptPosition()
    made, _ = sampling(groups=2, num_prompts=30, position=position)
    first, second = made(1), made(2)  # before anything is learnt
    assert position.state_dict() == {"taken": 0}, "nothing has been learnt"
    position.learn(first.prompts_taken)
    assert position.state_dict() == {"taken": first.prompts_taken} and position.taken == second.prompts_taken
    resumed = PromptPosition()
    resumed.restore(position.state_dict(), 1)
    again = sampling(groups=2, num_prompts=30, position=resumed)[0](2)
    assert prompts_of(again.batch) == prompts_of(second.batch) == [6, 6, 9, 9]
    assert again.prompts_taken == second.prompts_taken == 5 and again.metrics == second.metrics
    position.learn(second.prompts_taken)
    position.learn(None)  # a step without dynamic sampling says nothing
    assert position.state_dict() == {"taken": 5}


RUN = (
    "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "algorithm.filter_groups.enable=True",
    "data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.save_freq=1",
    "algorithm.filter_groups.max_num_gen_batches=40", "trainer.val_before_train=False",
)  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=64)


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(toy, tmp_path, capsys):
    from safetensors.torch import load_file

    def run(folder, steps: int):
        run_ppo(load_config(toy_overrides(toy, folder, *RUN, f"trainer.total_training_steps={steps}")))
        return read_metrics(folder / "metrics.jsonl")

    whole = run(tmp_path / "whole", 3)
    assert "Dynamic sampling is on: a step takes 1 to 40 batches of prompts" in capsys.readouterr().out
    run(tmp_path / "cut", 1)
    resumed = run(tmp_path / "cut", 3)
    rounds = [whole[step]["train/num_gen_batches"] for step in (1, 2, 3)]
    assert max(rounds) > 1, "otherwise the position is the step, and nothing was tested"
    for step in (1, 2, 3):
        assert resumed[step]["train/num_gen_batches"] == rounds[step - 1]
        assert whole[step]["group/equal_ratio"] == 0.0 and whole[step]["filter_groups/filled"] == 0.0
        assert whole[step]["critic/score/mean"] > whole[step]["filter_groups/score_mean"], "the kept are not all"
        assert whole[step]["reward/error_rate"] == 0.0
    a, b = (load_file(tmp_path / name / "global_step_3/actor/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole[3]["training/epoch"] == (sum(rounds) - 1) // 8


def test_a_later_step_that_is_learnt_first_does_not_bring_rounds_back():
    position = PromptPosition()
    for taken in (4, 3):  # step 1 took rounds 1 and 4, step 2 took 2 and 3
        position.learn(taken)
    assert position.state_dict() == {"taken": 4}


def test_threads_take_different_rounds():
    position, taken = PromptPosition(), []
    threads = [threading.Thread(target=lambda: taken.extend(position.take() for _ in range(500))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 4001))
