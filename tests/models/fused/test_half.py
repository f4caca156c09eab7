"""The fused forward passes in bf16: as near to float32 as the models' own code under autocast, with less of it kept."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.casts import Casts
from steepest.models.attention import PackedContext
from steepest.models.causal_lm import CausalLM
from steepest.models.fused import patch
from steepest.models.fused.layers import GatedMLP, HalfRMSNorm, RMSNorm, RotatedQKV
from steepest.models.fused.linear import Product, multiply
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from steepest.models.working_weights import copied_bytes, half, keep, use_copies
from tests.models.fused.test_layers import outcome, packed, plain
from tests.support.tiny_models import random_ids, tiny_hf, tiny_lm

ROUNDING = 2.0**-9
"""Largest error of a number rounded to bf16, which has 8 bits, as a share of the number."""


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def half_outcome(model: CausalLM) -> dict[str, Tensor]:
    with autocast():
        return outcome(model)


def off(found: Tensor, want: Tensor) -> float:
    return float((found - want).detach().norm() / want.detach().norm())


def with_adapter() -> LoraCausalLM:
    model = LoraCausalLM(tiny_hf("qwen2"), LoraSettings(rank=3, alpha=5))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


@pytest.mark.parametrize("made", ["llama", "qwen2", "qwen3", "adapter"])
def test_bf16_is_as_near_to_float32_as_the_model_s_own_code_under_autocast(made):
    model = with_adapter() if made == "adapter" else tiny_lm(made)
    want, found = outcome(model), half_outcome(model)
    plain(model)
    own = half_outcome(model)
    assert found.keys() == want.keys() and len(want) > 10
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    ours, theirs = ([off(made[name], want[name]) for name in want] for made in (found, own))
    assert sum(ours) < 1.25 * sum(theirs), "both err by chance, so neither is nearer in each tensor"
    assert max(ours) < 2.5 * max(theirs) and off(found["log_probs"], want["log_probs"]) < 0.02


def test_with_and_without_gradient_the_log_probs_are_the_same_bits():
    model = tiny_lm("qwen2")
    with autocast():
        recorded = model.log_probs(packed())[0]
        with torch.no_grad():
            assert torch.equal(model.log_probs(packed())[0], recorded)


def test_a_backward_pass_reads_the_copies_also_through_hooks_as_gradient_checkpointing_has_them():
    model = tiny_lm("llama")
    use_copies(model.hf)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x), autocast():
        total = model.log_probs(packed())[0].sum()
    with Casts(model.parameters()) as casts:
        total.backward()
    assert casts.count["weights"] == 0 and model.hf.lm_head.weight.grad is not None


def test_another_micro_batch_changes_no_more_than_rounding_does():
    model, lengths = tiny_lm("llama"), [9, 5, 12]
    rows = random_ids(lengths)

    def run(rows: list[list[int]]) -> Tensor:
        pack: Packed = pack_sequences(rows, [[False] * 2 + [True] * (len(row) - 2) for row in rows])
        with torch.no_grad(), autocast():
            return model.log_probs(pack)[0]

    together, alone = run(rows), torch.cat([run([row]) for row in rows])
    with torch.no_grad():
        exact = model.log_probs(packed())[0]
    assert float((together - alone).abs().max()) < 2 * float((together - exact).abs().max())


def test_norm_in_bf16_is_that_of_float32_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 40, generator=generator) for _ in range(2))
    weight = torch.randn(40, generator=generator).requires_grad_()
    x, grad = (3 * x).requires_grad_(), grad.bfloat16()
    want, found = RMSNorm.apply(x, weight, 1e-2), HalfRMSNorm.apply(x, weight, 1e-2)
    assert torch.equal(found, want.bfloat16())
    expected = torch.autograd.grad(want, (x, weight), grad.float())
    for mine, theirs in zip(torch.autograd.grad(found, (x, weight), grad), expected, strict=True):
        assert mine.dtype == torch.float32 and off(mine, theirs) < ROUNDING


def random(*shape: int, seed: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def products_of(*shapes: tuple[int, int], rank: int, joined: bool = True) -> list[Product]:
    """Products with float32 masters. `joined`: their copies lie one after another in memory."""
    weights = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    for kept in [weights] if joined else [[weight] for weight in weights]:
        keep(kept)
    if not rank:
        return [Product(weight, None) for weight in weights]
    return [Product(w, None, random(rank, w.shape[1], seed=5), random(len(w), rank, seed=6), 0.5) for w in weights]


@pytest.mark.parametrize("rank", [0, 2])
def test_matrices_that_lie_side_by_side_are_one_product(rank):
    products = products_of((6, 4), (2, 4), (2, 4), rank=rank)
    x = random(5, 4, seed=9).detach().bfloat16()
    parts, _, whole = multiply(products, x)
    assert whole is not None and whole.shape == (5, 10)
    for part, product in zip(parts, products, strict=True):
        torch.testing.assert_close(part, product(x)[0], atol=0.01, rtol=2 * ROUNDING)
    assert multiply(products[::-1], x).whole is None, "not in the order of memory"
    assert multiply([products[0], products[2]], x).whole is None, "not adjacent"
    assert multiply([products[0], products[1]._replace(bias=torch.ones(2))], x).whole is None, "a bias here alone"


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_gradients_of_one_product_are_those_of_several(kind, rank):
    x = random(5, 4, seed=7).detach().bfloat16().requires_grad_()
    angle = torch.linspace(0, 2, 5)[:, None].expand(5, 2)
    function, first = (RotatedQKV, [angle.cos(), angle.sin()]) if kind == "attention" else (GatedMLP, [])
    shapes = ((4, 4), (2, 4), (2, 4)) if kind == "attention" else ((6, 4), (6, 4), (4, 6))
    outcomes = []
    for joined in (True, False):
        products = products_of(*shapes, rank=rank, joined=joined)
        outs = function.apply(x, *first, *chain(*products))
        outs = outs if isinstance(outs, tuple) else (outs,)
        leaves = [x, *(tensor for product in products for tensor in product.tensors if tensor is not None)]
        grads = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outs]
        outcomes.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
    assert len(outcomes[0]) == len(outs) + 1 + 3 * (3 if rank else 1)
    for one, several in zip(*outcomes, strict=True):
        assert one.dtype == several.dtype and off(one.float(), several.float()) < 4 * ROUNDING


def test_a_pass_that_is_right_in_float32_alone_is_not_put_in():
    def forward(module: Any, x: Tensor) -> Tensor:
        return patch._mlp(module, x) * (1.1 if torch.is_autocast_enabled("cpu") else 1.0)

    mlp = tiny_hf("llama").model.layers[0].mlp
    assert patch._agrees(mlp, patch._mlp) and not patch._agrees(mlp, forward)


def test_what_is_kept_for_the_backward_pass_in_bytes():
    """Bytes a token and layer: hidden 32, inner 48, 4 and 2 heads of 8.

    Two norms, each of which keeps its result before the weight and gives one after it, in bf16, and a float32 number:
    2 x (2 x 64 + 4). Queries and keys, values, and what attention gives, with a float32 number a head: 96 + 32 + 64
    and 16.
    Gate and up: 2 x 96. The final norm keeps its input and a number in float32, and all layers share cosines and sines
    of 8 numbers, next to 8 bytes of the token: (128 + 4 + 2 x 32 + 8) / 2 a layer.
    """
    model = tiny_lm("llama")
    ids = torch.tensor(random_ids([40])[0])
    use_copies(model.hf)
    fused = bytes_kept(model, ids)
    plain(model)
    use_copies(model.hf)
    assert fused == 264 + 208 + 192 + 102 and bytes_kept(model, ids) > 2 * fused


def bytes_kept(model: CausalLM, ids: Tensor) -> float:
    """Without vectors, weights and their copies."""
    weights = {t.data_ptr() for p in model.parameters() for t in ((p, half(p)) if copied_bytes([p]) else (p,))}
    sizes: dict[int, float] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights and tensor.dim() > 1:
            sizes[storage.data_ptr()] = storage.nbytes() / len(ids)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast():
        model.hidden_states(ids, torch.arange(len(ids)), PackedContext([len(ids)]))
    return sum(sizes.values()) / 2
