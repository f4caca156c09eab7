"""Matrix products of half-precision factors whose sums are wanted in float32."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 for half-precision factors: the sums themselves where the backend can return them, else the
    sums rounded to the factors' dtype. Factors of another dtype give their own."""
    found = product(a, b)
    return found.float() if is_half(found.dtype) else found


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 for half-precision factors if the backend can return their sums, else in the factors' dtype."""
    if is_half(a.dtype) and returns_sums(a.device, a.dtype):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


@lru_cache
def returns_sums(device: torch.device, dtype: torch.dtype) -> bool:
    """True if this device's product of `dtype` can return float32 sums. It is tried once, because torch cannot be
    asked."""
    one = torch.ones(8, 8, dtype=dtype, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, NotImplementedError):
        return False
