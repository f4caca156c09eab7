"""Runs whose model is a file of bf16 numbers: what is frozen is held in bf16, and no number of the run changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steepest.assembly import lora, roles
from steepest.config.load import load_config
from steepest.loggers.rows import read_rows
from steepest.trainer.jobs.ppo import run_ppo
from tests.trainer.toy import make_toy, toy_overrides

RUN = (
    "trainer.total_training_steps=3",
    "trainer.save_freq=3",
    "data.train_batch_size=32",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "algorithm.use_kl_in_reward=True",
    "algorithm.kl_ctrl.kl_coef=0.1",
)
LORA = "actor_rollout_ref.model.lora_rank=4"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    toy = make_toy(tmp_path_factory.mktemp("toy"))
    file = toy["model"] / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return toy


def run(toy, folder: Path, *words: str) -> tuple[list[dict[str, float]], dict[str, bytes]]:
    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *words)))
    rows = read_rows(folder / "metrics.jsonl")
    numbers = [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf/", "time"))} for row in rows]
    files = sorted((folder / "global_step_3").rglob("*.safetensors"))
    return numbers, {f"{f.parent.name}/{k}": t.numpy().tobytes() for f in files for k, t in load_file(f).items()}


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_type=full"),
        (LORA, "critic.share_base=adapter"),
        (LORA, "critic.share_base=head"),
        (LORA, "critic.model.lora_rank=2"),
    ],
    ids=["whole", "exact KL", "adapter", "head", "own adapter"],
)
def test_a_run_is_the_same_to_the_last_bit(toy, tmp_path, monkeypatch, capsys, words):
    found = run(toy, tmp_path / "held", *words)
    assert "float32 over float32 weights, frozen ones in bfloat16" in capsys.readouterr().out
    for module in (lora, roles):
        monkeypatch.setattr(module, "hold_in_bf16", lambda hf, rounding: None)
    want = run(toy, tmp_path / "whole", *words)
    assert "frozen ones in bfloat16" not in capsys.readouterr().out
    assert found == want
    assert len(want[1]) > 20 and any(row.get("actor/reward_kl_penalty", 0) for row in want[0])


def test_it_takes_less_memory(toy, tmp_path):
    from steepest.trainer.run.sizes import sizes

    from steepest.config.plan import make_plan
    from steepest.devices.backends.cpu import CPUDevice
    from steepest.learner.checkpoint import FROM_NOTHING

    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    for words in ((), (LORA, "critic.share_base=head")):
        config = load_config(toy_overrides(toy, tmp_path, *RUN, *words))
        plan = make_plan(config, 256)
        models = roles.build_models(
            config, plan, FROM_NOTHING, {"actor": toy["model"], "critic": toy["model"]}, CPUDevice()
        )
        found = sizes(models)["actor" if words else "reference"]
        weights = (found.parameters - found.trained) * 4 + found.trained * 16
        assert found.halved and found.bytes == weights - 2 * matrices
        assert torch.bfloat16 in {p.dtype for p in models.actor.model.parameters()} or not words
