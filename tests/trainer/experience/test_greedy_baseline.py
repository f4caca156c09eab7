"""ReMax in the trainer: the greedy response of each prompt, its reward as baseline, and a run's own advantages."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.batch import Batch, RowStatus
from steepest.data.sampler import PromptSampler
from steepest.devices.backends.cpu import CPUDevice
from steepest.loggers.jsonl import read_metrics
from steepest.models.flops import generation_flops
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer import build_step
from steepest.trainer.algorithm.row_selection import OverlongPenalty
from steepest.trainer.experience.api import Collector
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.greedy_baseline import GreedyBaseline
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer
from steepest.trainer.experience.single_turn import SingleTurn, StepRollouts
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.run.metrics import batch_metrics
from tests.support.commands import REQUIRED
from tests.support.fake_parts import EchoEngine, FakeCluster, FakePool, NumberTokenizer, prompt
from tests.support.tiny_models import tiny_lm
from tests.support.toy_run import make_toy, toy_overrides

REMAX = ("algorithm.adv_estimator=remax", "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16")


class TwoWays(EchoEngine):
    """Answers [p] greedily with [p], and sampled with [p + 10 * k] for k = 1, 2, ..."""

    def generate(self, requests):
        answers = super().generate(requests)
        for group in answers if requests[0].sampling.temperature else []:
            for k, one in enumerate(group):
                one.token_ids[0] += 10 * (k + 1) - 100 * k
        return answers


def value(request) -> RewardResult:
    """The number that the answer is; the greedy answer to prompt 3 gets none."""
    number = int(request.solution)
    return RewardResult(None, error="no") if number == 3 else RewardResult(float(number))


def parts(*, n: int = 2, **more) -> tuple[GreedyBaseline, StepRollouts, TwoWays]:
    engine = TwoWays()
    sampling = SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9, top_k=5, n=n, seed=7)
    prompts = [prompt(number) for number in range(4)]
    rollouts = StepRollouts(engine, prompts, PromptSampler(4, 4, shuffle=False), sampling, pad_id=0)
    scorer = StepScorer(Scorer(FakePool(value), NumberTokenizer()), **more)
    flops = FakeCluster().generation_flops
    return GreedyBaseline(SingleTurn(rollouts, scorer, flops), rollouts.greedily, scorer, flops), rollouts, engine


def test_one_greedy_response_a_prompt_gives_the_baseline_of_all_its_responses():
    collect, _, engine = parts()
    found = Finished(collect)(1)
    batch = found.batch
    assert [params.n for _, params in engine.calls] == [2, 1]
    greedy = engine.calls[1][1]
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.max_tokens) == (0.0, 1.0, -1, 4)
    assert engine.calls[1][0] == engine.calls[0][0] == [(0,), (1,), (2,), (3,)]
    assert batch.token_level_scores[:, 0].tolist() == [10, 20, 11, 21, 12, 22, 13, 23]
    assert batch.extras["reward_baselines"][:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert found.metrics == {"reward/error_rate": 0.0}, "of the responses that are trained on"
    (responses,) = found.responses
    assert responses.batch is batch and len(responses.results) == 8
    assert found.flops == {"gen": 8.0 + 4.0, "reward": 0.0} and set(found.seconds) == {"gen", "reward"}


def test_a_prompt_whose_greedy_response_has_no_score_leaves_the_training():
    batch = parts()[0](1).batch
    assert batch.extras["reward_baselines"][6:].isnan().all()
    assert batch.row_status.tolist() == [RowStatus.TRAINED] * 6 + [RowStatus.REWARD_FAILED] * 2
    assert batch.loss_mask[:, 0].tolist() == [True] * 6 + [False] * 2
    batch.token_level_rewards = batch.token_level_scores
    build_step.build_advantages(load_config([*REQUIRED, REMAX[0]]))(batch)
    # 10 - 0, 20 - 0, 11 - 1, 21 - 1, ...
    assert batch.advantages[:, 0].tolist() == [10, 20, 10, 20, 10, 20, 0, 0]
    metrics = batch_metrics(batch)
    assert metrics["remax/baseline_reward/mean"] == 1.0 and metrics["remax/baseline_reward/max"] == 2.0
    assert metrics["remax/baseline_reward/error_rate"] == 0.25
    assert batch.select(torch.tensor([5, 0])).extras["reward_baselines"].tolist() == [2.0, 0.0]


def test_the_greedy_response_is_scored_as_the_others_are():
    """A penalty for length that a run adds to its scores is in the baseline too: all responses have one token of 4."""
    penalty = OverlongPenalty(max_length=1, buffer=1, factor=1.0, log=False)
    batch = parts(shape=penalty)[0](1).batch
    assert batch.token_level_scores[:2, 0].tolist() == [9, 19]
    assert batch.extras["reward_baselines"][:2].tolist() == [-1, -1]


def built(config, rollouts, engine) -> tuple[Collector, list[int]]:
    """The collector of a configuration, and how many calls the engine had answered whenever it was released."""
    cluster, released = FakeCluster(), []
    cluster.generation_flops = partial(generation_flops, tiny_lm())
    cluster.release_engine = lambda: released.append(len(engine.calls))
    scorer = Scorer(FakePool(value), NumberTokenizer())
    plan, position = make_plan(config, 2048), PromptPosition()
    return build_step.build_collector(config, plan, cluster, rollouts, scorer, position, device=CPUDevice()), released


def test_the_step_generates_both_and_then_lets_the_engine_sleep():
    model, counted = tiny_lm(), []
    for estimator in ("reinforce_plus_plus", "remax"):
        _, rollouts, engine = parts()
        collect, released = built(load_config([*REQUIRED, f"algorithm.adv_estimator={estimator}"]), rollouts, engine)
        found = collect(1)
        counted.append(found.flops["gen"])
        assert released == [1 + (estimator == "remax")]
        assert ("reward_baselines" in found.batch.extras) == (estimator == "remax")
    assert counted[1] - counted[0] == generation_flops(model, rollouts.greedily(rollouts.prompts)) > 0


def test_dynamic_sampling_keeps_each_rounds_baselines_with_its_groups():
    _, rollouts, engine = parts()
    rollouts.sampler = PromptSampler(4, 2, shuffle=False)
    config = load_config(
        [*REQUIRED, REMAX[0], "data.train_batch_size=3", "actor_rollout_ref.rollout.n=2",
         "algorithm.filter_groups.enable=True"]
    )  # fmt: skip
    collect, released = built(config, rollouts, engine)
    found = collect(1)
    assert released == [4] and [params.n for _, params in engine.calls] == [2, 1, 2, 1]
    # rounds of prompts 0 1 and 2 3; prompt 3 has no baseline, so its group is as one whose rewards failed
    assert found.batch.extras["reward_baselines"].tolist() == [0, 0, 1, 1, 2, 2]
    assert "filter_groups/dropped" in found.metrics and found.prompts_taken == 2


@pytest.mark.parametrize("engine", ["builtin", "hf"])
def test_a_run_uses_the_reward_less_the_greedy_reward(tmp_path, engine):
    batches: list[Batch] = []
    folder = tmp_path / "run"
    run_ppo(load_config(toy_overrides(make_toy(tmp_path / "toy"), folder, *REMAX, "trainer.total_training_steps=3",
                                      f"actor_rollout_ref.rollout.name={engine}", "actor_rollout_ref.rollout.n=2",
                                      "trainer.val_before_train=False", "trainer.test_freq=-1")),
            observers=[lambda step, experience: batches.append(experience.batch)])  # fmt: skip
    assert len(batches) == 3
    for batch in batches:
        baselines = batch.extras["reward_baselines"]
        assert len(batch) == 32 and set(baselines.tolist()) <= {0.0, 1.0}
        assert torch.equal(baselines[::2], baselines[1::2]), "one a prompt"
        wanted = batch.token_level_scores.sum(1) - baselines
        assert torch.equal(batch.advantages, torch.where(batch.loss_mask, wanted[:, None], 0.0))
    metrics = read_metrics(folder / "metrics.jsonl")
    for step, batch in enumerate(batches, 1):
        assert metrics[step]["remax/baseline_reward/mean"] == pytest.approx(
            batch.extras["reward_baselines"].mean().item()
        )
        assert not math.isnan(metrics[step]["actor/pg_loss"])
