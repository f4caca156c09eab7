"""The product of one layer, with or without an adapter, in one step of autograd.

peft computes `base(x) + B(A(x)) * scale`: three tensors as large as the layer's output are written and read again, and
as many in the backward pass. Here the matrix product itself adds the adapter's part to the base's output.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.models.fused.linear import Product, compute_dtype, product_from, product_of


class LoraProduct(torch.autograd.Function):
    """Computes a `Product` of x (n, k), with or without an adapter -> (n, m) in x's dtype. If B is zero, the result is
    the base's output, bit for bit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        product = Product(*arguments).working(x.dtype)
        out, inner = product(x)
        ctx.save_for_backward(x, inner, *product.tensors)
        ctx.scale = product.scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, *tensors = ctx.saved_tensors
        product = product_from(tensors, ctx.scale)
        to_input, *wanted = ctx.needs_input_grad
        grad_x, grads = product.backward(grad, x, inner, wanted, to_input=to_input)
        return grad_x, *grads


def fuse(layer: Any) -> None:
    """Make a peft layer compute by `LoraProduct` where that gives the same sum; in other cases peft's code runs."""
    layer.forward = MethodType(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    dtype = compute_dtype(x)
    product = None if args or options else product_of(layer, dtype)
    if product is None or (product.a is None and dtype == torch.float32):
        found: Tensor = type(layer).forward(layer, x, *args, **options)
        return found
    out: Tensor = LoraProduct.apply(x.reshape(-1, x.shape[-1]).to(dtype), *product)
    return out.view(*x.shape[:-1], out.shape[-1])
