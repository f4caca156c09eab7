"""The jobs on the device: their numbers are the CPU's, and a run that was cut goes on bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from safetensors.torch import load_file
from torch import Tensor

from steepest.learner.trainable import ComputeSettings
from steepest.loggers.rows import dumps
from tests.npu.jobs import GRPO, ON_STAND_IN, Row, differences, make_task, needs_stand_in, ppo, sft
from tests.support.learner_parts import make_actor, make_batch
from tests.trainer.run.test_resume import STATEFUL, metrics, weights

pytestmark = pytest.mark.npu


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_task(tmp_path_factory.mktemp("toy"))


def assert_equal(found: Sequence[Row], want: Sequence[Row], names: set[str]) -> None:
    """Every metric of both runs within the tolerance, and `names` among them, not all zero."""
    assert names <= {name for row in want for name in row}, "the run logs none of what is to be compared"
    assert all(any(row.get(name) for row in want) for name in names), "there is nothing to compare"
    wrong = {name: ratio for name, ratio in differences(found, want).items() if not ratio <= 1}
    assert not wrong, f"times the tolerance: {wrong}"


def test_ppo_computes_the_cpus_numbers(toy: dict[str, Path], tmp_path: Path, device: str) -> None:
    words = ("trainer.total_training_steps=3", "trainer.test_freq=3", "actor_rollout_ref.actor.entropy_coeff=0.01")
    found, want = (ppo(toy, tmp_path / place, place, *words) for place in (device, "cpu"))
    assert [row["step"] for row in want] == [0, 1, 2, 3, 3]
    names = ["pg_loss", "grad_norm", "entropy", "ppo_kl", "reward_kl_penalty"]
    names = [f"actor/{name}" for name in names] + ["critic/vf_loss", "critic/grad_norm", "critic/rewards/mean"]
    assert_equal(
        found, want, {*names, "critic/values/mean", "critic/vpred_mean", "response_length/mean", "val/accuracy"}
    )


def test_grpo_with_the_kl_in_the_loss_computes_the_cpus_numbers(
    toy: dict[str, Path], tmp_path: Path, device: str
) -> None:
    kl = ("actor_rollout_ref.actor.use_kl_loss=True", "actor_rollout_ref.actor.kl_loss_coef=0.1")
    words = (*GRPO, *kl, "trainer.total_training_steps=3")
    found, want = (ppo(toy, tmp_path / place, place, *words) for place in (device, "cpu"))
    assert_equal(found, want, {"actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "critic/advantages/max"})
    assert not [name for name in want[1] if name.startswith("critic/vf")]


def test_the_options_of_an_update_and_of_sampling_compute_the_cpus_numbers(
    toy: dict[str, Path], tmp_path: Path, device: str
) -> None:
    words = (
        "trainer.total_training_steps=2",
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.rollout.max_num_seqs=8",  # rows are moved between slots
        "actor_rollout_ref.actor.ppo_epochs=2",
        "actor_rollout_ref.actor.shuffle=True",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=3",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "critic.model.enable_gradient_checkpointing=True",
        "critic.ppo_micro_batch_size_per_gpu=5",
        "actor_rollout_ref.rollout.val_kwargs.top_k=5",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1",
        "actor_rollout_ref.rollout.val_kwargs.n=2",
        "trainer.test_freq=2",
    )
    found, want = (ppo(toy, tmp_path / place, place, *words) for place in (device, "cpu"))
    assert_equal(found, want, {"actor/pg_loss", "critic/vf_loss", "val-core/toy/acc/best@2"})


def test_sft_computes_the_cpus_numbers(toy: dict[str, Path], tmp_path: Path, device: str) -> None:
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"say {i % 10}", "response": f" {i % 10}"} for i in range(64)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ("trainer.total_training_steps=4",)
    found, want = (sft(toy, rows, tmp_path / place, place, *words) for place in (device, "cpu"))
    assert_equal(found, want, {"train/loss", "train/grad_norm", "val/loss"})
    # the model that was trained on the device is saved for any machine
    mine, theirs = (load_file(tmp_path / d / "global_step_4" / "actor" / "model.safetensors") for d in (device, "cpu"))
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < (1e-4 if ON_STAND_IN else 1e-2)


def test_resume_on_the_device_equals_no_resume(
    toy: dict[str, Path], tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ppo(toy, tmp_path / "whole", device, *STATEFUL)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"global_step_{step}")
    ppo(toy, tmp_path / "cut", device, *STATEFUL)
    assert "resuming from step 2" in capsys.readouterr().out
    if not ON_STAND_IN:  # a card's sums may come in another order
        cut, whole = (metrics(tmp_path / name) for name in ("cut", "whole"))
        assert [row["step"] for row in cut] == [row["step"] for row in whole]
        assert_equal(*([row for row in rows if row["step"] == 3] for rows in (cut, whole)), {"actor/pg_loss"})
        return
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert [dumps(row) for row in metrics(tmp_path / "cut")] == [dumps(row) for row in metrics(tmp_path / "whole")]


def test_the_random_states_of_the_device_are_in_the_checkpoint_and_come_back(
    toy: dict[str, Path], tmp_path: Path, device: str
) -> None:
    import torch

    from steepest.devices import select_device
    from steepest.learner.rng import rng_state, set_rng_state

    ppo(toy, tmp_path / "run", device, "trainer.total_training_steps=1", "trainer.save_freq=1")
    saved = json.loads((tmp_path / "run" / "global_step_1" / "trainer_state.json").read_text())["random"]
    chosen = select_device(device)
    cards = [f"{device}:{i}" for i in range(chosen.count())]
    assert sorted(saved["torch"]) == sorted(["cpu", *cards])
    state = rng_state(chosen)
    first = torch.randn(4, device=device)
    set_rng_state(json.loads(json.dumps(state)), chosen)
    assert torch.equal(torch.randn(4, device=device), first)


def test_a_checkpoint_of_the_device_goes_on_on_the_cpu(toy: dict[str, Path], tmp_path: Path, device: str) -> None:
    words = ("trainer.save_freq=2", "trainer.test_freq=-1", "trainer.val_before_train=False")
    ppo(toy, tmp_path / "moved", device, *words, "trainer.total_training_steps=2")
    moved = ppo(toy, tmp_path / "moved", "cpu", *words, "trainer.total_training_steps=4")
    whole = ppo(toy, tmp_path / "whole", "cpu", *words, "trainer.total_training_steps=4")
    assert [row["step"] for row in moved] == [1, 2, 3, 4]
    wrong = {name: ratio for name, ratio in differences(moved, whole).items() if not ratio <= 1}
    assert not wrong, f"times the tolerance: {wrong}"


def test_a_pass_in_bfloat16_rounds_as_on_the_cpu_and_one_in_float32_does_not(device: str) -> None:
    batch = make_batch()

    def log_probs(place: str, dtype: Literal["float32", "bfloat16"]) -> Tensor:
        return make_actor(compute=ComputeSettings(device=place, dtype=dtype)).log_probs(batch)[0]

    exact, low, low_on_cpu = log_probs("cpu", "float32"), log_probs(device, "bfloat16"), log_probs("cpu", "bfloat16")
    rounding = float((low_on_cpu - exact).abs().mean())
    assert float((log_probs(device, "float32") - exact).abs().mean()) < rounding / 4
    assert rounding / 2 < float((low - exact).abs().mean()) < rounding * 2


@needs_stand_in
def test_the_default_precision_of_the_device_trains_and_keeps_float32_weights(
    toy: dict[str, Path], tmp_path: Path, device: str
) -> None:
    auto = ("actor_rollout_ref.actor.fsdp_config.dtype=auto", "critic.fsdp.dtype=auto")
    words = ("trainer.total_training_steps=2", "trainer.save_freq=2", "actor_rollout_ref.rollout.dtype=auto")
    low = ppo(toy, tmp_path / "low", device, *auto, *words)
    want = ppo(toy, tmp_path / "cpu", "cpu", "trainer.total_training_steps=2")
    by_name = {row["step"]: row for row in low}[1]
    assert by_name["critic/score/mean"] == pytest.approx({r["step"]: r for r in want}[1]["critic/score/mean"], abs=0.1)
    assert 1e-6 < by_name["mismatch/mean_abs_diff"] < 0.05  # bf16 against bf16: not equal, not far
    saved = load_file(tmp_path / "low" / "global_step_2" / "actor" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"torch.float32"}
