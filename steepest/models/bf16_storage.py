"""Stores frozen matrices in bfloat16, which halves their memory.

The files of most released models hold bfloat16 numbers: in float32 they take twice the memory without being more exact.
A matrix stored this way is cast to the dtype of its input at each use, forward and backward, and the cast is not kept.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steepest.models.fused.linear import Product
from steepest.models.fused.lora import LoraProduct
from steepest.models.working_weights import casts, drop, half, linear, side_by_side

HELD = torch.bfloat16


def hold_in_bf16(hf: PreTrainedModel, *, rounding: bool) -> None:
    """Store the frozen matrices of the layers in bf16. Embedding and norms, and so the hidden states, stay fp32.

    `rounding` False: only linear layers of the backbone whose numbers all are bf16 numbers, so that no number changes.
    True: all linear layers and the head. Under autocast to bf16 this changes no number either; use it only for models
    that always compute under such autocast.
    """
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings()
    kinds = (nn.Linear, Conv1D) if rounding else (nn.Linear,)
    frozen: list[Any] = [m for m in hf.modules() if type(m) in kinds and not m.weight.requires_grad]
    frozen = [m for m in frozen if m.weight is not embedding]
    held = [m for m in frozen if rounding or (m is not head and _is_exact(m.weight))]
    for module, room in zip(held, side_by_side([m.weight for m in held]), strict=True):
        module.weight.data = room.copy_(half(module.weight))
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
    drop([module.weight for module in held])  # each is its own copy now


def is_held(layer: nn.Linear) -> bool:
    """True if the layer's matrix is stored in bf16 and is cast to other dtypes at each use."""
    return layer.weight.dtype == HELD and getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _is_exact(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and torch.equal(weight.to(HELD).float(), weight)


def _forward(layer: Any, x: Tensor) -> Tensor:
    if casts(x):
        return linear(layer, x)
    if x.dtype == layer.weight.dtype:
        own: Tensor = type(layer).forward(layer, x)
        return own
    out: Tensor = LoraProduct.apply(x.reshape(-1, x.shape[-1]), *Product(layer.weight, layer.bias))
    return out.view(*x.shape[:-1], out.shape[-1])
