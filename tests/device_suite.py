"""What has to hold on any accelerator. tests/npu and tests/gpu run these, each with its own `device`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steepest.config.load import load_config
from steepest.devices import select_device
from steepest.learner.optim import Optimizer, OptimSettings
from steepest.learner.trainable import ComputeSettings
from steepest.models.attention import PackedContext
from steepest.models.causal_lm import CausalLM
from steepest.models.passes import LogProbs
from steepest.models.varlen import VarlenContext, choose_attention
from steepest.process.entry import run_entry
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.main_ppo import main
from tests.support.learner_parts import make_actor, make_batch, policy
from tests.support.toy_run import make_toy, toy_overrides

LENGTHS = (70, 3, 50, 1, 33, 68)
SHORT = (
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "actor_rollout_ref.actor.fsdp_config.dtype=auto",  # the device's own
)
KEY = "actor_rollout_ref.model.override_config.attn_implementation"


def fused(device: str, dtype: torch.dtype = torch.bfloat16):
    """The device's own attention; skips where it has none."""
    found = choose_attention(None, select_device(device), dtype, KEY)
    if found.kernel is None:
        pytest.skip(f"{device}: {found.why}")
    return found


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["all heads", "grouped"])
@pytest.mark.parametrize("size", [64, 128])
def test_the_fused_attention_equals_plain_attention(device: str, heads: tuple[int, int], size: int) -> None:
    """Against float32 on the CPU: not further away than plain attention in bfloat16 on the same device."""
    attention = fused(device)
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(n, sum(LENGTHS), size, generator=generator).bfloat16() for n in (heads[0], heads[1], heads[1])]
    weight = torch.randn(sum(LENGTHS), heads[0], size, generator=generator).bfloat16()

    def run(context: PackedContext | VarlenContext, place: str, dtype: torch.dtype) -> list[torch.Tensor]:
        parts = [x.to(place, dtype).requires_grad_() for x in made]
        out = context.attend(0, *parts, None)
        gradients = torch.autograd.grad((out * weight.to(place, dtype)).sum(), parts)
        return [x.detach().float().cpu() for x in (out, *gradients)]

    exact = run(PackedContext(LENGTHS), "cpu", torch.float32)
    plain = run(PackedContext(LENGTHS, device), device, torch.bfloat16)
    found = run(VarlenContext(LENGTHS, device, attention.kernel), device, torch.bfloat16)
    for name, want, usual, got in zip(("out", "query", "key", "value"), exact, plain, found, strict=True):
        unit = want.abs().max()
        assert (got - want).abs().max() <= 2 * (usual - want).abs().max() + 0.01 * unit, name


def test_log_probs_with_it_are_those_of_plain_attention(device: str) -> None:
    attention, batch, found = fused(device), make_batch(), []
    for chosen in (attention, choose_attention("sdpa", select_device(device), torch.bfloat16, KEY)):
        actor = make_actor(compute=ComputeSettings(device=device, dtype="bfloat16", attention=chosen))
        assert actor.model.attention is chosen
        found.append(actor.log_probs(batch)[0])
    exact = make_actor().log_probs(batch)[0]
    assert 0 < (found[0] - exact).abs().max() < 0.05 and (found[1] - exact).abs().max() < 0.05


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_toy(tmp_path_factory.mktemp("small"), num_rows=256)


def run(toy: dict[str, Path], folder: Path, device: str, *more: str) -> list[dict[str, float]]:
    run_ppo(load_config(toy_overrides(toy, folder, *SHORT, f"trainer.device={device}", *more)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_in_bfloat16_says_its_attention_and_its_memory(
    device: str, small: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = select_device(device)
    rows = run(small, tmp_path, device)
    name, why = chosen.attention_implementation()
    said = capsys.readouterr().out
    assert f"  attention   {name}, on packed sequences ({why})\n" in said and "  compute     bfloat16" in said
    for row in rows:
        assert (
            0 < row["perf/max_memory_gb"] == row["perf/max_memory_allocated_gb"] <= row["perf/max_memory_reserved_gb"]
        )
        assert row["perf/max_memory_reserved_gb"] < chosen.memory().total / 2**30
        assert row["actor/ratio_max_dev_first"] < 0.05 and 0 < row["actor/grad_norm"] < 100
    assert rows[0]["perf/max_memory_gb"] <= rows[1]["perf/max_memory_gb"]  # never set back


def test_plain_attention_can_be_asked_for(
    device: str, small: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [KEY, KEY.replace("actor_rollout_ref", "critic")]
    run(small, tmp_path, device, *(f"+{key}=sdpa" for key in keys))
    assert f"actor sdpa, on packed sequences (asked for by {KEY})" in capsys.readouterr().out


def test_too_large_a_pass_ends_in_words_and_the_next_start_goes_on(
    device: str,
    small: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = select_device(device).memory().total
    forward, updates = CausalLM.forward, [0]

    def full(self: CausalLM, request: LogProbs) -> object:
        updates[0] += torch.is_grad_enabled()
        if updates[0] == 3:  # two updates a step
            torch.empty(2 * total, dtype=torch.uint8, device=device)
        return forward(self, request)

    argv = toy_overrides(small, tmp_path, *SHORT, f"trainer.device={device}")
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", full)
        assert run_entry(main, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: actor update: a micro-batch of 64 sequence(s), ") and "Traceback" not in said
    assert f": out of memory on {device}, " in said and " more were asked for (" in said
    assert "Lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu below" in said
    assert run_entry(main, argv) == 0
    assert "resuming from step 1" in capsys.readouterr().out


def test_adamw_takes_the_cpus_steps(device: str) -> None:
    """Whatever kernels the device's AdamW has; its state moves to the CPU and back."""

    def steps(place: str) -> list[torch.Tensor]:
        model = policy().to(place)
        optimizer = Optimizer(model.named_parameters(), OptimSettings(lr=1e-2))
        for step in range(3):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(place)
            optimizer.step()
            saved = {name: tensor.cpu() for name, tensor in optimizer.tensors().items()}
            optimizer.load(saved, optimizer.numbers())
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for mine, theirs in zip(steps(device), steps("cpu"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
