"""Working weights: the bf16 copy of a float32 master weight, which products in bf16 read.

torch.autocast casts each weight in each micro-batch, although weights change once a step. Here the copy stays: the
optimizer writes it after its step (`refresh`), and all that computes with the weight in bf16 reads it through `half`:
layers, the output projection, the engine. Tied weights are one parameter, so they share one copy. A copy is derived
from its master, so it is neither saved nor sent.

A copy cannot be out of date: `half` compares version and address of the master with those at the last cast, and casts
again, in place. Writes through `.data` are not seen, nor are those of torch's fused optimizers, which count as no
change of the weights (`learner.optim` counts its own).

`use_copies` makes the layers of a model read the copies under autocast to bf16. The products are those of autocast, on
the same numbers, so results and gradients of layers that are not fused are the same, bit for bit. Only a weight that
two layers share differs: each use adds its gradient in float32, where autocast adds them in bf16.

Copies belong to the parameters that `keep` was called with. FSDP2 replaces a model's parameters, within its call too,
by others whose memory it rewrites unseen: those have no copy, and `half` casts them each time, or returns them as they
are when the model is sharded with `param_dtype=torch.bfloat16`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

DTYPE = torch.bfloat16


class _Copy(NamedTuple):
    tensor: Tensor
    state: tuple[int, int]
    """Version and address of the master when the copy was written."""


_COPIES: MutableMapping[Tensor, _Copy] = WeakTensorKeyDictionary()


def keep(weights: Iterable[Tensor]) -> None:
    """Make the copies of these float32 masters. A weight in bf16 needs none, and one that has a copy keeps it."""
    new = [w for w in {id(w): w for w in weights}.values() if w.dtype == torch.float32 and w not in _COPIES]
    for weight, room in zip(new, side_by_side(new), strict=True):
        _write(weight, room)


@torch.inference_mode(False)
def side_by_side(weights: Sequence[Tensor]) -> list[Tensor]:
    """Memory in bf16 for each of these weights. Matrices with as many columns lie one after another, in order: layers
    that read the same input can multiply theirs as one matrix."""
    lengths: Counter[Any] = Counter()
    keys = [(w.device, w.shape[1]) if w.ndim == 2 else id(w) for w in weights]
    for key, weight in zip(keys, weights, strict=True):
        lengths[key] += weight.numel()
    device = {key: w.device for key, w in zip(keys, weights, strict=True)}
    rooms = {key: torch.empty(length, dtype=DTYPE, device=device[key]) for key, length in lengths.items()}
    found = []
    for key, weight in zip(keys, weights, strict=True):
        room, rooms[key] = rooms[key].split([weight.numel(), len(rooms[key]) - weight.numel()])
        # `data` counts its own versions: to write one copy is no change of another that a backward pass will read.
        found.append(room.view(weight.shape).data)
    return found


def half(weight: Tensor) -> Tensor:
    """The numbers of a weight in bf16 as they are now, without gradient: the weight itself if it is in bf16, the copy
    if one is kept (the same tensor at each call), else a new cast."""
    if weight.dtype == DTYPE:
        return weight
    found = _COPIES.get(weight)
    if found is None:
        return weight.detach().to(DTYPE)
    if found.state != _state(weight):
        found = _write(weight, found.tensor)
    return found.tensor


def in_dtype(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The weight without gradient: as its copy if `dtype` is bf16 and one is kept, else as it is."""
    return half(weight) if dtype == DTYPE and weight in _COPIES else weight.detach()


def working(weight: Tensor) -> Tensor:
    """`half(weight)` for a differentiable operation: the gradient arrives at the master in float32."""
    if weight.dtype == DTYPE or not (weight.requires_grad and torch.is_grad_enabled()):
        return half(weight)
    found: Tensor = _Working.apply(weight)
    return found


def refresh(weights: Iterable[Tensor]) -> None:
    """Write the copies of these masters again, in place, after an update; masters without a copy get none."""
    pairs = [(weight, found.tensor) for weight in weights if (found := _COPIES.get(weight)) is not None]
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([copy for _, copy in pairs], [weight for weight, _ in pairs])
    for weight, copy in pairs:
        _COPIES[weight] = _Copy(copy, _state(weight))


def drop(weights: Iterable[Tensor]) -> None:
    """Free the copies of these masters. Others that lie in the same memory are made again elsewhere."""
    gone = [found.tensor for weight in weights if (found := _COPIES.pop(weight, None)) is not None]
    memory = {copy.untyped_storage().data_ptr() for copy in gone}
    left = [weight for weight, found in _COPIES.items() if found.tensor.untyped_storage().data_ptr() in memory]
    for weight in left:
        del _COPIES[weight]
    keep(left)


def copied_bytes(weights: Iterable[Tensor]) -> int:
    """Size in bytes of the copies that are kept of these masters."""
    copies = (found.tensor for weight in weights if (found := _COPIES.get(weight)) is not None)
    return sum(copy.numel() * copy.element_size() for copy in copies)


def use_copies(hf: PreTrainedModel) -> None:
    """Keep copies of what the linear layers of `hf` compute with, the output projection included, and make the layers
    read them under autocast to bf16. A second call adds what is new, such as an adapter.

    Not a head for values, which computes in float32, and no weight of another kind of layer: autocast casts those.
    """
    weights = [weight for layer in _layers(hf) for weight in (layer.weight, layer.bias) if weight is not None]
    for trained in (False, True):  # so that no adapter lies between the matrices of a base
        keep(weight for weight in weights if weight.requires_grad == trained)
    for layer in _layers(hf):
        if "forward" not in vars(layer):
            layer.forward = MethodType(_linear if type(layer) is nn.Linear else _conv1d, layer)


def casts(x: Tensor) -> bool:
    """True if autocast computes products of x in bf16."""
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == DTYPE


def linear(layer: Any, x: Tensor) -> Tensor:
    """The product of an `nn.Linear` under autocast to bf16, with the copies of its weights."""
    return F.linear(x, working(layer.weight), None if layer.bias is None else working(layer.bias))


def _linear(layer: Any, x: Tensor) -> Tensor:
    return linear(layer, x) if casts(x) else nn.Linear.forward(layer, x)


def _conv1d(layer: Any, x: Tensor) -> Tensor:
    if not casts(x):
        own: Tensor = Conv1D.forward(layer, x)
        return own
    out = torch.addmm(working(layer.bias), x.view(-1, x.size(-1)), working(layer.weight))
    return out.view(*x.shape[:-1], layer.nf)


def _layers(hf: PreTrainedModel) -> Iterator[Any]:
    head = hf.get_output_embeddings()
    for layer in (*hf.base_model.modules(), *([] if head is None else [head])):
        if type(layer) in (nn.Linear, Conv1D):
            yield layer


class _Working(torch.autograd.Function):
    """Saved: nothing."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return half(weight).detach()  # autograd marks what is returned here; the copy itself stays without gradient

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.float()


def _write(weight: Tensor, copy: Tensor | None) -> _Copy:
    # The engine asks for copies in inference mode; a backward pass cannot read tensors that were made there.
    with torch.inference_mode(False), torch.no_grad():
        if copy is not None and copy.shape == weight.shape and copy.device == weight.device:
            copy.copy_(weight)
        else:
            copy = weight.detach().to(DTYPE)
    _COPIES[weight] = made = _Copy(copy, _state(weight))
    return made


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()
