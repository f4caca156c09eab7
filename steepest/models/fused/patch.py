"""Puts the functions of `fused` into a transformers model, in the layers that compute the same.

The kind of a layer is read from its parts. For each class of a model the fused pass is compared once with the layer's
own forward pass on a few numbers: outputs and gradients. A layer that differs, that takes other arguments, or is of no
known kind, is not changed.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steepest.models.architectures import TRIAL_ERRORS
from steepest.models.attention import IMPLEMENTATION, PackedContext, attend_packed
from steepest.models.fused.layers import GatedMLP, RMSNorm, RotatedQKV
from steepest.models.fused.linear import product_of

_ATTENTION = {"LlamaAttention", "Qwen2Attention", "MistralAttention"}
"""Classes of transformers whose attention consists of three projections, rotation by halves, the attention function and
a fourth projection. Other classes may pass more arguments to the attention function, which cannot be seen from
outside."""
_TOLERANCE = 1e-4
_ROWS = 5


def fuse(hf: PreTrainedModel) -> None:
    """Put the fused forward passes into the layers of `hf`, in place. A second call changes nothing."""
    known: dict[type, bool] = {}  # class -> whether the fused pass is its own
    for module in hf.modules():
        kind = type(module)
        forward = _forward_for(module)
        if forward is None or "forward" in vars(module) or next(module.parameters()).dtype != torch.float32:
            continue  # layers of another dtype are not fused, so there is nothing to compare
        if kind not in known:
            known[kind] = _agrees(module, forward)
        if known[kind]:
            module.forward = MethodType(forward, module)


def _forward_for(module: Any) -> Callable[..., Any] | None:
    if type(module).__name__ in _ATTENTION:
        return _attention
    if not _takes_one_tensor(module):
        return None
    children = {name for name, _ in module.named_children()}
    if children == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return _mlp if _is_silu(module.act_fn) and not list(module.named_parameters(recurse=False)) else None
    weights = [name for name, _ in module.named_parameters()]
    if not children and weights == ["weight"] and module.weight.ndim == 1 and _eps(module) is not None:
        return _norm
    return None


def _takes_one_tensor(module: nn.Module) -> bool:
    """True if the layer's forward has one argument, as a norm and an MLP have; a gated norm has two."""
    return len(signature(type(module).forward).parameters) == 2


def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-3.0, 3.0, 7)
    return (
        isinstance(activation, nn.Module)
        and _takes_one_tensor(activation)
        and torch.equal(activation(x), nn.functional.silu(x))
    )


def _eps(module: Any) -> float | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return eps if isinstance(eps, float) else None


# -- forward passes ------------------------------------------------------------------------------------------------


def _norm(module: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or module.weight.dtype != x.dtype or torch.is_autocast_enabled(x.device.type):
        own: Tensor = type(module).forward(module, x)
        return own
    out: Tensor = RMSNorm.apply(x, module.weight, _eps(module))
    return out


def _mlp(module: Any, x: Tensor) -> Tensor:
    products = [product_of(layer, x) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    if any(product is None for product in products):
        own: Tensor = type(module).forward(module, x)
        return own
    out: Tensor = GatedMLP.apply(x.reshape(-1, x.shape[-1]), *(t for product in products for t in product or ()))
    return out.view(*x.shape[:-1], out.shape[-1])


def _attention(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of packed tokens: (1, N, hidden)."""
    layers = (module.q_proj, module.k_proj, module.v_proj)
    products = [product_of(layer, hidden_states) for layer in layers]
    cache = options.get("cache", options.get("past_key_values"))
    ours = module.config._attn_implementation == IMPLEMENTATION and cache is None and len(hidden_states) == 1
    if not ours or position_embeddings is None or any(product is None for product in products):
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, **options
        )
        return own
    cos, sin = (table[0] for table in position_embeddings)
    flat = (t for product in products for t in product or ())
    q, k, v = (part.transpose(0, 1)[None] for part in RotatedQKV.apply(hidden_states[0], cos, sin, *flat))
    window = getattr(module if hasattr(module, "sliding_window") else module.config, "sliding_window", None)
    out, _ = attend_packed(
        module, q, k, v, attention_mask, module.scaling, module.attention_dropout if module.training else 0.0,
        sliding_window=window, **options,
    )  # fmt: skip
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


# -- comparison ----------------------------------------------------------------------------------------------------


@torch.enable_grad()
def _agrees(module: Any, forward: Callable[..., Any]) -> bool:
    """True if output and gradients equal those of the module's own forward pass."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    first = next(module.parameters())
    x = torch.linspace(-20.0, 30.0, _ROWS * first.shape[-1], device=first.device).sin()
    x = x.to(first.dtype).view(1, _ROWS, -1).requires_grad_()
    options: dict[str, Any] = {}
    if forward is _attention:
        angles = torch.linspace(0.0, 7.0, _ROWS * (module.head_dim // 2), device=first.device).view(1, _ROWS, -1)
        angles = torch.cat([angles, angles], -1)
        options = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
        options["attention_context"] = PackedContext([_ROWS], first.device)
    try:
        want = _with_gradients(type(module).forward(module, x, **options), [x, *weights])
    except TRIAL_ERRORS:  # it takes another input
        return False
    found = _with_gradients(forward(module, x, **options), [x, *weights])
    return all(_close(a, b) for a, b in zip(want, found, strict=True))


def _with_gradients(out: Tensor | tuple[Tensor, Any], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a sum in which each number has its own weight."""
    made = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1.0, 1.0, made.numel(), device=made.device).view(made.shape)
    return [made.detach(), *torch.autograd.grad((made * weight).sum(), inputs)]


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * a.abs().max().clamp(min=1e-3))
