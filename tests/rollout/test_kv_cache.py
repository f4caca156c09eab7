"""Buffers are kept and grow; one decoding step equals the last row of full attention."""

from __future__ import annotations

import pytest
import torch

from steepest.models.attention import PackedContext
from steepest.rollout.builtin.kv_cache import DecodeContext, KVCache, PrefillContext

CPU = torch.device("cpu")


def test_buffers_are_reused_and_grow_only_when_needed():
    cache = KVCache({0: (2, 4, 6), 1: (1, 4, 4)}, torch.float32, CPU)
    assert cache.bytes_per_token == (2 * 10 + 8) * 4
    cache.lay_out(3, 10)
    first = cache.k[0].data_ptr()
    assert cache.k[0].shape == (3, 2, 10, 4) and cache.v[0].shape == (3, 2, 10, 6) and cache.k[1].shape == (3, 1, 10, 4)
    cache.lay_out(5, 6)
    assert cache.k[0].data_ptr() == first and cache.allocated_bytes == 30 * cache.bytes_per_token
    cache.lay_out(4, 10)
    assert cache.allocated_bytes == 40 * cache.bytes_per_token
    cache.free()
    assert cache.allocated_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_then_decode_equals_full_attention(dtype):
    torch.manual_seed(0)
    lengths, kv, heads = [5, 3, 7], 2, 4
    q, k, v = (torch.randn(h, sum(lengths), 8).to(dtype) for h in (heads, kv, kv))
    want = PackedContext(lengths).attend(0, q, k, v, 0.25)
    cache = KVCache({0: (kv, 8, 8)}, dtype, CPU)
    cache.lay_out(4, 9)
    ends = torch.tensor(lengths).cumsum(0)
    position = torch.cat([torch.arange(n) for n in lengths])
    slot = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    early = position < torch.tensor(lengths)[slot] - 1
    prefill = PrefillContext(cache, [n - 1 for n in lengths], slot[early], position[early])
    got = prefill.attend(0, q[:, early], k[:, early], v[:, early], 0.25)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, want[early], atol=tolerance, rtol=tolerance)
    last = ends - 1
    decode = DecodeContext(cache, torch.tensor(lengths) - 1, torch.arange(3), max(lengths))
    got = decode.attend(0, q[:, last], k[:, last], v[:, last], 0.25)
    torch.testing.assert_close(got, want[last], atol=tolerance, rtol=tolerance)


def test_copied_slots_hold_the_same_tokens():
    cache = KVCache({0: (1, 2, 2)}, torch.float32, CPU)
    cache.lay_out(4, 5)
    cache.k[0][1] = 7.0
    cache.copy_slots(torch.tensor([1, 1]), torch.tensor([0, 3]), 3)
    assert cache.k[0][:, 0, :, 0].tolist() == [[7, 7, 7, 0, 0], [7] * 5, [0] * 5, [7, 7, 7, 0, 0]]
