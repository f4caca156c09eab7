"""Frozen matrices held in bfloat16, half of their memory.

Most released models are files of bfloat16 numbers: in float32 they take twice the room and say nothing more. A matrix
that is held so computes in the dtype of its input, cast anew at each use, forward and backward; no pass keeps the cast.
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

HELD = torch.bfloat16


def hold_in_bf16(hf: PreTrainedModel, *, rounding: bool) -> None:
    """Hold the frozen matrices of the layers in bf16; embedding and norms, and with them the stream of hidden states,
    stay fp32.

    `rounding` False: those linear layers of the backbone whose numbers all are bf16 ones, so that no number changes
    anywhere. True: all linear layers, the head too. Under autocast to bf16 no number changes by that either; it is for
    who computes in nothing else.
    """
    embedding, head = hf.get_input_embeddings().weight, hf.get_output_embeddings()
    kinds = (nn.Linear, Conv1D) if rounding else (nn.Linear,)
    for module in hf.modules():
        if type(module) not in kinds or module.weight.requires_grad or module.weight is embedding:
            continue
        if rounding or (module is not head and _is_exact(module.weight)):
            module.weight.data = module.weight.data.to(HELD)
            if type(module) is nn.Linear:
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def is_held(layer: nn.Linear) -> bool:
    """Whether a layer's matrix is held in bf16 and computes in other dtypes too."""
    return layer.weight.dtype == HELD and getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _is_exact(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and torch.equal(weight.to(HELD).float(), weight)


def _forward(layer: Any, x: Tensor) -> Tensor:
    if x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type):
        own: Tensor = type(layer).forward(layer, x)
        return own
    out: Tensor = LoraProduct.apply(x.reshape(-1, x.shape[-1]), *Product(layer.weight, layer.bias))
    return out.view(*x.shape[:-1], out.shape[-1])
