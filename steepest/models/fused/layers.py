"""Norm, query-key-value with rotation, and gated MLP, each as one step of autograd.

The models' own code saves every intermediate tensor for the backward pass: for a gated MLP the two projections, the
activation and the product of both. The functions here save only tensors that cannot be recomputed by an elementwise
pass (`Saved` in each docstring): three fifths of the numbers for a layer of SmolLM2. They compute in float32, and in
bf16 under autocast to it: then products and what is saved are bf16, sums over a row and rotations are float32, and the
stream of hidden states stays float32. In other cases (another dtype, a cache of transformers) a layer's own forward
runs. `fuse` puts them into a model and compares them with its own layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from steepest.models.fused.linear import (
    FIELDS,
    Product,
    backward_of_joined,
    columns,
    gradient_room,
    multiply,
    product_from,
    products_in,
)


def inverse_rms(x: Tensor, width: int | Tensor, eps: float | Tensor) -> Tensor:
    """(..., n) -> (..., 1): 1 / sqrt(sum(x^2) / width + eps), with width = n. A tensor argument saves a microsecond."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(width).add_(eps).rsqrt_()


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight; x (..., n), weight (n,). Saved: x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = inverse_rms(x, x.shape[-1], eps)
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        width = x.shape[-1]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.mv((grad * x).reshape(-1, width).t(), factor.reshape(-1))
        if ctx.needs_input_grad[0]:
            grad_x = grad * weight
            # The mean square depends on x too; its part of the gradient is along x.
            along = (grad_x * x).sum(-1, keepdim=True)
            along.mul_(factor * factor * factor).div_(width)
            grad_x.mul_(factor).addcmul_(x, along, value=-1.0)
        return grad_x, grad_weight, None


class HalfRMSNorm(torch.autograd.Function):
    """The same for products in bf16: x (..., n) in float32 or bf16, weight (n,) in float32 -> bf16, rounded once.
    Saved: x / sqrt(mean(x^2) + eps) in bf16, and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        factor = inverse_rms(wide, x.shape[-1], eps)
        normed = wide * factor
        saved = normed.to(torch.bfloat16) if any(ctx.needs_input_grad) else None
        ctx.save_for_backward(saved, weight, factor)
        ctx.dtype = x.dtype
        return normed.mul_(weight).to(torch.bfloat16)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, weight, factor = ctx.saved_tensors
        width = grad.shape[-1]
        normed, grad_x = saved.float(), grad.float()
        product = grad_x * normed
        grad_weight = product.reshape(-1, width).sum(0) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        # The mean square depends on x too; its part of the gradient is along x.
        along = (product.reshape(-1, width) @ weight).view(factor.shape).div_(-width)
        grad_x = grad_x.mul_(weight).addcmul_(normed, along).mul_(factor)
        return grad_x.to(ctx.dtype), grad_weight, None


class GatedMLP(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)) for x (n, k) and three `Product`s. Saved: x, gate(x), up(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        gate, up, down = products_in(arguments, x.dtype)
        (gated, raised), (gate_inner, up_inner), _ = multiply((gate, up), x)
        out, down_inner = down(F.silu(gated).mul_(raised))
        tensors = [t for product in (gate, up, down) for t in product.tensors]
        ctx.save_for_backward(x, gated, raised, gate_inner, up_inner, down_inner, *tensors)
        ctx.scales = gate.scale, up.scale, down.scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, raised, gate_inner, up_inner, down_inner, *tensors = ctx.saved_tensors
        gate, up, down = _products(tensors, ctx.scales)
        wants = _wants(ctx, 1)
        silu = F.silu(gated)
        grad_product, of_down = down.backward(grad, silu * raised if any(wants[2]) else grad, down_inner, wants[2])
        assert grad_product is not None
        to_input = ctx.needs_input_grad[0]
        if (room := gradient_room((gate, up), grad_product)) is not None:
            of_gated, of_raised = columns(room, (gate, up))
            torch.mul(silu, grad_product, out=of_raised)
            of_gated.copy_(torch.ops.aten.silu_backward(grad_product.mul_(raised), gated))
            grad_x, found = backward_of_joined(
                (gate, up), room, x, (gate_inner, up_inner), wants[:2], to_input=to_input
            )
            return grad_x, *found, *of_down
        grad_x, of_up = up.backward(silu.mul_(grad_product), x, up_inner, wants[1], to_input=to_input)
        grad_gated = torch.ops.aten.silu_backward(grad_product.mul_(raised), gated)
        grad_x, of_gate = gate.backward(grad_gated, x, gate_inner, wants[0], to_input=to_input, add_to=grad_x)
        return grad_x, *of_gate, *of_up, *of_down


class RotatedQKV(torch.autograd.Function):
    """Queries, keys and values of x (n, k) by three `Product`s, queries and keys rotated by halves.

        rotated = y * cos + cat(-y2, y1) * sin           y1, y2 the halves of each head

    cos and sin are (n, D), both halves of a row alike. Returns (n, H, D) and twice (n, KV, D). Saved: x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        products = list(products_in(arguments, x.dtype))
        size = cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None, : size // 2]
        parts, inners, whole = multiply(products, x)
        ctx.save_for_backward(x, cos, sin, *inners, *(t for product in products for t in product.tensors))
        ctx.scales = [product.scale for product in products]
        q, k, v = (part.view(len(x), -1, size) for part in parts)
        if whole is None:
            return rotate(q, cos, sin), rotate(k, cos, sin), v
        turned = rotate(whole.view(len(x), -1, size)[:, : -v.shape[1]], cos, sin)
        # A copy of the values: as a view they would keep the unrotated queries and keys.
        return *turned.split([q.shape[1], k.shape[1]], 1), v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *rest = ctx.saved_tensors
        products, wants = _products(rest[3:], ctx.scales), _wants(ctx, 3)
        if (room := gradient_room(products, grads[2].flatten(1))) is not None:
            turned = [rotate(grads[0], cos, -sin), rotate(grads[1], cos, -sin), grads[2]]
            torch.cat([grad.reshape(len(x), -1) for grad in turned], 1, out=room)
            grad_x, found = backward_of_joined(products, room, x, rest[:3], wants, to_input=ctx.needs_input_grad[0])
            return grad_x, None, None, *found
        grad_x, found = None, []
        for index, (grad, product) in enumerate(zip(grads, products, strict=True)):
            flat = (grad if index == 2 else rotate(grad, cos, -sin)).reshape(len(x), -1)
            grad_x, more = product.backward(
                flat, x, rest[index], wants[index], to_input=ctx.needs_input_grad[0], add_to=grad_x
            )
            found += more
        return grad_x, None, None, *found


def rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y (n, H, D), cos (n, 1, D), sin (n, 1, D / 2) -> y's dtype, rounded once. With -sin it turns back."""
    half, wide = y.shape[-1] // 2, y.to(cos.dtype)
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], sin, value=-1.0)
    turned[..., half:].addcmul_(wide[..., :half], sin)
    return turned.to(y.dtype)


def _products(tensors: Sequence[Tensor], scales: Sequence[float]) -> list[Product]:
    each = FIELDS - 1
    return [product_from(tensors[each * i : each * (i + 1)], scale) for i, scale in enumerate(scales)]


def _wants(ctx: Any, before: int) -> list[tuple[bool, ...]]:
    """The gradients that autograd needs, for each product; `before` arguments come before those of the products."""
    needed = ctx.needs_input_grad[before:]
    return [needed[start : start + FIELDS] for start in range(0, len(needed), FIELDS)]
