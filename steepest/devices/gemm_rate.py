"""What this machine can do, measured: the rate of plain matrix products, which `perf/mfu` is a share of."""

from __future__ import annotations

import time

import torch

from steepest.devices.api import Accelerator, Device

SECONDS = 0.25
"""Of a measurement."""
_SIZES = (256, 512, 1024, 2048, 4096)
"""Rows and columns of the matrices."""
_SHORT = 1e-3
"""Seconds a product below which a larger one is tried: it may keep more cores busy."""


def gemm_rate(device: Device, dtype: torch.dtype, seconds: float = SECONDS) -> float:
    """Operations a second of square matrix products in `dtype`, with the threads this process has.

    The best of several, since a limit is what the machine does when it is left alone. Takes about `seconds`.
    """
    deadline = time.perf_counter() + seconds
    best, sizes = 0.0, iter(_SIZES)
    size = next(sizes)
    _product(device, dtype, size, times=1)  # starts threads, loads kernels
    while not best or time.perf_counter() < deadline:
        rate = _product(device, dtype, size)
        best = max(best, rate)
        if 2 * size**3 / rate < _SHORT:
            size = next(sizes, size)
    return best


def _product(device: Device, dtype: torch.dtype, size: int, times: int = 3) -> float:
    """The rate of `times` products one after another."""
    with torch.inference_mode():
        a = torch.ones(size, size, dtype=dtype, device=device.torch_device())
        out = torch.empty_like(a)
        device.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a, out=out)
        device.synchronize()
    return times * 2 * size**3 / (time.perf_counter() - start)


def describe_rate(rate: float, dtype: torch.dtype, device: Device) -> str:
    """For the summary at start."""
    number = f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"
    threads = "" if isinstance(device, Accelerator) else f" with {torch.get_num_threads()} thread(s)"
    kind = str(dtype).removeprefix("torch.")
    return f"{number} in {kind} matrix products, measured{threads}; perf/mfu is the share of it that was used"
