"""A run whose critic has one update a step: the values come from it, and nothing else changes."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

RUN = (
    "trainer.total_training_steps=3", "trainer.save_freq=3", "trainer.val_before_train=False", "algorithm.lam=0.9",
    "data.train_batch_size=64", "algorithm.kl_ctrl.kl_coef=0.5", "critic.ppo_mini_batch_size=64",
)  # fmt: skip
NOT_COMPARED = ("timing", "perf/", "memory")


BY_PASS = """
from steepest.core.advantages import ADVANTAGE_ESTIMATORS, gae

@ADVANTAGE_ESTIMATORS.register("gae_by_pass", needs=("values",))
def gae_by_pass(x, *, gamma, lam):
    return gae(x, gamma=gamma, lam=lam)
"""
"""GAE that does not say that its returns follow from each row alone, so that the values need a pass before them."""


def work(row: dict[str, float]) -> float:
    """Operations of the critic's passes and updates in a step, over those of the actor's update."""
    seconds = row["timing_s/values"] + row["timing_s/update_critic"]
    return row["perf/mfu/critic"] * seconds / (row["perf/mfu/actor"] * row["timing_s/update_actor"])


def test_a_run_is_the_one_with_a_pass_for_the_values(tmp_path, capsys):
    toy, file = make_toy(tmp_path / "toy"), tmp_path / "by_pass.py"
    file.write_text(BY_PASS)

    def run(folder, *more):
        run_ppo(load_config(toy_overrides(toy, folder, *RUN, *more)))
        return read_metrics(folder / "metrics.jsonl"), load_file(folder / "global_step_3/critic/model.safetensors")

    metrics, weights = run(tmp_path / "one")
    assert "The critic's one update computes the values too" in capsys.readouterr().out
    with ADVANTAGE_ESTIMATORS.temporarily():
        wanted, other = run(
            tmp_path / "two", f"algorithm.adv_estimator={file}:gae_by_pass", "algorithm.use_kl_in_reward=True"
        )
    assert "The critic's one update computes the values too" not in capsys.readouterr().out
    for step, row in wanted.items():  # forward; forward, and backward of twice that: a third more
        assert work(row) / work(metrics[step]) == pytest.approx(4 / 3, rel=1e-3)
    assert metrics.keys() == wanted.keys() == {1, 2, 3}
    for step, expected in wanted.items():
        found = metrics[step]
        assert found.keys() == expected.keys()
        own = {name: value for name, value in expected.items() if not name.startswith(NOT_COMPARED)}
        assert {name: found[name] for name in own} == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert metrics[3]["critic/vf_explained_var"] != metrics[1]["critic/vf_explained_var"]
    assert all(tensor.sub(other[name]).abs().max() < 1e-4 for name, tensor in weights.items())
