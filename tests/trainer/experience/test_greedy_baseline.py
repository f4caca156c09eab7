"""ReMax in the trainer: the greedy response of each prompt, its reward as baseline, and a run's own advantages."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.batch import Batch, RowStatus
from steepest.data.sampler import PromptSampler
from steepest.loggers.jsonl import read_metrics
from steepest.models.flops import generation_flops
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer import build_step
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.row_selection import OverlongPenalty
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.greedy_baseline import GreedyBaselines
from steepest.trainer.experience.scoring import Scorer, StepScorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.run.metrics import batch_metrics
from tests.config.commands import REQUIRED
from tests.tiny import tiny_lm
from tests.trainer.fakes import EchoEngine, FakePool, NumberTokenizer, prompt
from tests.trainer.toy import make_toy, toy_overrides

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


def parts(*, n: int = 2, **more):
    engine = TwoWays()
    sampling = SamplingParams(max_tokens=4, temperature=0.7, top_p=0.9, top_k=5, n=n, seed=7)
    prompts = [prompt(number) for number in range(4)]
    rollouts = StepRollouts(engine, prompts, PromptSampler(4, 4, shuffle=False), sampling, pad_id=0)
    scorer = StepScorer(Scorer(FakePool(value), NumberTokenizer()), **more)
    baselines = GreedyBaselines(rollouts, rollouts.greedily, scorer)
    return baselines, StepScorer(scorer.scorer, fills=[baselines.fill], **more), engine


def test_one_greedy_response_a_prompt_gives_the_baseline_of_all_its_responses():
    baselines, scorer, engine = parts()
    batch = baselines.generate(1)
    assert [params.n for _, params in engine.calls] == [2, 1]
    greedy = engine.calls[1][1]
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.max_tokens) == (0.0, 1.0, -1, 4)
    assert engine.calls[1][0] == engine.calls[0][0] == [(0,), (1,), (2,), (3,)]
    metrics = scorer(batch, 1)
    assert batch.token_level_scores[:, 0].tolist() == [10, 20, 11, 21, 12, 22, 13, 23]
    assert batch.extras["reward_baselines"][:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert metrics == {"reward/error_rate": 0.0}, "of the responses that are trained on"


def test_a_prompt_whose_greedy_response_has_no_score_leaves_the_training():
    baselines, scorer, _ = parts()
    batch = baselines.generate(1)
    scorer(batch, 1)
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
    baselines, scorer, _ = parts(shape=penalty)
    batch = baselines.generate(1)
    scorer(batch, 1)
    assert batch.token_level_scores[:2, 0].tolist() == [9, 19]
    assert batch.extras["reward_baselines"][:2].tolist() == [-1, -1]


def test_the_step_generates_both_and_then_lets_the_engine_sleep():
    counted: list[list[float]] = []
    for estimator in ("reinforce_plus_plus", "remax"):
        baselines, scorer, engine = parts()
        released = []
        rollouts = baselines.sampled
        rollouts.release = lambda engine=engine, released=released: released.append(len(engine.calls))
        config = load_config([*REQUIRED, f"algorithm.adv_estimator={estimator}"])
        counted.append([])
        actor = SimpleNamespace(model=tiny_lm(), count=counted[-1].append)
        step_scorer, plan = StepScorer(scorer.scorer), make_plan(config, 2048)
        generate, score = build_step.build_sampling(config, plan, rollouts, step_scorer, PromptPosition(), actor)
        batch = generate(1)
        assert released == [1 + (estimator == "remax")]
        score(batch, 1)
        assert ("reward_baselines" in batch.extras) == (estimator == "remax")
    greedy = generation_flops(actor.model, rollouts.greedily(rollouts.prompts))
    assert greedy > 0 and counted[1] == [*counted[0], greedy]


def test_dynamic_sampling_keeps_each_rounds_baselines_with_its_groups():
    baselines, _, engine = parts()
    rollouts, scorer = baselines.sampled, baselines.scorer
    released = []
    rollouts.release = lambda: released.append(len(engine.calls))
    rollouts.sampler = PromptSampler(4, 2, shuffle=False)
    config = load_config(
        [*REQUIRED, REMAX[0], "data.train_batch_size=3", "actor_rollout_ref.rollout.n=2",
         "algorithm.filter_groups.enable=True"]
    )  # fmt: skip
    actor = SimpleNamespace(model=tiny_lm(), count=lambda flops: None)
    generate, score = build_step.build_sampling(
        config, make_plan(config, 2048), rollouts, scorer, PromptPosition(), actor
    )
    batch = generate(1)
    assert released == [4] and [params.n for _, params in engine.calls] == [2, 1, 2, 1]
    # rounds of prompts 0 1 and 2 3; prompt 3 has no baseline, so its group is as one whose rewards failed
    assert batch.extras["reward_baselines"].tolist() == [0, 0, 1, 1, 2, 2]
    assert "filter_groups/dropped" in score(batch, 1)


@pytest.mark.parametrize("engine", ["builtin", "hf"])
def test_a_run_uses_the_reward_less_the_greedy_reward(tmp_path, monkeypatch, engine):
    batches: list[Batch] = []
    estimate = Advantages.__call__

    def recorded(self, batch):
        estimate(self, batch)
        batches.append(batch)

    monkeypatch.setattr(Advantages, "__call__", recorded)
    folder = tmp_path / "run"
    run_ppo(load_config(toy_overrides(make_toy(tmp_path / "toy"), folder, *REMAX, "trainer.total_training_steps=3",
                                      f"actor_rollout_ref.rollout.name={engine}", "actor_rollout_ref.rollout.n=2",
                                      "trainer.val_before_train=False", "trainer.test_freq=-1")))  # fmt: skip
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
