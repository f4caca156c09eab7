"""The reference command on a real model and real problems: SmolLM2-135M-Instruct on GSM8K, a few steps on the CPU."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

pytestmark = [pytest.mark.real, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def command(data: Path, model: Path, folder: Path) -> list[str]:
    """The reference command with what makes it small: verl's keys, only module, device, engine and sizes changed."""
    overrides = f"""
        data.train_files={data}/train.parquet data.val_files={data}/test.parquet
        data.train_batch_size=8 data.max_prompt_length=512 data.max_response_length=64
        actor_rollout_ref.model.path={model} actor_rollout_ref.actor.optim.lr=1e-6
        actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4
        actor_rollout_ref.rollout.name=builtin actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8
        actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.gpu_memory_utilization=0.4
        actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 critic.optim.lr=1e-5
        critic.model.path={model} critic.ppo_micro_batch_size_per_gpu=4 algorithm.kl_ctrl.kl_coef=0.001
        trainer.logger=console trainer.val_before_train=False trainer.n_gpus_per_node=1 trainer.nnodes=1
        trainer.save_freq=2 trainer.test_freq=3 trainer.total_epochs=15 trainer.device=cpu
        trainer.total_training_steps=3 data.val_max_samples=16 trainer.default_local_dir={folder}
    """
    return [sys.executable, "-m", "steepest.trainer.main_ppo", *overrides.split()]


@pytest.fixture(scope="module")
def finished(data, smollm2, tmp_path_factory) -> tuple[Path, str, float]:
    """Run folder, output and seconds of a run that nobody stopped."""
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    done = subprocess.run(command(data, smollm2, folder), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, time.monotonic() - began


def values(line: str) -> dict[str, float]:
    """`step:1 - a:0.5 - b:2` -> {"step": 1, "a": 0.5, "b": 2}."""
    return {name: float(value) for name, _, value in (part.rpartition(":") for part in line.split(" - "))}


def test_three_step_lines_and_a_validation_line(finished):
    _, output, _ = finished
    lines = [values(line) for line in output.splitlines() if re.match(r"step:\d+ - ", line)]
    steps = [line for line in lines if "actor/pg_loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    (validation,) = [line for line in lines if "val-core/openai/gsm8k/acc/mean@1" in line]
    assert validation["step"] == 3 and validation["val-aux/num_prompts"] == 16
    first = steps[0]
    assert first["critic/values/max"] == first["critic/values/min"] == 0.0, "the first values are 0"
    assert first["actor/reward_kl_penalty"] == 0.0, "actor and reference start equal"
    assert first["actor/reward_kl_penalty_coeff"] == 0.001, "the KL penalty is on, as the command says"
    # bfloat16, the default where the processor has its instructions, rounds two passes and two programs apart
    half = "bfloat16 over float32 weights" in output
    deviation, largest_kl, largest_ratio = (0.2, 1e-2, 3.0) if half else (1e-3, 1e-6, 1.01)
    for line in steps:
        assert line["actor/ratio_max_dev_first"] < deviation
        assert line["mismatch/k3_kl"] < largest_kl and line["mismatch/max_ratio"] < largest_ratio
        assert line["timing_s/step"] > 0 and line["perf/throughput"] > 0
    assert steps[1]["actor/lr"] == 1e-6 and steps[1]["critic/lr"] == 1e-5


def test_the_checkpoint_loads_as_it_lies(finished, smollm2):
    folder = finished[0] / "global_step_3"
    actor = AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        moved = max(float((a - b).abs().max()) for a, b in zip(actor.parameters(), start.parameters(), strict=True))
    assert 0 < moved < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(folder / "actor")
    assert tokenizer.chat_template and tokenizer("2 + 2")["input_ids"]
    critic = AutoModelForTokenClassification.from_pretrained(folder / "critic", dtype=torch.float32)
    assert (
        critic.score.weight.shape == (1, actor.config.hidden_size)
        and float(critic.score.weight.detach().abs().max()) > 0
    )


def test_killed_at_a_random_moment_and_started_again(finished, data, smollm2, tmp_path):
    folder, whole_seconds = tmp_path / "run", finished[2]
    process = subprocess.Popen(command(data, smollm2, folder), cwd=ROOT, stdout=subprocess.DEVNULL)
    time.sleep(random.uniform(0.2, 0.9) * whole_seconds)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command(data, smollm2, folder), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "nothing to do" in done.stderr, done.stderr
    for name in ("actor", "critic"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            ours = load_file(folder / "global_step_3" / name / file)
            theirs = load_file(finished[0] / "global_step_3" / name / file)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), f"{name}/{file}"
