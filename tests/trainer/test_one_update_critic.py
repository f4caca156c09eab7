"""A run whose critic has one update a step: the values come from it, and nothing else changes."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.learner.critic import Critic
from steepest.loggers.jsonl import read_metrics
from steepest.trainer import build_step
from steepest.trainer.jobs.ppo import run_ppo
from tests.trainer.toy import make_toy, toy_overrides

RUN = (
    "trainer.total_training_steps=3", "trainer.save_freq=3", "trainer.val_before_train=False", "algorithm.lam=0.9",
    "data.train_batch_size=64", "algorithm.kl_ctrl.kl_coef=0.5", "critic.ppo_mini_batch_size=64",
)  # fmt: skip
NOT_COMPARED = ("timing", "perf/", "memory")


def test_a_run_is_the_one_with_a_pass_for_the_values(tmp_path, monkeypatch, capsys):
    toy = make_toy(tmp_path / "toy")
    passes: list[int] = []
    plain = Critic.values

    def counting(self, batch, cut=None):
        passes.append(len(batch))
        return plain(self, batch, cut)

    monkeypatch.setattr(Critic, "values", counting)

    def run(folder):
        run_ppo(load_config(toy_overrides(toy, folder, *RUN)))
        return read_metrics(folder / "metrics.jsonl"), load_file(folder / "global_step_3/critic/model.safetensors")

    metrics, weights = run(tmp_path / "one")
    assert not passes and "The critic's one update computes the values too" in capsys.readouterr().out
    monkeypatch.setattr(build_step, "critic_of_a_step", lambda config, plan, models: models.critic)
    wanted, other = run(tmp_path / "two")
    assert passes == [64, 64, 64]
    assert metrics.keys() == wanted.keys() == {1, 2, 3}
    for step, expected in wanted.items():
        found = metrics[step]
        assert found.keys() == expected.keys()
        own = {name: value for name, value in expected.items() if not name.startswith(NOT_COMPARED)}
        assert {name: found[name] for name in own} == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert metrics[3]["critic/vf_explained_var"] != metrics[1]["critic/vf_explained_var"]
    assert all(tensor.sub(other[name]).abs().max() < 1e-4 for name, tensor in weights.items())
