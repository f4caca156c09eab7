"""The fused product of an adapted layer against peft's own three tables."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from steepest.models.fused.lora import LoraProduct, fuse


def peft_layer(*, bias: bool = True, dropout: float = 0.0, adapters: tuple[str, ...] = ("one",)) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=bias))
    model.requires_grad_(False)
    for name in adapters:
        model = inject_adapter_in_model(
            LoraConfig(r=3, lora_alpha=12, target_modules=["0"], lora_dropout=dropout), model, name
        )
    layer = model[0]
    for name in adapters:
        nn.init.normal_(layer.lora_B[name].weight)
    return layer


def is_fused(out: torch.Tensor) -> bool:
    """Whether the last product of a tensor's history, but for reshaping, is the fused one."""
    node = out.grad_fn
    while node is not None and node.name().startswith("View"):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "LoraProductBackward"


def gradients(layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    weights = [layer.lora_A["one"].weight, layer.lora_B["one"].weight]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return list(torch.autograd.grad((out * weight).sum(), [x, *weights]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 4, 6)])
def test_output_and_gradients_are_peft_s(bias, shape):
    layer = peft_layer(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    wanted = layer(x)
    expected = gradients(layer, x, wanted)
    fuse(layer)
    found = layer(x)
    assert is_fused(found) and not is_fused(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    for own, theirs in zip(gradients(layer, x, found), expected, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(own, theirs, atol=1e-5, rtol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(1)
    shapes = [(4, 6), (5, 6), (5,), (3, 6), (5, 3)]
    x, w, bias, a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a, b: LoraProduct.apply(x, w, bias, a, b, 1.7), (x, a, b))


def test_a_fresh_adapter_adds_nothing_and_one_that_is_off_is_not_there():
    layer, x = peft_layer(adapters=("one", "two")), torch.randn(7, 6)
    fuse(layer)
    layer.set_adapter("one")
    one = layer(x)
    layer.set_adapter("two")
    two = layer(x)
    assert is_fused(one) and is_fused(two) and not torch.allclose(one, two)
    torch.testing.assert_close(two, layer.base_layer(x) + layer.lora_B["two"](layer.lora_A["two"](x)) * 4.0)
    nn.init.zeros_(layer.lora_B["two"].weight)
    assert torch.equal(layer(x), layer.base_layer(x)) and is_fused(layer(x))
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x)) and not is_fused(layer(x))


def test_under_autocast_it_is_in_bf16_and_the_adapter_s_gradients_are_float32():
    layer, x = peft_layer(), torch.randn(7, 6, requires_grad=True)
    wanted = layer(x)
    expected = gradients(layer, x, wanted)
    fuse(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    assert is_fused(half) and half.dtype == torch.bfloat16
    for own, theirs in zip([half, *gradients(layer, x, half)], [wanted, *expected], strict=True):
        assert (own - theirs).abs().max() < 2**-6 * theirs.abs().max()
    layer.enable_adapters(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base = layer(x)
    assert is_fused(base) and (base - wanted).abs().max() > 1


def test_what_is_another_sum_stays_peft_s():
    """Half precision outside of autocast, dropout, a base that is trained."""
    x = torch.randn(7, 6)
    layer = peft_layer()
    wanted = layer(x)
    fuse(layer)
    assert not is_fused(copy.deepcopy(layer).bfloat16()(x.bfloat16()))
    layer.base_layer.weight.requires_grad_(True)
    assert torch.equal(layer(x), wanted) and not is_fused(layer(x))
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is not None
    dropping = peft_layer(dropout=0.5)
    fuse(dropping)
    one, other = dropping.train()(x), dropping(x)
    assert not torch.equal(one, other) and not is_fused(one)
