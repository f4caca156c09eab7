"""torch.autocast("npu"): which operators take the low precision and which float32, registered from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, fallthrough_kernel

_KEY = "AutocastPrivateUse1"
_LOW = [
    "mm",
    "bmm",
    "addmm",
    "addbmm",
    "baddbmm",
    "addmv",
    "mv",
    "linear",
    "matmul",
    "conv1d",
    "conv2d",
    "prelu",
    "scaled_dot_product_attention",
    "linalg_vecdot",
    "chain_matmul",
    "linalg_multi_dot",
]
_FLOAT32 = [
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "rms_norm",
    "nll_loss",
    "cross_entropy_loss",
    "exp",
    "log",
    "log1p",
    "pow.Tensor_Scalar",
    "rsqrt",
    "cumsum",
    "sum",
    "sum.dim_IntList",
    "prod",
    "norm.Scalar",
    "logsumexp",
    "mse_loss",
    "kl_div",
    "softplus",
    "binary_cross_entropy_with_logits",
]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        ours = value.device.type == "npu" and value.is_floating_point() and value.dtype != torch.float64
        return value.to(dtype) if ours else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _kernel(operator: Callable[..., Any], low: bool) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("npu") if low else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*(_cast(a, dtype) for a in args), **{k: _cast(v, dtype) for k, v in kwargs.items()})

    return run


def register() -> list[Library]:
    """The libraries that hold the kernels; they have to be kept."""
    everything, aten = Library("_", "IMPL"), Library("aten", "IMPL")
    everything.fallback(fallthrough_kernel, _KEY)
    for low, names in ((True, _LOW), (False, _FLOAT32)):
        for name in names:
            base, _, overload = name.partition(".")
            packet = getattr(torch.ops.aten, base, None)
            overload = overload or "default"
            if packet is not None and overload in packet.overloads():
                aten.impl(name, _kernel(getattr(packet, overload), low), _KEY)
    return [everything, aten]
