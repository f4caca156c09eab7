"""Linear layers, plain or with a LoRA adapter, as the functions of `fused` compute them, forward and backward.

x (n, k), W (m, k), bias (m,), A (r, k), B (m, r):

    out = x W^T + bias + scale * (x A^T) B^T

Products run in the dtype of x. For x in bf16 they multiply a master's working copy (`working_weights.half`), and the
master gets its gradient in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.core.products import product_in_float32
from steepest.models.working_weights import half

FIELDS = 5
"""Arguments of an autograd function that a product takes, in the order of `Product`'s fields."""


class Product(NamedTuple):
    """The matrices of one linear layer; `a` and `b` are None without an adapter. Each product takes them in x's
    dtype: a matrix in another one is cast at each use, but for float32 masters that have a working copy."""

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.a, self.b

    def working(self, dtype: torch.dtype) -> Product:
        """With working copies for x in bf16. A backward pass saves these, since a saved master may come back as another
        tensor (with gradient checkpointing it does), to which no copy belongs."""
        if dtype != torch.bfloat16:
            return self
        return product_from([None if tensor is None else half(tensor) for tensor in self.tensors], self.scale)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(out, x A^T or None)."""
        bias = None if self.bias is None else _in(x.dtype, self.bias)
        out = F.linear(x, _in(x.dtype, self.weight), bias)
        return out, self.add_adapter(out, x)

    def add_adapter(self, out: Tensor, x: Tensor) -> Tensor | None:
        """Add scale * (x A^T) B^T to `out`. Returns x A^T, None without an adapter."""
        if self.a is None or self.b is None:
            return None
        inner = x @ _in(x.dtype, self.a).t()
        out.addmm_(inner, _in(x.dtype, self.b).t(), alpha=self.scale)
        return inner

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
        grad_inner = self._grad_inner(grad)
        grad_x = add_to
        if to_input:
            weight = _in(grad.dtype, self.weight)
            grad_x = grad @ weight if add_to is None else add_to.addmm_(grad, weight)
            self._add_to_input(grad_x, grad_inner)
        weight_grad = product_in_float32(grad.t(), x) if wanted[0] else None
        return grad_x, [weight_grad, *self._small_gradients(grad, x, inner, grad_inner, wanted)]

    def _grad_inner(self, grad: Tensor) -> Tensor | None:
        return None if self.b is None else (grad @ _in(grad.dtype, self.b)).mul_(self.scale)

    def _add_to_input(self, grad_x: Tensor, grad_inner: Tensor | None) -> None:
        if grad_inner is not None and self.a is not None:
            grad_x.addmm_(grad_inner, _in(grad_x.dtype, self.a))

    def _small_gradients(
        self, grad: Tensor, x: Tensor, inner: Tensor | None, grad_inner: Tensor | None, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of bias, A, B and (None) scale."""
        return [
            grad.sum(0, dtype=_sum_dtype(grad)) if wanted[1] else None,
            product_in_float32(grad_inner.t(), x) if wanted[2] and grad_inner is not None else None,
            product_in_float32(grad.t(), inner).mul_(self.scale) if wanted[3] and inner is not None else None,
            None,
        ]


class Outputs(NamedTuple):
    """What several products of one x give, in their order."""

    parts: Sequence[Tensor]
    inners: Sequence[Tensor | None]
    whole: Tensor | None
    """(n, sum of m) of which the parts are columns; None if they were computed one by one."""


def multiply(products: Sequence[Product], x: Tensor) -> Outputs:
    """All products of x: as one where the matrices lie one after another in memory, as working copies do."""
    matrix = _joined(products, x.dtype)
    if matrix is None:
        outs, inners = zip(*(product(x) for product in products), strict=True)
        return Outputs(outs, inners, None)
    biases = [_in(x.dtype, product.bias) for product in products if product.bias is not None]
    whole = F.linear(x, matrix, torch.cat(biases) if biases else None)
    parts = columns(whole, products)
    added = [product.add_adapter(part, x) for product, part in zip(products, parts, strict=True)]
    return Outputs(parts, added, whole)


def gradient_room(products: Sequence[Product], like: Tensor) -> Tensor | None:
    """(n, sum of m) memory for the gradients of the parts; None where `multiply` computes one by one."""
    if _joined(products, like.dtype) is None:
        return None
    return like.new_empty(len(like), sum(len(product.weight) for product in products))


def columns(whole: Tensor, products: Sequence[Product]) -> Sequence[Tensor]:
    """The part of each product."""
    return whole.split([len(product.weight) for product in products], 1)


def backward_of_joined(
    products: Sequence[Product],
    whole: Tensor,
    x: Tensor,
    inners: Sequence[Tensor | None],
    wants: Sequence[Sequence[bool]],
    *,
    to_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients from those of the parts, filled into `gradient_room`: of x, and of FIELDS arguments a product."""
    grads = columns(whole, products)
    grad_inners = [product._grad_inner(grad) for product, grad in zip(products, grads, strict=True)]
    grad_x = None
    if to_input:
        matrix = _joined(products, whole.dtype)
        assert matrix is not None
        grad_x = whole @ matrix
        for product, grad_inner in zip(products, grad_inners, strict=True):
            product._add_to_input(grad_x, grad_inner)
    weights: Sequence[Tensor | None] = [None] * len(products)
    if any(wanted[0] for wanted in wants):
        weights = product_in_float32(whole.t(), x).split([len(product.weight) for product in products])
    found: list[Tensor | None] = []
    for product, grad, inner, grad_inner, wanted, weight in zip(
        products, grads, inners, grad_inners, wants, weights, strict=True
    ):
        found.append(weight if wanted[0] else None)
        found += product._small_gradients(grad, x, inner, grad_inner, wanted)
    return grad_x, found


def _joined(products: Sequence[Product], dtype: torch.dtype) -> Tensor | None:
    """(sum of m, k) the bf16 matrices as one, if each begins in memory where the one before ends. None if they do not,
    or if some products have a bias and others have none."""
    if dtype != torch.bfloat16 or len({product.bias is None for product in products}) > 1:
        return None
    parts = [_in(dtype, product.weight) for product in products]
    place, storage = parts[0].storage_offset(), parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.storage_offset() != place or part.untyped_storage().data_ptr() != storage or not part.is_contiguous():
            return None
        place += part.numel()
    rows, width = sum(len(part) for part in parts), parts[0].shape[1]
    return parts[0].detach().as_strided((rows, width), (width, 1))


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """The numbers of a weight in the dtype of a product."""
    return half(weight) if dtype == torch.bfloat16 else weight.to(dtype)


def _sum_dtype(grad: Tensor) -> torch.dtype:
    return torch.float32 if grad.dtype == torch.bfloat16 else grad.dtype


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which the functions of `fused` compute on x: float32, or bf16 under autocast to it. None: in other
    cases a layer's own forward runs."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return torch.float32 if x.dtype == torch.float32 else None
    is_half = torch.get_autocast_dtype(kind) == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return torch.bfloat16 if is_half else None


def product_of(layer: Any, dtype: torch.dtype | None) -> Product | None:
    """The `Product` of a layer for x in `dtype` (see `compute_dtype`). None if the layer's own forward does more than
    that: another class, a trained weight of another dtype, hooks, several or merged adapters (also a merged one that is
    off: the base's weights contain it), dropout, a trained base under an adapter."""
    if dtype is None or _is_hooked(layer):
        return None
    if type(layer) is nn.Linear:
        return Product(layer.weight, layer.bias) if _fits(layer.weight, dtype) else None
    base = getattr(layer, "base_layer", None)
    if type(base) is not nn.Linear or not _fits(base.weight, dtype) or not hasattr(layer, "lora_A"):
        return None
    if layer.merged or _is_hooked(base):
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or not names:
        return Product(base.weight, base.bias)
    if len(names) > 1 or names[0] in layer.lora_variant or base.weight.requires_grad:
        return None
    a, b = layer.lora_A[names[0]], layer.lora_B[names[0]]
    if not _fits(a.weight, dtype) or b.bias is not None or not isinstance(layer.lora_dropout[names[0]], nn.Identity):
        return None
    return Product(base.weight, base.bias, a.weight, b.weight, layer.scaling[names[0]])


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    """True if a layer with this weight computes in `dtype`: the weight has that dtype, is a float32 master, or is
    frozen and stored in bf16 (`is_held`)."""
    return weight.dtype in (dtype, torch.float32) or (weight.dtype == torch.bfloat16 and not weight.requires_grad)


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)


def product_from(tensors: Sequence[Tensor | None], scale: float) -> Product:
    """The inverse of `tensors`."""
    weight, bias, a, b = tensors
    assert weight is not None
    return Product(weight, bias, a, b, scale)


def products_in(arguments: Sequence[Any], dtype: torch.dtype) -> Iterator[Product]:
    """The products in the arguments of an autograd function, FIELDS arguments each, for x in `dtype`."""
    for start in range(0, len(arguments), FIELDS):
        yield Product(*arguments[start : start + FIELDS]).working(dtype)
