"""The device itself: it computes what the CPU computes, and refuses what a card refuses. True of a real card too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.npu.jobs import ON_STAND_IN, RELATIVE, needs_stand_in

pytestmark = pytest.mark.npu


def tiny(attention: str = "sdpa", *, tied: bool = False) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
    )


def train(
    device: str, *, attention: str = "sdpa", bf16: bool = False, mask_on: str | None = None
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of three steps of AdamW."""
    model = tiny(attention).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    for _ in range(3):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        log_p = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        mask = torch.ones(log_p.shape, device=mask_on or device)
        loss = -(log_p * mask).sum() / mask.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    assert {p.device.type for p in model.parameters()} == {device}
    return found


def test_training_computes_what_the_cpu_computes() -> None:
    assert train("npu") == [pytest.approx(pair, rel=RELATIVE) for pair in train("cpu")]


def test_autocast_computes_in_bfloat16() -> None:
    low = train("npu", bf16=True)
    assert low != train("npu")
    assert low == [pytest.approx(pair, rel=2e-2) for pair in train("cpu", bf16=True)]


def test_flash_attention_2_of_transformers_is_the_fused_attention_of_the_npu() -> None:
    fused = train("npu", attention="flash_attention_2", bf16=True)
    assert fused == [pytest.approx(pair, rel=2e-2) for pair in train("npu", bf16=True)]


def test_tied_weights_stay_tied_on_the_way_to_the_device() -> None:
    model = tiny(tied=True).to("npu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.device.type == "npu"


def test_a_mask_left_on_the_cpu_is_invisible_there_and_raises_here() -> None:
    train("cpu", mask_on="cpu")
    with pytest.raises(RuntimeError, match="same device"):
        train("npu", mask_on="cpu")


MIXED: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda x: x + torch.ones(3, 4),
    "cat": lambda x: torch.cat([x, torch.ones(1, 4)]),
    "stack": lambda x: torch.stack([x, torch.ones(3, 4)]),
    "matmul": lambda x: x @ torch.ones(4, 2),
    "linear": lambda x: torch.nn.functional.linear(x, torch.ones(5, 4)),
    "embedding": lambda x: torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), x),
    "cross_entropy": lambda x: torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 2])),
    "gather": lambda x: x.gather(1, torch.zeros(3, 1, dtype=torch.long)),
    "masked_fill": lambda x: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0.0),
    "where": lambda x: torch.where(torch.ones(3, 4, dtype=torch.bool), x, x),
    "into_cpu": lambda x: torch.ones(3, 4).add_(x),
    "index_cpu_by_npu": lambda x: torch.ones(3, 4)[torch.tensor([0]).to("npu")],
    "scatter": lambda x: x.clone().scatter_(1, torch.zeros(3, 1, dtype=torch.long), 1.0),
    "attention": lambda x: torch.nn.functional.scaled_dot_product_attention(x[None], x[None], torch.ones(1, 3, 4)),
    "cpu_generator": lambda x: torch.multinomial(x, 1, generator=torch.Generator()),
    "numpy": lambda x: x.numpy(),
    "foreach": lambda x: torch._foreach_add([x], [torch.ones(3, 4)]),
    "out": lambda x: torch.mm(x, x.t(), out=torch.empty(3, 3)),
    "module": lambda x: torch.nn.LayerNorm(4)(x),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_mix_of_devices_raises(name: str) -> None:
    x = torch.arange(12.0, device="npu").view(3, 4)
    with pytest.raises((RuntimeError, TypeError)):
        MIXED[name](x)


def test_a_mix_of_two_cards_raises() -> None:
    if torch.npu.device_count() < 2:
        pytest.skip("one card only")
    with pytest.raises(RuntimeError):
        torch.ones(3, device="npu:0") + torch.ones(3, device="npu:1")


ALLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "number": lambda x: x + 2,
    "cpu_number": lambda x: x * torch.tensor(2.0),
    "cpu_index": lambda x: x[torch.tensor([0, 1])],
    "copy": lambda x: torch.empty(3, 4, device="npu").copy_(torch.ones(3, 4)),
    "generator": lambda x: torch.randn(2, device="npu", generator=torch.Generator("npu").manual_seed(1)),
    "views": lambda x: x.t()[1:, ::2].unsqueeze(0).expand(2, -1, -1).contiguous(),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_card_allows_is_allowed(name: str) -> None:
    assert ALLOWED[name](torch.arange(12.0, device="npu").view(3, 4)).device.type == "npu"


def test_seeds_and_states_repeat_the_numbers() -> None:
    torch.manual_seed(5)
    first = torch.randn(4, device="npu")
    state = torch.npu.get_rng_state()
    second = torch.randn(4, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(second, torch.randn(4, device="npu")) and not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, torch.randn(4, device="npu"))
    assert not torch.equal(first.cpu(), torch.manual_seed(5) and torch.randn(4))  # a stream of its own
    assert torch.Generator("npu").manual_seed(7).initial_seed() == 7


def test_memory_is_counted() -> None:
    torch.npu.empty_cache()
    torch.npu.reset_peak_memory_stats()
    before = torch.npu.memory_allocated()
    big = torch.empty(1 << 20, device="npu")
    assert torch.npu.memory_allocated() - before == 4 << 20
    big.untyped_storage().resize_(0)
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before == 4 << 20
    free, total = torch.npu.mem_get_info()
    assert 0 < free <= total


def test_events_and_pinned_memory() -> None:
    begin, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    begin.record()
    end.record()
    torch.npu.synchronize()
    assert begin.elapsed_time(end) >= 0
    assert torch.ones(3).pin_memory().is_pinned()


@needs_stand_in
def test_the_stand_in_counts_what_the_host_waits_for() -> None:
    x = torch.arange(4.0, device="npu")
    waits: dict[str, Callable[[], object]] = {
        "item": x.sum().item,
        "float": lambda: float(x[0]),
        "if": lambda: bool((x > 0).any()),
        "cpu": x.cpu,
        "tolist": x.tolist,
        "nonzero": x.nonzero,
        "mask": lambda: x[x > 1],
        "equal": lambda: torch.equal(x, x),
        "repeat": lambda: x.repeat_interleave(torch.ones(4, dtype=torch.long, device="npu")),
    }
    for name, call in waits.items():
        torch.npu.reset_counts()
        call()
        assert torch.npu.transfer_counts().get("sync") == 1, name
    torch.npu.reset_counts()
    (x * 2).softmax(-1).index_select(0, torch.tensor([1]).to("npu")).masked_fill(torch.tensor(True), 0.0)
    assert torch.npu.transfer_counts() == {"h2d": 1, "d2d": 1}


def python(code: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what is read when torch_npu is imported."""
    line = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(line, env={**os.environ, **changes}, capture_output=True, text=True, timeout=300)


@needs_stand_in
def test_too_much_memory_raises_torchs_own_error_and_hidden_cards_are_not_there() -> None:
    code = """
        import torch, torch_npu
        print(torch.npu.device_count())
        try:
            torch.empty(2 << 20, device="npu")
        except torch.OutOfMemoryError as error:
            print("OOM", str(error)[:17])
        """
    cards = {"FAKE_NPU_DEVICES": "8", "ASCEND_RT_VISIBLE_DEVICES": "3,5,7", "FAKE_NPU_MEMORY": str(1 << 20)}
    done = python(code, **cards)
    assert done.stdout == "3\nOOM NPU out of memory\n", done.stdout + done.stderr


@needs_stand_in
@pytest.mark.parametrize(("value", "works"), [("0", False), ("1", True)])
def test_torch_accelerator_memory_fails_as_with_torch_npu_before_2_13(value: str, works: bool) -> None:
    code = "import torch, torch_npu; torch.ones(4, device='npu'); print(torch.accelerator.memory_allocated())"
    assert (python(code, FAKE_NPU_TORCH_ACCELERATOR_MEMORY=value).returncode == 0) is works


def test_two_processes_with_fsdp2_over_hccl_equal_one() -> None:
    if not ON_STAND_IN and torch.npu.device_count() < 2:
        pytest.skip("one card only")
    child = Path(__file__).with_name("fsdp_child.py")
    done = subprocess.run([sys.executable, str(child)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
