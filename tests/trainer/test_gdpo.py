"""GDPO in the trainer: which rewards reach the batch, with which weights, and a run's own advantages."""

from __future__ import annotations

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.config.sections.advantages import named_rewards
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.data.sampler import PromptSampler
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import ConfigError, RewardError
from steepest.loggers.jsonl import read_metrics
from steepest.registry import Entry
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer import build_step
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.extras import NamedRewards
from steepest.trainer.experience.scoring import Scorer, StepScorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.commands import REQUIRED
from tests.support.fake_parts import EchoEngine, FakeCluster, FakePool, NumberTokenizer, exact, prompt
from tests.support.toy_run import make_toy, toy_overrides

GDPO = ("algorithm.adv_estimator=gdpo", "actor_rollout_ref.rollout.n=4", "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8")  # fmt: skip
PARTS = """
def parts(data_source, solution_str, ground_truth, extra_info):
    answer = solution_str.strip()
    return {"score": 0.0, "right": float(answer == ground_truth), "digit": 50.0 * answer.isdigit()}
"""


def rows(number: int) -> Batch:
    return Batch.from_sequences(
        [[1]] * number, [[n] for n in range(number)], group_ids=[0] * number, truncated=[False] * number,
        samples=[prompt(n) for n in range(number)],
    )  # fmt: skip


def test_parts_and_rewards_of_a_sum_reach_the_batch_by_name():
    def scored(request) -> RewardResult:
        n = float(request.solution)
        if n == 2:
            return RewardResult(None, error="no")
        return RewardResult(10 * n, {"form": n}, scores={"exact": n + 0.5})

    batch = rows(4)
    scorer = StepScorer(Scorer(FakePool(scored), NumberTokenizer()), fills=[NamedRewards(("exact", "form", "score"))])
    scorer.rate(batch)
    assert batch.extras["named_rewards"].tolist() == [[0.5, 0, 0], [1.5, 1, 10], [0, 0, 0], [3.5, 3, 30]]
    assert batch.trained_mask[:, 0].tolist() == [True, True, False, True]
    assert batch.select(torch.tensor([3, 1])).extras["named_rewards"].tolist() == [[3.5, 3, 30], [1.5, 1, 10]]
    assert Batch.cat([batch.select(slice(0, 1)), batch]).extras["named_rewards"].shape == (5, 3)


def test_a_name_that_no_reward_reports_ends_the_run():
    scorer = StepScorer(
        Scorer(FakePool(lambda request: RewardResult(1.0, {"form": 1.0})), NumberTokenizer()),
        fills=[NamedRewards(("from",))],
    )
    with pytest.raises(RewardError) as caught:
        scorer.rate(rows(2))
    assert str(caught.value) == (
        "algorithm.gdpo_reward_keys=from: a reward reported no such part. Did you mean form? It reported: reward, form."
    )


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["reward.functions={grader: 2, length: {weight: -0.1, max_length: 5}}"], {"grader": 2.0, "length": -0.1}),
        (["reward.functions={grader: 2, exact: 1}", "algorithm.gdpo_reward_keys=[exact,acc]"],
         {"exact": 1.0, "acc": 1.0}),
        (["algorithm.gdpo_reward_keys=[acc,format]", "algorithm.gdpo_reward_weights=[1.0,0.2]"],
         {"acc": 1.0, "format": 0.2}),
    ],
    ids=["functions", "keys", "weights"],
)  # fmt: skip
def test_names_and_weights(words, wanted):
    config = load_config([*REQUIRED, *GDPO, *words])
    assert named_rewards(config) == wanted
    assert build_step.build_advantages(config).estimator.keywords["weights"] == tuple(wanted.values())


def own(x, *, weights):
    """An estimator of the user's own that reads named rewards."""
    return x.response_mask * (x.require("named_rewards", "own") @ torch.tensor(weights))[
        :, None
    ], x.response_mask.float()


def test_an_estimator_of_ones_own_may_ask_for_named_rewards():
    name = f"{__name__}:own"
    words = [*REQUIRED, f"algorithm.adv_estimator={name}"]

    def collector_of(*more):
        sampler, sampling = PromptSampler(2, 2, shuffle=False), SamplingParams(max_tokens=1)
        rollouts = StepRollouts(EchoEngine(), [prompt(0), prompt(1)], sampler, sampling, pad_id=0)
        scorer = Scorer(FakePool(exact), NumberTokenizer())
        config = load_config([*words, *more])
        with ADVANTAGE_ESTIMATORS.temporarily(Entry("own", own, {"needs": ("named_rewards",)})):
            plan = make_plan(config, 2048, ADVANTAGE_ESTIMATORS.get(name).spec)
            return build_step.build_collector(
                config, plan, FakeCluster(), rollouts, scorer, PromptPosition(), device=CPUDevice()
            )

    with pytest.raises(ConfigError) as caught:
        collector_of()
    assert str(caught.value) == (
        f"algorithm.adv_estimator={__name__}:own reads rewards by name, and none is named. Set "
        "algorithm.gdpo_reward_keys, or reward.functions."
    )
    batch = collector_of("algorithm.gdpo_reward_keys=[format]")(1).batch
    assert batch.extras["named_rewards"].tolist() == [[1.0], [1.0]]


def test_a_run_learns_from_two_rewards_each_in_its_group(tmp_path):
    """The score is 0 for every response, so all that is learnt comes from the named rewards."""
    batches: list[Batch] = []
    toy, folder = make_toy(tmp_path / "toy"), tmp_path / "run"
    toy["reward"].write_text(PARTS)
    run_ppo(load_config(toy_overrides(toy, folder, *GDPO, "trainer.total_training_steps=2",
                                      "algorithm.gdpo_reward_keys=[right,digit]",
                                      "algorithm.gdpo_reward_weights=[1.0,0.5]", "trainer.val_before_train=False",
                                      "trainer.test_freq=-1", reward="parts")),
            observers=[lambda step, experience: batches.append(experience.batch)])  # fmt: skip
    assert len(batches) == 2
    for batch in batches:
        assert batch.token_level_scores.eq(0).all() and batch.extras["named_rewards"].shape == (32, 2)
        assert set(batch.extras["named_rewards"][:, 1].tolist()) <= {0.0, 50.0}
        total = torch.zeros(32)
        for k, weight in enumerate((1.0, 0.5)):
            for group in range(8):
                own = batch.extras["named_rewards"][4 * group : 4 * group + 4, k]
                total[4 * group : 4 * group + 4] += weight * (own - own.mean()) / (own.std() + 1e-6)
        wanted = total / (total.std() + 1e-6)
        assert wanted.abs().max() > 0.5
        torch.testing.assert_close(batch.advantages[:, 0], wanted, rtol=1e-4, atol=1e-4)
    metrics = read_metrics(folder / "metrics.jsonl")
    assert metrics[2]["reward/digit"] == pytest.approx(batches[1].extras["named_rewards"][:, 1].mean().item())


def test_the_rewards_of_a_sum_are_named_by_their_functions(tmp_path):
    """`reward.functions` alone says all: names, and weights."""
    batches: list[Batch] = []
    toy, folder = make_toy(tmp_path / "toy"), tmp_path / "run"
    functions = f"reward.functions={{'{toy['reward']}:digit': 1.0, exact: 0.5}}"
    words = toy_overrides(toy, folder, *GDPO, functions, "trainer.total_training_steps=1",
                          "trainer.val_before_train=False", "trainer.test_freq=-1")  # fmt: skip
    config = load_config([word for word in words if not word.startswith("custom_reward_function")])
    run_ppo(config, observers=[lambda step, experience: batches.append(experience.batch)])
    (batch,) = batches
    total = batch.extras["named_rewards"] @ torch.tensor([1.0, 0.5])
    assert batch.extras["named_rewards"].shape == (32, 2)
    torch.testing.assert_close(batch.token_level_scores.sum(1), total)
