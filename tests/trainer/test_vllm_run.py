"""Whole runs with rollout.name=vllm: it learns, it agrees with the trainer, a resumed run ends the same."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides
from tests.trainer.test_real import ROOT, command, values

pytestmark = pytest.mark.vllm
ENGINE = "actor_rollout_ref.rollout.name=vllm"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    return make_toy(tmp_path_factory.mktemp("toy"), hidden_size=128)  # vLLM's CPU attention wants heads of 32


def run(toy: dict[str, Path], folder: Path, *more: str):
    rates = ("actor_rollout_ref.actor.optim.lr=1e-3", "critic.optim.lr=1e-3")
    return run_ppo(load_config(toy_overrides(toy, folder, ENGINE, *rates, *more)))


def test_ppo_learns_and_both_engines_speak_of_one_policy(toy, tmp_path):
    result = run(toy, tmp_path, "trainer.total_training_steps=30", "trainer.test_freq=30")
    assert result.history[0] < 0.3 and result.history[30] > 0.75
    rows = read_metrics(tmp_path / "metrics.jsonl")
    trained = [rows[step] for step in range(1, 31)]
    assert max(abs(row["mismatch/k3_kl"]) for row in trained) < 1e-6
    assert max(row["mismatch/max_ratio"] for row in trained) < 1.001
    assert min(row["actor/grad_norm"] for row in trained[:5]) > 1e-3


def test_a_resumed_run_ends_with_the_same_weights(toy, tmp_path):
    steps = ["trainer.save_freq=2", "trainer.val_before_train=False"]
    run(toy, tmp_path / "whole", *steps, "trainer.total_training_steps=4")
    run(toy, tmp_path / "parts", *steps, "trainer.total_training_steps=2")
    run(toy, tmp_path / "parts", *steps, "trainer.total_training_steps=4")
    for part in ("actor", "critic"):
        files = [tmp_path / name / "global_step_4" / part / "model.safetensors" for name in ("whole", "parts")]
        one, other = map(load_file, files)
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.real
@pytest.mark.slow
def test_the_reference_command_with_vllm(data, smollm2, tmp_path):
    words = [w.replace("rollout.name=builtin", "rollout.name=vllm") for w in command(data, smollm2, tmp_path / "run")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vLLM has no sleep mode on the CPU" in done.stdout
    lines = [values(line) for line in done.stdout.splitlines() if re.match(r"step:\d+ - ", line)]
    steps = [line for line in lines if "actor/pg_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    in_float32 = "float32 over float32" in done.stdout
    for line in steps:
        assert line["mismatch/k3_kl"] < (1e-6 if in_float32 else 0.02)
        assert line["mismatch/ess"] > (0.9999 if in_float32 else 0.9)


def test_an_adapter_reaches_vllm_merged(toy, tmp_path):
    """vLLM's weights are compared with the merged ones bit for bit at every update, or the run ends."""
    folder, lora = tmp_path / "run", ("actor_rollout_ref.model.lora_rank=8", "critic.share_base=head")
    rates = ("actor_rollout_ref.actor.optim.lr=5e-3", "critic.optim.lr=5e-3")
    done = run(toy, folder, *lora, *rates, "trainer.total_training_steps=20", "trainer.test_freq=20")
    assert done.history[20] > done.history[0] + 0.3
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(rows[step]["mismatch/mean_abs_diff"] < 1e-3 for step in range(1, 21))
