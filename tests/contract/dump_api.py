"""Prints, as JSON, the part of torch_npu that a trainer uses, of whichever is found: the real one or the stand-in."""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
import torch.distributed
import torch_npu

FUNCTIONS = [
    "is_available",
    "is_initialized",
    "init",
    "device_count",
    "current_device",
    "set_device",
    "synchronize",
    "get_device_name",
    "get_device_properties",
    "get_device_capability",
    "mem_get_info",
    "memory_allocated",
    "max_memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "memory_stats",
    "reset_peak_memory_stats",
    "empty_cache",
    "set_per_process_memory_fraction",
    "manual_seed",
    "manual_seed_all",
    "initial_seed",
    "get_rng_state",
    "set_rng_state",
    "get_rng_state_all",
    "set_rng_state_all",
    "Stream",
    "Event",
    "stream",
    "current_stream",
    "default_stream",
    "set_stream",
    "is_bf16_supported",
    "get_amp_supported_dtype",
    "device",
]
FUSED = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu")
KERNELS = [
    "_copy_from_and_resize",
    "_local_scalar_dense",
    "as_strided",
    "empty.memory_format",
    "empty_strided",
    "record_stream",
    "resize_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "unfold",
    "view",
    "view_as_complex",
    "view_as_real",
    "_reshape_alias",
]
"""Operators that the stand-in implements by itself instead of running them on the CPU, and the real one too."""
MOVES_IN_PLACE = "aten::_has_compatible_shallow_copy_type"
"""With torch's own kernel of it, `module.to` gives a device like this one new parameters, and tied weights part."""


def parameters(function: Any) -> list[str] | None:
    """Names in order; None where Python cannot tell them."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    return [parameter.name for parameter in found if parameter.kind is not parameter.VAR_KEYWORD]


def dump() -> dict[str, Any]:
    """name -> parameters, and what torch was told."""
    found: dict[str, Any] = {}
    for name in FUNCTIONS:
        found[f"torch.npu.{name}"] = parameters(getattr(torch.npu, name)) if hasattr(torch.npu, name) else "missing"
    for name in FUSED:
        packet = getattr(torch.ops.npu, name, None)
        schema = None if packet is None else [argument.name for argument in packet.default._schema.arguments]
        found[f"torch_npu.{name}"] = schema or parameters(getattr(torch_npu, name))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    found |= {f"aten::{name}": has_kernel(f"aten::{name}", "PrivateUse1") for name in KERNELS}
    table = torch._C._dispatch_dump_table(MOVES_IN_PLACE).splitlines()
    kernel = next(line for line in table if line.startswith("PrivateUse1:"))
    found["module.to keeps tied weights"] = "RegisterCompositeImplicitAutograd" not in kernel
    found["the process group's backend"] = torch.distributed.get_default_backend_for_device("npu")
    found["torch.accelerator"] = str(torch.accelerator.current_accelerator())
    return found


if __name__ == "__main__":
    print(json.dumps(dump()))
