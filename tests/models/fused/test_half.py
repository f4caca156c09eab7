"""The fused forward passes in bf16: as near to float32 as the models' own code under autocast, with less of it kept."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from steepest.models.causal_lm import CausalLM
from steepest.models.fused import patch
from steepest.models.fused.layers import GatedMLP, HalfRMSNorm, RMSNorm, RotatedQKV
from steepest.models.fused.linear import Product, multiply
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from steepest.models.working_weights import keep
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
    return float((found - want).norm() / want.norm())


def with_adapter() -> LoraCausalLM:
    model = LoraCausalLM(tiny_hf("qwen2"), LoraSettings(rank=3, alpha=5))
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("made", ["llama", "qwen2", "qwen3", "adapter"])
def test_bf16_is_as_near_to_float32_as_the_model_s_own_code_under_autocast(made):
    model = with_adapter() if made == "adapter" else tiny_lm(made)
    want, found = outcome(model), half_outcome(model)
    plain(model)
    own = half_outcome(model)
    assert found.keys() == want.keys() and len(want) > 10
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    for name in want:
        # both err by chance: neither is nearer in every tensor
        assert off(found[name], want[name]) < 1.5 * off(own[name], want[name]) + ROUNDING, name
    assert off(found["log_probs"], want["log_probs"]) < 0.01


def test_with_and_without_gradient_the_log_probs_are_the_same_bits():
    model = tiny_lm("qwen2")
    with autocast():
        recorded = model.log_probs(packed())[0]
        with torch.no_grad():
            assert torch.equal(model.log_probs(packed())[0], recorded)


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


def side_by_side(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    """Float32 weights whose copies lie one after another in memory."""
    weights = [
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)
    ]
    keep(weights)
    return weights


@pytest.mark.parametrize("rank", [0, 2])
def test_matrices_that_lie_side_by_side_are_one_product(rank):
    weights = side_by_side((6, 4), (2, 4), (2, 4))
    generator = torch.Generator().manual_seed(9)
    more = [
        [torch.randn(rank, 4, generator=generator), torch.randn(len(w), rank, generator=generator)] for w in weights
    ]
    products = [
        Product(w, None, *(extra if rank else ()), *(() if not rank else (0.5,)))
        for w, extra in zip(weights, more, strict=True)
    ]
    x = torch.randn(5, 4, generator=generator).bfloat16()
    parts, inners, whole = multiply(products, x)
    assert whole is not None and whole.shape == (5, 10) and all(inner is None for inner in inners) == (rank == 0)
    for part, product in zip(parts, products, strict=True):
        torch.testing.assert_close(part, product(x)[0], atol=0, rtol=2 * ROUNDING)
    assert multiply(products[::-1], x).whole is None, "not in the order of memory"
    assert multiply([products[0], products[2]], x).whole is None, "not adjacent"
    assert multiply([products[0], products[1]._replace(bias=torch.ones(2))], x).whole is None, "a bias here alone"


@pytest.mark.parametrize("rank", [0, 2])
def test_gradients_of_one_product_are_those_of_several(rank):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(7)).bfloat16().requires_grad_()
    angle = torch.linspace(0, 2, 5)[:, None].expand(5, 2)
    tables = [angle.cos(), angle.sin()]
    for function, shapes, first in (
        (RotatedQKV, ((4, 4), (2, 4), (2, 4)), tables),
        (GatedMLP, ((6, 4), (6, 4), (4, 6)), []),
    ):
        outcomes = []
        for joined in (True, False):
            weights = (
                side_by_side(*shapes) if joined else [nn.Parameter(w.detach().clone()) for w in side_by_side(*shapes)]
            )
            generator = torch.Generator().manual_seed(3)
            adapters = [
                [
                    torch.randn(rank, w.shape[1], generator=generator).requires_grad_(),
                    torch.randn(len(w), rank, generator=generator).requires_grad_(),
                ]
                if rank
                else [None, None]
                for w in weights
            ]
            arguments = [a for w, pair in zip(weights, adapters, strict=True) for a in (w, None, *pair, 0.5)]
            outs = function.apply(x, *first, *arguments)
            outs = outs if isinstance(outs, tuple) else (outs,)
            leaves = [x, *weights, *(a for pair in adapters for a in pair if a is not None)]
            grads = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in outs]
            outcomes.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
        for one, several in zip(*outcomes, strict=True):
            assert one.dtype == several.dtype and off(one.float(), several.float()) < 4 * ROUNDING


def test_a_pass_that_is_right_in_float32_alone_is_not_put_in():
    """The comparison in bf16 finds it: here the norm leaves out the weight."""
    hf = tiny_hf("llama", rms_norm_eps=0.0123)

    def wrong(module: nn.Module, x: Tensor) -> Tensor:
        return patch._norm(module, x) if not torch.is_autocast_enabled("cpu") else x * 1.5

    norm = hf.model.norm
    assert patch._agrees(norm, patch._norm)
    assert not patch._agrees(norm, MethodType(lambda _, module, x: wrong(module, x), None))


def test_what_is_kept_for_the_backward_pass_in_bytes():
    """Bytes a token and layer in bf16: hidden 32, inner 48, 4 and 2 heads of 8.

    Two norms: 2 x (2 x 32 saved and 2 x 32 of what they give, and a factor of 4 bytes); query, key, value and what
    attention gives: 2 x (32 + 16 + 16 + 32), gate and up: 2 x 2 x 48; attention's own 4 bytes a head.
    """
    model = tiny_lm("llama")
    ids = torch.tensor(random_ids([40])[0])
    weights = {p.data_ptr() for p in model.parameters()}
    sizes: dict[int, float] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights and tensor.dim() > 1:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes() / len(ids)
        return tensor

    from steepest.models.attention import PackedContext

    kept = []
    for _ in range(2):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast():
            out = model.hidden_states(ids, torch.arange(len(ids)), PackedContext([len(ids)]))
        kept.append(sum(sizes.values()) / 2)
        del out
        plain(model)
    print(kept)
    assert kept[0] < 0.5 * kept[1]
