"""Which device a run takes, and what is said when the card cannot be seen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steepest.devices import select_device
from steepest.errors import render
from tests.support.toy_run import make_toy, toy_overrides

pytestmark = pytest.mark.npu


def test_unset_takes_the_card_and_says_why() -> None:
    device = select_device()
    assert device.name == "npu" and device.torch_device().type == "npu"
    assert render(device.chosen_because).startswith("device is unset: the best device present; no cuda: ")
    assert f"{device.hardware()} has bf16 arithmetic" in device.describe()


def test_memory_is_the_cards_and_its_peak_grows_with_use() -> None:
    import torch

    device = select_device("npu")
    before = device.memory()
    held = torch.ones(50_000_000, device="npu")
    assert device.memory().peak >= before.peak and device.memory().peak >= held.numel() * 4
    assert device.memory().total == before.total >= device.memory().available + held.numel() * 4


def run(overrides: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "steepest.trainer.main_ppo", *overrides]
    return subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)


def test_the_command_without_a_device_runs_on_the_card(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", num_rows=32)
    words = [*toy_overrides(toy, tmp_path / "run"), "data.train_batch_size=16", "trainer.total_training_steps=1"]
    words += ["actor_rollout_ref.actor.ppo_mini_batch_size=16", "trainer.val_before_train=False"]
    done = run([word for word in words if not word.startswith("trainer.device=")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "  device      npu (" in done.stdout and "trainer.device is unset" in done.stdout


def test_hidden_cards_are_told_apart_from_missing_ones(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", num_rows=32)
    words = [*toy_overrides(toy, tmp_path / "run"), "trainer.device=npu"]
    done = run(words, ASCEND_RT_VISIBLE_DEVICES="")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "trainer.device=npu: ASCEND_RT_VISIBLE_DEVICES='' hides every card; unset it" in done.stderr
    assert not (tmp_path / "run").exists()
