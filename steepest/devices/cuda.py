"""NVIDIA cards through CUDA (and AMD cards, which PyTorch's ROCm builds show under the same name)."""

from __future__ import annotations

import torch

from steepest.devices.api import DEVICES, Accelerator, visible_devices


@DEVICES.register("cuda")
class CUDADevice(Accelerator):
    """One or more CUDA cards."""

    name = "cuda"
    type = "cuda"
    distributed_backend = "cpu:gloo,cuda:nccl"
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"
    ray_resource = "GPU"

    def availability(self) -> str | None:
        if not torch.cuda.is_available():
            return self._why_not()
        return None

    def _why_not(self) -> str:
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                f"this PyTorch ({torch.__version__}) is built without CUDA; "
                "install a CUDA build of torch (https://pytorch.org/get-started/locally), or use trainer.device=cpu."
            )
        chosen = visible_devices(self)
        if chosen is not None and chosen.strip() in ("", "-1"):
            return f"CUDA_VISIBLE_DEVICES={chosen!r} hides every card; unset it, or use trainer.device=cpu."
        return (
            "PyTorch finds no card or no driver; see that nvidia-smi lists a card, that its driver is recent enough "
            f"for CUDA {torch.version.cuda or torch.version.hip}, or use trainer.device=cpu."
        )
