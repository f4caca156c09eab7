"""Each advantage estimator without a critic in a real run: what reaches the update."""

from __future__ import annotations

import pytest
import torch

from steepest.config.algorithms import ESTIMATORS, EstimatorSpec, same
from steepest.config.load import load_config
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.loggers.jsonl import read_metrics
from steepest.registry import Entry
from steepest.trainer import build_step
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

RUN = (
    "trainer.total_training_steps=1", "trainer.test_freq=-1", "trainer.val_before_train=False",
    "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16", "data.max_response_length=4",
    "actor_rollout_ref.rollout.n=3",
    "algorithm.kl_ctrl.kl_coef=0", "trainer.logger=[jsonl]",
)  # fmt: skip
OF_ROWS = ("grpo_passk", "rloo", "opo", "gpg")
WHITENED = ("reinforce_plus_plus", "reinforce_plus_plus_baseline")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def config(toy, folder, *more: str):
    return load_config(toy_overrides(toy, folder, *RUN, *more))


def batches_of(config) -> list[Batch]:
    """The batches that a run has learnt from."""
    batches: list[Batch] = []
    run_ppo(config, observers=[lambda step, experience: batches.append(experience.batch)])
    return batches


def paid_by_length(folder) -> str:
    """The setting of a reward that every response gets some of."""
    file = folder / "reward.py"
    file.write_text("def digit(data_source, solution_str, ground_truth, extra_info):\n    return len(solution_str)\n")
    return f"custom_reward_function.path={file}"


@pytest.mark.parametrize("name", [*OF_ROWS, *WHITENED, "optimal_token_baseline"])
def test_a_step_of_a_run(toy, tmp_path, name, capsys):
    words = (paid_by_length(tmp_path), f"algorithm.adv_estimator={name}")
    (batch,) = batches_of(config(toy, tmp_path / "run", *words))
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl").values()
    assert "critic/vf_loss" not in row and row["actor/grad_norm"] > 0
    mask, advantages = batch.response_mask, batch.advantages
    assert advantages[mask].any() and not advantages[~mask].any()
    if name in WHITENED:
        assert float(advantages[mask].mean()) == pytest.approx(0, abs=1e-5)
        assert float(advantages[mask].var()) == pytest.approx(1, abs=1e-4)
    if name in OF_ROWS:  # one number a response
        per_row = [line[kept].unique() for line, kept in zip(advantages, mask, strict=True)]
        assert all(len(numbers) == 1 for numbers in per_row)
    told = "algorithm.adv_estimator=optimal_token_baseline reads them" in capsys.readouterr().out
    assert told == (name == "optimal_token_baseline") == ("sum_pi_squared" in batch.extras)
    if told:
        # a sum of squared probabilities is at most 1 and at least the drawn token's own
        squares, own = batch.extras["sum_pi_squared"][mask], batch.old_log_probs[mask].exp() ** 2
        assert bool((squares <= 1 + 1e-5).all()) and bool((squares >= own - 1e-5).all())


@pytest.mark.parametrize("name", ["grpo", "rloo", "gae", *WHITENED])
def test_whitening_is_the_estimator_s_to_say(toy, tmp_path, name):
    made = build_step.build_advantages(config(toy, tmp_path, f"algorithm.adv_estimator={name}"))
    assert made.whitened == (name in (*WHITENED, "gae"))


def test_an_estimator_of_ones_own_is_whitened_where_it_reads_values_or_says_so(toy, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from steepest.core.advantages import ADVANTAGE_ESTIMATORS\n"
        "@ADVANTAGE_ESTIMATORS.register('own_values', needs=('values',))\n"
        "def of_values(x): ...\n"
        "@ADVANTAGE_ESTIMATORS.register('own_says_no', needs=('values',), whitened=False)\n"
        "def says_no(x): ...\n"
        "def plain(x): ...\n"
    )
    with ADVANTAGE_ESTIMATORS.temporarily():
        for function, want in (("of_values", True), ("says_no", False), ("plain", False)):
            run = config(toy, tmp_path / "run", f"algorithm.adv_estimator={file}:{function}")
            made = build_step.build_advantages(run)
            assert made.whitened is want


def above_the_value(x, *, gamma: float):
    """The reward to go less the value: a second estimator that reads values."""
    values = x.require("values", "second")
    rewards = torch.where(x.response_mask, x.token_level_rewards, 0.0)
    returns = torch.where(x.response_mask, gamma * rewards.flip(1).cumsum(1).flip(1), 0.0)
    return torch.where(x.response_mask, returns - values, 0.0), returns


OWN = """
import torch
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from tests.trainer.test_estimators import above_the_value

@ADVANTAGE_ESTIMATORS.register("second", needs=("values",), by_row=True)
def second(x, *, gamma):
    return above_the_value(x, gamma=gamma)
"""


@pytest.mark.parametrize(
    ("way", "batch"), [("built-in", 8), ("built-in", 16), ("file", 16), ("file, critic.enable=True", 8)]
)
def test_a_second_estimator_that_reads_values_trains_with_a_critic(toy, tmp_path, way, batch, capsys):
    """Nobody says critic.enable: that it needs values follows from its statement, as gae's need does."""
    file, name = tmp_path / "own.py", "second"
    file.write_text(OWN)
    spec = EstimatorSpec("second", options=same("gamma"), needs=("values",), by_row=True)
    built_in, entries = (spec,), (Entry("second", above_the_value),)
    if way != "built-in":
        name, built_in, entries = f"{file}:second", (), ()
    words = [
        paid_by_length(tmp_path),
        "trainer.total_training_steps=2",
        f"critic.ppo_mini_batch_size={batch}",
        "algorithm.gamma=0.5",
    ]
    words += ["critic.enable=True"] if way.endswith("critic.enable=True") else []
    with ESTIMATORS.temporarily(*built_in), ADVANTAGE_ESTIMATORS.temporarily(*entries):
        seen = batches_of(config(toy, tmp_path / "run", f"algorithm.adv_estimator={name}", *words))
    told = capsys.readouterr().out
    assert ("The critic's one update computes the values too" in told) == (batch == 16)
    assert "algorithm.gamma has no effect" not in told and "this run has no critic" not in told
    first, last = read_metrics(tmp_path / "run" / "metrics.jsonl").values()
    assert first["critic/grad_norm"] > 0 and last["actor/grad_norm"] > 0 and "actor/reward_kl_penalty" not in last
    assert not seen[0].values.any() and seen[1].values[seen[1].response_mask].all(), "the value head starts at 0"
    for one in seen:
        mask, rewards = one.response_mask, one.token_level_rewards
        assert torch.equal(one.returns.max(1).values, 0.5 * rewards.sum(1))
        assert float(one.advantages[mask].var()) == pytest.approx(1, abs=1e-4), "values are whitened"


def test_the_estimator_is_given_the_batch_s_own_fields():
    """Weights of rollout correction and log-probs of the actor, not of the engine, reach the token baseline."""
    batch = Batch.from_sequences(
        [[1], [1]], [[2, 3], [4]], group_ids=[0, 0], truncated=[False, False],
        rollout_log_probs=[[0.0, 0.0], [-9.0]],
    )  # fmt: skip
    batch.token_level_rewards = torch.tensor([[0.0, 5.0], [0.0, 0.0]])
    half = torch.full((2, 2), 0.5).log()  # 1 - 2 pi is 0: the weight of a token is its sum of squares
    batch.old_log_probs, batch.extras["sum_pi_squared"] = half, torch.ones(2, 2)
    estimate = Advantages(ADVANTAGE_ESTIMATORS.get("optimal_token_baseline").value, whitened=False)
    # first place: weights 1 and 1, b = 5 / 2; the second place is of one row alone
    estimate(batch)
    assert batch.advantages.tolist() == [[2.5, 5.0], [-2.5, 0.0]]
    # rho 1 and 2: weights 1 and 4, b = 5 / 5
    batch.rollout_is_weights = torch.tensor([[1.0, 1.0], [2.0, 0.0]])
    estimate(batch)
    assert batch.advantages.tolist() == [[4.0, 5.0], [-1.0, 0.0]]
