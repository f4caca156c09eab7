"""Puts the functions of `fused` into a transformers model, in the layers that compute the same.

The kind of a layer is read from its parts. The fused pass of a class is compared with the layer's own forward pass on a
few numbers, in float32 and in bf16: outputs and gradients. A layer that differs, that takes other arguments, or is of
no known kind, is not changed. Layers of one class and shape are compared once a process.
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
from steepest.models.fused.layers import GatedMLP, HalfRMSNorm, RMSNorm, RotatedQKV
from steepest.models.fused.linear import compute_dtype, product_of

_ATTENTION = {"LlamaAttention", "Qwen2Attention", "MistralAttention"}
"""Classes of transformers whose attention consists of three projections, rotation by halves, the attention function and
a fourth projection. Other classes may pass more arguments to the attention function, which cannot be seen from
outside."""
_NORMS = {"input_layernorm", "post_attention_layernorm"}
"""Norms of a layer with one of these attentions and a gated MLP: what they give is read by products alone."""
_TOLERANCE = 1e-4
_BF16_TOLERANCE = 2.0**-4
"""Largest difference between bf16 and float32, as a share of the largest number. A number in bf16 has 8 bits: each
rounding is off by at most 2^-9 of it. A layer rounds 4 to 8 times on the way of a number, and the largest error among
all numbers is about three times the usual one: 2^-9 * sqrt(8) * 3 is just above 2^-6; the worst of 60 random layers of
each family was off by 0.036. A wrong layer is off by about 1. The bound is far from both, since the weights of a run's
start and those of its checkpoint have to decide alike. Where weights are such that rounding does more (keys with a
large bias), the module's own pass in bf16 says how much."""
_ROWS = 5


def fuse(hf: PreTrainedModel) -> None:
    """Put the fused forward passes into the layers of `hf`, in place. A second call changes nothing."""
    for module in hf.modules():
        forward = _forward_for(module)
        if forward is None or "forward" in vars(module) or next(module.parameters()).dtype != torch.float32:
            continue  # layers of another dtype are not fused, so there is nothing to compare
        if _is_known_to_agree(module, forward):
            module.forward = MethodType(forward, module)
    for layer in hf.modules():
        for norm in _norms_before_products(layer):
            norm.forward = MethodType(_norm_before_products, norm)


def _norms_before_products(layer: Any) -> list[Any]:
    """The fused norms of a layer that consists of norm, attention, norm and MLP, if those are fused too."""
    parts = dict(layer.named_children())
    if parts.keys() != _NORMS | {"self_attn", "mlp"}:
        return []
    fused = {name: getattr(vars(part).get("forward"), "__func__", None) for name, part in parts.items()}
    known = fused["self_attn"] is _attention and fused["mlp"] is _mlp
    return [parts[name] for name in sorted(_NORMS) if known and fused[name] is _norm]


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
    """Float32 in and out, also under autocast: nothing is known of what reads it."""
    if x.dtype != torch.float32 or module.weight.dtype != x.dtype or compute_dtype(x) is None:
        own: Tensor = type(module).forward(module, x)
        return own
    out: Tensor = RMSNorm.apply(x, module.weight, _eps(module))
    return out


def _norm_before_products(module: Any, x: Tensor) -> Tensor:
    if compute_dtype(x) != torch.bfloat16 or module.weight.dtype != torch.float32:
        return _norm(module, x)
    out: Tensor = HalfRMSNorm.apply(x, module.weight, _eps(module))
    return out


def _mlp(module: Any, x: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    products = [product_of(layer, dtype) for layer in (module.gate_proj, module.up_proj, module.down_proj)]
    if any(product is None for product in products):
        own: Tensor = type(module).forward(module, x)
        return own
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    out: Tensor = GatedMLP.apply(rows, *(t for product in products for t in product or ()))
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
    dtype = compute_dtype(hidden_states)
    products = [product_of(layer, dtype) for layer in layers]
    cache = options.get("cache", options.get("past_key_values"))
    ours = module.config._attn_implementation == IMPLEMENTATION and cache is None and len(hidden_states) == 1
    if not ours or position_embeddings is None or any(product is None for product in products):
        own: tuple[Tensor, Tensor | None] = type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, **options
        )
        return own
    cos, sin = (table[0] for table in position_embeddings)
    flat = (t for product in products for t in product or ())
    rows = hidden_states[0].to(dtype)
    q, k, v = (part.transpose(0, 1)[None] for part in RotatedQKV.apply(rows, cos, sin, *flat))
    window = getattr(module if hasattr(module, "sliding_window") else module.config, "sliding_window", None)
    out, _ = attend_packed(
        module, q, k, v, attention_mask, module.scaling, module.attention_dropout if module.training else 0.0,
        sliding_window=window, **options,
    )  # fmt: skip
    return module.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


# -- comparison ----------------------------------------------------------------------------------------------------


_KNOWN: dict[tuple[Any, ...], bool] = {}
"""What was compared in this process: class, sizes and settings of a layer -> whether the fused pass is its own."""


def _is_known_to_agree(module: Any, forward: Callable[..., Any]) -> bool:
    settings = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str)) and name not in ("layer_idx", "training") and not name.startswith("_")
    }
    weights = [(name, weight.shape, weight.device) for name, weight in module.named_parameters()]
    key = (type(module), *settings.items(), *weights)
    if key not in _KNOWN:
        _KNOWN[key] = _agrees(module, forward)
    return _KNOWN[key]


@torch.enable_grad()
def _agrees(module: Any, forward: Callable[..., Any]) -> bool:
    """True if output and gradients equal those of the module's own forward pass in float32, and if those in bf16 are
    off by no more than bf16 rounds, or than twice what the module's own are."""
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
    off = _distances(want, found)
    if not all(distance <= _TOLERANCE for distance in off):
        return False
    other = _norm_before_products if forward is _norm else forward
    with torch.autocast(first.device.type, torch.bfloat16):
        outs = [run(module, x, **options) for run in (type(module).forward, other)]
    own, ours = (_distances(want, _with_gradients(out, [x, *weights])) for out in outs)
    return all(a <= max(_BF16_TOLERANCE, 2 * b) for a, b in zip(ours, own, strict=True))


def _with_gradients(out: Tensor | tuple[Tensor, Any], inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of a sum in which each number has its own weight."""
    made = out[0] if isinstance(out, tuple) else out
    weight = torch.linspace(-1.0, 1.0, made.numel(), device=made.device).view(made.shape)
    return [made.detach(), *torch.autograd.grad((made * weight).sum(), inputs)]


def _distances(want: list[Tensor], found: list[Tensor]) -> list[float]:
    """The largest difference of each tensor, as a share of its largest number."""
    return [float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)) for a, b in zip(want, found, strict=True)]
