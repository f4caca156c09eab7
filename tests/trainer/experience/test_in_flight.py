"""Several steps in flight: a collector keeps nothing between two calls, one after the other or at the same time."""

from __future__ import annotations

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from steepest.core.batch import Batch
from steepest.data.sampler import PromptSampler
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer.experience.api import Collector, Experience
from steepest.trainer.experience.dynamic_sampling import DynamicSampling, PromptPosition
from steepest.trainer.experience.extras import NamedRewards
from steepest.trainer.experience.greedy_baseline import GreedyBaseline
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer
from steepest.trainer.experience.single_turn import SingleTurn, StepRollouts, step_seed
from tests.support.fake_parts import EchoEngine, FakeCluster, FakePool, NumberTokenizer, prompt

KINDS = ("single turn", "greedy baseline", "dynamic sampling", "dynamic sampling with baselines")
PROMPTS, GROUPS = 60, 2


class Meeting(EchoEngine):
    """Its first `callers` calls wait for one another, so that as many steps are in flight."""

    def __init__(self, callers: int = 0) -> None:
        super().__init__()
        self.waiting, self.barrier = callers, threading.Barrier(max(1, callers))
        self.lock = threading.Lock()

    def generate(self, requests):
        with self.lock:
            waits, self.waiting = self.waiting > 0, self.waiting - 1
        if waits:
            self.barrier.wait(timeout=120)
        return super().generate(requests)


def value(request) -> RewardResult:
    """Every third prompt is right in one of two responses; the greedy response to prompt 6 has no score."""
    number = int(request.ground_truth)
    if number == 6 and request.solution == "6" and request.num_tokens == 1:
        return RewardResult(None, {}, "no")
    right = float(request.solution == request.ground_truth) if number % 3 == 0 else 0.0
    return RewardResult(right, {"acc": right, "length": float(len(request.solution))})


def make(kind: str, engine: EchoEngine | None = None) -> tuple[Collector, PromptPosition]:
    sampler = PromptSampler(PROMPTS, GROUPS, shuffle=False)
    prompts = [prompt(number) for number in range(PROMPTS)]
    sampling = SamplingParams(max_tokens=1, n=2, seed=7)
    rollouts = StepRollouts(engine or EchoEngine(), prompts, sampler, sampling, pad_id=0)
    scorer = StepScorer(Scorer(FakePool(value), NumberTokenizer()), fills=[NamedRewards(("length",))])
    flops, position = FakeCluster().generation_flops, PromptPosition()
    collect: Collector = SingleTurn(rollouts, scorer, flops)
    if "baseline" in kind:
        collect = GreedyBaseline(collect, rollouts.greedily, scorer, flops)
    if "dynamic" in kind:
        collect = DynamicSampling(
            collect, position, num_groups=GROUPS, metric="reward", max_rounds=9, epoch=sampler.epoch, pad_id=0,
            warn_once=print,
        )  # fmt: skip
    return Finished(collect), position


def contents(found: Experience) -> dict[str, object]:
    """Everything of an experience but the seconds, comparable with ==."""

    def plain(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.nan_to_num(-99.0).tolist() if value.is_floating_point() else value.tolist()
        return {name: plain(part) for name, part in value.items()} if isinstance(value, dict) else value

    def of_batch(batch: Batch) -> dict[str, object]:
        return {item.name: plain(getattr(batch, item.name)) for item in dataclasses.fields(batch)}

    responses = [(of_batch(part.batch), part.texts, part.results) for part in found.responses]
    return {
        "batch": of_batch(found.batch),
        "responses": responses,
        "metrics": dict(found.metrics),
        "flops": dict(found.flops),
        "parts": sorted(found.seconds),
        "prompts_taken": found.prompts_taken,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_collected_ahead_is_what_it_would_have_been(kind):
    """Collected 1, learnt 1, collected 2, learnt 2; and collected 1 and 2, then learnt 1 and 2."""

    def learn(found: Experience, position: PromptPosition) -> None:
        """As a step does: it writes into its own batch."""
        batch = found.batch
        batch.old_log_probs = batch.advantages = torch.full(batch.responses.shape, 5.0)
        batch.loss_mask &= False
        batch.token_level_scores += 1.0
        found.metrics["actor/pg_loss"] = 1.0
        position.learn(found.prompts_taken)

    collect, position = make(kind)
    wanted = []
    for step in (1, 2):
        found = collect(step)
        wanted.append(contents(found))
        learn(found, position)
    collect, position = make(kind)
    ahead = [collect(step) for step in (1, 2)]
    assert [contents(found) for found in ahead] == wanted and wanted[0] != wanted[1]
    learn(ahead[0], position)
    assert contents(ahead[1]) == wanted[1], "the second experience shares nothing with the first"
    assert wanted[0]["parts"] == ["gen", "reward"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_step_twice_is_the_same_batch(kind):
    collect, position = make(kind)
    first = contents(collect(1))
    if "dynamic" in kind:
        assert contents(collect(1)) != first, "the run's prompts go on"
        position.restore(None, 0)
    again = collect(1)
    assert contents(again) == first


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dynamic" not in kind])
def test_two_threads_collect_what_one_does(kind):
    collect, _ = make(kind)
    wanted = [contents(collect(step)) for step in (1, 2)]
    collect, _ = make(kind, Meeting(2))
    with ThreadPoolExecutor(2) as pool:
        assert [contents(found) for found in pool.map(collect, (1, 2))] == wanted


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "dynamic" in kind])
def test_two_threads_with_dynamic_sampling_share_the_prompts_and_nothing_else(kind):
    """Which step gets which round depends on the threads; every round is one step's, and is counted there alone."""
    engine = Meeting(2)
    collect, position = make(kind, engine)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(collect, (1, 2)))
    taken = [[int(part.batch.samples[0].uid.removeprefix("rows:")) // GROUPS + 1 for part in one.responses]
             for one in found]  # fmt: skip
    assert sorted(number for numbers in taken for number in numbers) == list(range(1, position.taken + 1))
    seeds = {step_seed(7, number) for number in range(1, position.taken + 1)}
    assert {sampling.seed for _, sampling in engine.calls if sampling.temperature} == seeds
    for one, numbers in zip(found, taken, strict=True):
        assert numbers == sorted(numbers) and one.prompts_taken == numbers[-1]
        assert one.metrics["train/num_gen_batches"] == len(numbers)
        assert one.metrics["filter_groups/generated"] == GROUPS * len(numbers)
        rows = 4 if kind == "dynamic sampling" else 6
        assert one.flops["gen"] == rows * len(numbers), "operations of its own rounds"
        uids = {sample.uid for part in one.responses for sample in part.batch.samples}
        assert {sample.uid for sample in one.batch.samples} <= uids
    assert {one.prompts_taken for one in found} & {position.taken}


def test_a_step_is_learnt_while_the_next_one_is_collected():
    """The queue's case: one thread collects, another learns. A checkpoint in between has the learnt step's prompts."""
    collect, position = make("dynamic sampling")
    wanted = [collect(step) for step in (1, 2, 3)]
    collect, position = make("dynamic sampling")
    with ThreadPoolExecutor(1) as collecting:
        ahead = [collecting.submit(collect, step) for step in (1, 2, 3)]
        for future, one in zip(ahead, wanted, strict=True):
            found = future.result(timeout=120)
            position.learn(found.prompts_taken)
            assert contents(found) == contents(one)
            assert position.state_dict() == {"taken": one.prompts_taken}
