"""Buffers are kept and grow; one decoding step equals the last row of full attention."""

from __future__ import annotations

import pytest
import torch

from steepest.models.attention import PackedContext, Terms
from steepest.rollout.builtin.kv_cache import DecodeContext, KVCache, PrefillContext, Prefix, chunks_of

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


@pytest.mark.parametrize(
    ("dtype", "products"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_prefill_then_decode_equals_full_attention(dtype, products):
    torch.manual_seed(0)
    lengths, kv, heads = [5, 3, 7], 2, 4
    q, k, v = (torch.randn(h, sum(lengths), 8).to(dtype) for h in (heads, kv, kv))
    want = PackedContext(lengths).attend(0, q, k, v, 0.25)
    cache = KVCache({0: (kv, 8, 8)}, dtype, CPU, bf16_products=products)
    assert cache.whole == products
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
    for chunks in ([(0, 3, 7)], [(0, 2, 5), (2, 3, 7)]):
        decode = DecodeContext(cache, torch.tensor(lengths) - 1, torch.arange(3), chunks)
        got = decode.attend(0, q[:, last], k[:, last], v[:, last], 0.25)
        torch.testing.assert_close(got, want[last], atol=tolerance, rtol=tolerance)


def test_slots_that_are_read_whole_grow_by_64_places_and_keep_their_tokens():
    cache = KVCache({0: (2, 4, 6), 1: (1, 4, 4)}, torch.bfloat16, CPU, bf16_products=True)
    cache.lay_out(3, 150)
    assert cache.capacity == 64 and cache.allocated_bytes == 3 * 150 * cache.bytes_per_token
    assert not cache.reserve(64, 2)
    for view in (*cache.k, *cache.v):
        view.copy_(torch.randn(view.shape))
    before = [view[:2].clone() for view in (*cache.k, *cache.v)]
    for places, capacity in ((65, 128), (129, 150)):
        assert cache.reserve(places, 2) and cache.capacity == capacity
        for view, kept in zip((*cache.k, *cache.v), before, strict=True):
            assert view.is_contiguous() and view.shape[2] == capacity and torch.equal(view[:2, :, :64], kept)


TERMS = [Terms(), Terms(window=3), Terms(window=2, softcap=0.5, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]))]


@pytest.mark.parametrize("terms", TERMS, ids=["plain", "window", "all"])
def test_decoding_equals_full_attention_also_with_a_window_a_soft_cap_and_sinks(terms):
    torch.manual_seed(0)
    lengths, kv, heads = [7, 5, 3], 2, 4
    q, k, v = (torch.randn(h, sum(lengths), 8) for h in (heads, kv, kv))
    position = torch.cat([torch.arange(n) for n in lengths])
    slot = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    want = PackedContext(lengths).attend(0, q, k, v, None, terms)
    cache = KVCache({0: (kv, 8, 8)}, torch.float32, CPU)
    cache.lay_out(3, 8)
    last = torch.tensor(lengths).cumsum(0) - 1
    early = torch.ones(len(slot), dtype=torch.bool)
    early[last] = False
    prefill = PrefillContext(cache, [n - 1 for n in lengths], slot[early], position[early])
    first = prefill.attend(0, q[:, early], k[:, early], v[:, early], None, terms)
    torch.testing.assert_close(first, want[early], atol=1e-5, rtol=1e-5)
    decode = DecodeContext(cache, torch.tensor(lengths) - 1, torch.arange(3), [(0, 3, 7)])
    found = decode.attend(0, q[:, last], k[:, last], v[:, last], None, terms)
    torch.testing.assert_close(found, want[last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("terms", TERMS, ids=["plain", "window", "all"])
def test_after_a_common_prefix_equals_full_attention(terms):
    torch.manual_seed(0)
    lengths, kv, heads, shared = [9, 6, 7], 2, 4, 4
    q, k, v = (torch.randn(h, sum(lengths), 8) for h in (heads, kv, kv))
    position = torch.cat([torch.arange(n) for n in lengths])
    slot = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    late = position >= shared
    for x in (k, v):  # what the sequences begin with is the same for all
        x[:, ~late] = x[:, :shared].repeat(1, 3, 1)
    want = PackedContext(lengths).attend(0, q, k, v, None, terms)
    cache = KVCache({0: (kv, 8, 8)}, torch.float32, CPU)
    cache.lay_out(3, 9)
    first = PrefillContext(cache, [shared], slot[:shared], position[:shared])
    first.attend(0, q[:, :shared], k[:, :shared], v[:, :shared], None, terms)
    prefix = Prefix(cache, shared)
    prefix.write(cache, torch.arange(3))
    context = PrefillContext(cache, [n - shared for n in lengths], slot[late], position[late], prefix)
    assert context.max_length == 9
    got = context.attend(0, q[:, late], k[:, late], v[:, late], None, terms)
    torch.testing.assert_close(got, want[late], atol=1e-5, rtol=1e-5)
    for i, length in enumerate(lengths):
        assert torch.equal(cache.k[0][i, :, :length], k[:, slot == i])


def test_chunks_cover_all_slots_and_are_cut_where_it_saves_more_than_it_costs():
    assert chunks_of([9] * 32, heads=2) == [(0, 32, 10)]
    assert chunks_of([99] * 8 + [9] * 3, heads=2) == [(0, 8, 100), (8, 11, 10)]
    assert chunks_of([14] * 8 + [9] * 3, heads=2) == [(0, 11, 15)]
    assert chunks_of([9] * 4 + [99] * 4, heads=2) == [(0, 4, 10), (4, 8, 100)]
    assert [chunk[:2] for chunk in chunks_of(list(range(0, 25600, 100)), 2)] == [(i, i + 16) for i in range(0, 256, 16)]


def test_copied_slots_hold_the_same_tokens():
    cache = KVCache({0: (1, 2, 2)}, torch.float32, CPU)
    cache.lay_out(4, 5)
    cache.k[0][1] = 7.0
    cache.copy_slots(torch.tensor([1, 1]), torch.tensor([0, 3]), 3)
    assert cache.k[0][:, 0, :, 0].tolist() == [[7, 7, 7, 0, 0], [7] * 5, [0] * 5, [7, 7, 7, 0, 0]]
