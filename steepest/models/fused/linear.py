"""Linear layers, plain or with a LoRA adapter, as the functions of `fused` compute them, forward and backward.

x (n, k), W (m, k), bias (m,), A (r, k), B (m, r):

    out = x W^T + bias + scale * (x A^T) B^T
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FIELDS = 5
"""Arguments of an autograd function that a product takes, in the order of `Product`'s fields."""


class Product(NamedTuple):
    """The matrices of one linear layer; `a` and `b` are None without an adapter. A frozen `weight` may have another
    dtype than the rest: it is cast at each use."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(out, x A^T or None)."""
        out = nn.functional.linear(x, self.weight.to(x.dtype), self.bias)
        if self.a is None or self.b is None:
            return out, None
        inner = x @ self.a.t()
        return out.addmm_(inner, self.b.t(), alpha=self.scale), inner

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        inner: Tensor | None,
        wanted: Sequence[bool],
        *,
        to_input: bool = True,
        add_to: Tensor | None = None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients, from the gradient of `out`: the one of x (added into `add_to` if that is given; None unless
        `to_input`), and those of the FIELDS arguments, computed where `wanted` is true."""
        grad_inner = None if self.b is None else (grad @ self.b).mul_(self.scale)
        grad_x = add_to
        if to_input:
            weight = self.weight.to(grad.dtype)
            grad_x = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
            if grad_inner is not None and self.a is not None:
                grad_x.addmm_(grad_inner, self.a)
        return grad_x, [
            grad.t() @ x if wanted[0] else None,
            grad.sum(0) if wanted[1] else None,
            grad_inner.t() @ x if wanted[2] and grad_inner is not None else None,
            (grad.t() @ inner).mul_(self.scale) if wanted[3] and inner is not None else None,
            None,
        ]


def product_of(layer: Any, x: Tensor) -> Product | None:
    """The `Product` of a layer. None if the layer's own forward does more than that: another class, a trained weight of
    another dtype, autocast, hooks, several or merged adapters (also a merged one that is off: the base's weights
    contain it), dropout, a trained base under an adapter."""
    if x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return None
    if _is_hooked(layer):
        return None
    if type(layer) is nn.Linear:
        return Product(layer.weight, layer.bias) if _fits(layer.weight, x) else None
    base = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or not _fits(base.weight, x) or not hasattr(layer, "lora_A"):
        return None
    if layer.merged or _is_hooked(base):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not names:
        return Product(base.weight, base.bias)
    if len(names) > 1 or names[0] in layer.lora_variant or base.weight.requires_grad:
        return None
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if a.weight.dtype != x.dtype or b.bias is not None or not isinstance(layer.lora_dropout[names[0]], nn.Identity):
        return None
    return Product(base.weight, base.bias, a.weight, b.weight, layer.scaling[names[0]])


def _fits(weight: Tensor, x: Tensor) -> bool:
    """True if the layer computes in x's dtype: its weight has that dtype, or is frozen and stored in bf16
    (`is_held`)."""
    return weight.dtype == x.dtype or (weight.dtype == torch.bfloat16 and not weight.requires_grad)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def product_from(tensors: Sequence[Tensor | None], scale: float) -> Product:
    """The inverse of `tensors`."""
    weight, bias, a, b = tensors
    assert weight is not None
    return Product(weight, bias, a, b, scale)


def products_in(arguments: Sequence[Any]) -> Iterator[Product]:
    """The products in the arguments of an autograd function, FIELDS arguments each."""
    for start in range(0, len(arguments), FIELDS):
        yield Product(*arguments[start : start + FIELDS])
