"""Every script of examples/ is parsed and dry-run: bash reads it, and its command's configuration is accepted."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manual import ROOT, Shell

SCRIPTS = sorted((ROOT / "examples").glob("*.sh"))
WANTED = {f"{job}_gsm8k_{device}" for job in ("ppo", "grpo") for device in ("npu", "cuda", "cpu")}


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def configuration(shell: Shell, script: Path, *words: str, **variables: str) -> dict[str, Any]:
    done = shell.run(f"bash examples/{script.name} {' '.join(words)} --cfg job", **variables)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    found: dict[str, Any] = yaml.safe_load(done.stdout)
    return found


def test_there_is_one_script_a_job_and_device() -> None:
    assert {script.stem for script in SCRIPTS} == WANTED


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_bash_reads_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in text
    assert f"bash examples/{script.name} [key=value ...]" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_scripts_command_is_accepted_without_a_warning(script: Path, shell: Shell) -> None:
    config = configuration(shell, script)
    job, _, device = script.stem.split("_")
    model, rollout = config["actor_rollout_ref"]["model"], config["actor_rollout_ref"]["rollout"]
    assert config["trainer"]["device"] == device
    assert config["trainer"]["experiment_name"] == script.stem, "jobs do not share a run folder"
    assert config["trainer"]["max_actor_ckpt_to_keep"] in (1, 2)
    assert model["path"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert rollout["name"] == ("builtin" if device == "cpu" else "vllm")
    assert config["data"]["train_files"] == [f"{shell.home}/data/gsm8k/train.parquet"]
    assert config["algorithm"]["adv_estimator"] == {"ppo": "gae", "grpo": "grpo"}[job]
    if job == "ppo":
        assert config["critic"]["model"]["path"] == model["path"] and config["algorithm"]["use_kl_in_reward"] is True
    else:
        assert rollout["n"] > 1 and config["actor_rollout_ref"]["actor"]["use_kl_loss"] is True


def test_what_the_user_adds_wins_and_the_variables_are_read(shell: Shell) -> None:
    script = ROOT / "examples" / "ppo_gsm8k_cpu.sh"
    words = ("trainer.total_training_steps=7", "actor_rollout_ref.rollout.seed=3")
    config = configuration(shell, script, *words, MODEL="some/model", DATA="/a folder")
    assert config["trainer"]["total_training_steps"] == 7
    assert config["actor_rollout_ref"]["rollout"]["seed"] == 3
    assert config["actor_rollout_ref"]["model"]["path"] == config["critic"]["model"]["path"] == "some/model"
    assert config["data"]["val_files"] == ["/a folder/test.parquet"]
