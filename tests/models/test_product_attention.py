"""Attention by plain products against torch's own: values, gradients, long sequences, memory, and the choice."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from steepest.models.attention import PackedContext, Terms
from steepest.models.packing import pack_sequences
from steepest.models.product_attention import BLOCK, KEPT, CausalProducts, ProductContext
from steepest.models.varlen import Attention
from tests.support.tiny_models import random_ids, tiny_lm

LENGTHS = [BLOCK + 7, 12, BLOCK, 2, 5]
"""Two buckets; one of them needs two blocks."""


def outcome(
    kind: type[PackedContext], lengths: Sequence[int], dtype: torch.dtype, *, heads: int = 4, scale: float | None = None
) -> list[Tensor]:
    """Output and gradients for queries of `heads` heads, two key heads, values of another size than keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, 8), (2, 8), (2, 6)
    made = [torch.randn(h, sum(lengths), size, generator=generator).to(dtype) for h, size in shapes]
    parts = [part.requires_grad_() for part in made]
    out = kind(lengths).attend(0, parts[0], parts[1], parts[2], scale)
    weight = torch.randn(out.shape, generator=generator).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, weight)]


@pytest.mark.parametrize(("lengths", "scale"), [(LENGTHS, None), ([4, 4, 4], 0.3), ([1], None), ([KEPT + 1], None)])
def test_it_is_torch_s_attention(lengths, scale):
    want = outcome(PackedContext, lengths, torch.float64, scale=scale)
    for mine, theirs in zip(outcome(ProductContext, lengths, torch.float64, scale=scale), want, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_in_bf16_it_is_as_near_to_float32_as_torch_s():
    """Inputs are those of bf16, so what differs is rounding within attention: 2^-9 of a number and step."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(h, sum(LENGTHS), s, generator=generator).bfloat16().float() for h, s in ((4, 8), (2, 8), (2, 6))
    ]
    parts = [part.requires_grad_() for part in made]
    out = PackedContext(LENGTHS).attend(0, parts[0], parts[1], parts[2], None)
    weight = torch.randn(out.shape, generator=generator).bfloat16().float()
    want = [out.detach(), *torch.autograd.grad(out, parts, weight)]
    outcomes = (outcome(kind, LENGTHS, torch.bfloat16) for kind in (ProductContext, PackedContext))
    for mine, torchs, exact in zip(*outcomes, want, strict=True):
        assert mine.dtype == torch.bfloat16
        off, theirs = ((x.float() - exact).norm() / exact.norm() for x in (mine, torchs))
        assert off < 1.5 * theirs + 2**-9


def test_large_scores_are_not_rounded_to_bf16():
    """Keys with a large part in common: scores near 900, whose differences bf16 would lose (steps of 4)."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 20, 8, generator=generator) for _ in range(3))
    q, k, v = ((q + 18).bfloat16(), (k + 18).bfloat16(), v.bfloat16())
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    found = CausalProducts.apply(q, k, v, 8**-0.5)
    assert float((found - want).abs().max()) < 2**-7 * float(want.abs().max())


def test_a_long_sequence_keeps_no_probabilities():
    def kept(length: int) -> int:
        sizes: list[int] = []
        parts = [torch.randn(2, length, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            out = ProductContext([length]).attend(0, *parts, None)
        del out
        return sum(sizes) // length

    assert kept(BLOCK) == 3 * 2 * 8 + 2 * BLOCK, "three tensors of two heads, and two rows of probabilities"
    assert kept(KEPT + 1) == 3 * 2 * 8


@pytest.mark.parametrize("terms", [Terms(window=3), Terms(softcap=0.7), Terms(sinks=torch.tensor([0.3, -1.0]))])
def test_layers_with_terms_take_torch_s(terms):
    x = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0))
    found, want = (kind([6, 5]).attend(0, x, x, x, None, terms) for kind in (ProductContext, PackedContext))
    assert torch.equal(found, want)


@pytest.mark.parametrize("half", [False, True])
def test_a_model_has_the_same_log_probs_and_gradients(half):
    model = tiny_lm("qwen2")
    ids = random_ids([9, 5, 12, 70])
    packed = pack_sequences(ids, [[False] + [True] * (len(row) - 1) for row in ids])
    found = []
    for name in ("sdpa", "products"):
        model.attention = Attention(name)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            log_probs, _ = model.log_probs(packed)
            with torch.no_grad():
                assert torch.equal(model.log_probs(packed)[0], log_probs), "the ratio of a first update is 1"
        log_probs.square().sum().backward()
        found.append([log_probs.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).norm()) < (0.1 if half else 1e-5) * float(theirs.norm())
    assert not torch.equal(found[0][0], found[1][0]), "another way to compute it"
