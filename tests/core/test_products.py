"""Products whose sums are wanted in float32."""

from __future__ import annotations

import pytest
import torch

from steepest.core.products import is_half, product, product_in_float32, returns_sums

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((3, 5), (5, 4)))
    found, exact = product_in_float32(a, b), a.double() @ b.double()
    assert found.dtype == (torch.float32 if is_half(dtype) else dtype)
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    kept = product(a, b)
    assert kept.dtype == (torch.float32 if is_half(dtype) and returns_sums(CPU, dtype) else dtype)
    assert torch.equal(kept.to(found.dtype), found)
