"""The product of an adapted layer, base and adapter in one step of autograd.

peft writes it as `base(x) + B(A(x)) * scale`: three tables as large as the layer's output, each written and read again,
and as many in the backward pass. Here the adapter is added into the base's output by the matrix product itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + scale * (x A^T) B^T, with W and its bias frozen.

    x (n, k), W (m, k), A (r, k), B (m, r) -> (n, m), all of one dtype. With B zero it is the base's output,
    bit for bit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        out = nn.functional.linear(x, weight, bias)
        inner = x @ a.t()
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out.addmm_(inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, a, b, inner = ctx.saved_tensors
        grad_inner = (grad @ b).mul_(ctx.scale)
        grad_x = (grad @ weight).addmm_(grad_inner, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_inner.t() @ x, (grad.t() @ inner).mul_(ctx.scale), None


def fuse(layer: Any) -> None:
    """Let a peft layer compute by `LoraProduct` wherever that is the same sum; elsewhere it stays peft's."""
    layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.base_layer
    plain = type(base) is nn.Linear and not args and not options and len(names) == 1
    if not plain or layer.disable_adapters or layer.merged or names[0] in layer.lora_variant:
        return _by_peft(layer, x, *args, **options)
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    same = x.dtype == base.weight.dtype == a.weight.dtype and not torch.is_autocast_enabled(x.device.type)
    trained = (
        base.weight.requires_grad or b.bias is not None or not isinstance(layer.lora_dropout[names[0]], nn.Identity)
    )
    if not same or trained:
        return _by_peft(layer, x)
    out: Tensor = LoraProduct.apply(
        x.reshape(-1, x.shape[-1]), base.weight, base.bias, a.weight, b.weight, layer.scaling[names[0]]
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def _by_peft(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    found: Tensor = type(layer).forward(layer, x, *args, **options)
    return found
