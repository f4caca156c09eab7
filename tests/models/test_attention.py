"""Attention of packed sequences equals attention of each sequence alone, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steepest.errors import ModelError
from steepest.models.attention import (
    CannotPack,
    PackedContext,
    RecordingContext,
    Terms,
    attend_packed,
    attention_implementation,
)
from steepest.models.causal_lm import run_backbone
from tests.support.tiny_models import tiny_lm


@pytest.mark.parametrize("lengths", [[4, 4, 4], [70, 3, 50, 1, 33, 68], [1]])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_packed_attention_equals_each_sequence_alone(lengths, heads):
    torch.manual_seed(0)
    num, kv = heads
    q = torch.randn(num, sum(lengths), 8, requires_grad=True)
    k = torch.randn(kv, sum(lengths), 8, requires_grad=True)
    v = torch.randn(kv, sum(lengths), 6, requires_grad=True)
    weight = torch.randn(sum(lengths), num, 6)
    out = PackedContext(lengths).attend(0, q, k, v, 0.3)
    grads = torch.autograd.grad((out * weight).sum(), (q, k, v))

    alone, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        keys, values = (x[:, part].repeat_interleave(num // kv, 0) for x in (k, v))
        scores = (q[:, part] @ keys.transpose(1, 2) * 0.3).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        alone.append((F.softmax(scores, -1) @ values).transpose(0, 1))
        start += n
    want = torch.cat(alone)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(grads, torch.autograd.grad((want * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_similar_lengths_share_few_buckets():
    context = PackedContext([100, 99, 90, 76, 40, 20, 3])
    assert context._buckets == [(4, 100), (1, 40), (2, 20)]


def call(context, **extra):
    class Layer(torch.nn.Module):
        layer_idx = 0

    x = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    return attend_packed(Layer(), x, x, x, None, attention_context=context, **extra)


def test_what_packed_sequences_cannot_honour_is_named():
    with pytest.raises(CannotPack, match="does not pass keyword arguments"):
        call(None)
    with pytest.raises(CannotPack, match="does not pass keyword arguments"):
        tiny_lm().hf(input_ids=torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(CannotPack, match="position bias"):
        call(PackedContext([3, 3]), position_bias=torch.ones(1))
    with pytest.raises(ModelError, match=r"dropout 0\.1"):
        call(PackedContext([3, 3]), dropout=0.1)


def by_hand(q, k, v, terms: Terms):
    """(H, n, D) -> (n, H, D): each token by itself, over the places that it sees."""
    num, kv = len(q), len(k)
    out = []
    for head in range(num):
        keys, values = k[head // (num // kv)], v[head // (num // kv)]
        for i in range(q.shape[1]):
            first = 0 if terms.window is None else max(0, i + 1 - terms.window)
            scores = 0.3 * keys[first : i + 1] @ q[head, i]
            if terms.softcap is not None:
                scores = terms.softcap * torch.tanh(scores / terms.softcap)
            if terms.sinks is not None:
                scores = torch.cat([scores, terms.sinks[head : head + 1]])
            out.append(scores.softmax(0)[: i + 1 - first] @ values[first : i + 1])
    return torch.stack(out).view(num, q.shape[1], -1).transpose(0, 1)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(window=3),
        Terms(window=6),  # as long as the longest sequence: it hides nothing
        Terms(softcap=0.7),
        Terms(window=1, softcap=0.7, sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])),
    ],
    ids=["window", "wide window", "soft cap", "all"],
)
def test_windows_soft_caps_and_sinks_equal_a_loop_over_tokens(terms):
    lengths = [6, 2, 5]
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, sum(lengths), 8, requires_grad=True) for h in (4, 2, 2))
    weight = torch.randn(sum(lengths), 4, 8)
    found = PackedContext(lengths).attend(0, q, k, v, 0.3, terms)
    want = torch.cat([by_hand(*parts, terms) for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)])
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    grads = [torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, want)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_sinks_are_trained():
    sinks = torch.zeros(2, requires_grad=True)
    out, _ = call(PackedContext([4, 2]), s_aux=sinks)
    out.sum().backward()
    assert float(sinks.grad.abs().min()) > 0


def test_a_window_counts_only_when_a_sequence_is_longer():
    plain, _ = call(PackedContext([4, 2]))
    wide, _ = call(PackedContext([4, 2]), sliding_window=4)
    narrow, _ = call(PackedContext([4, 2]), sliding_window=3)
    assert torch.equal(plain, wide)
    assert torch.equal(narrow[0, :3], plain[0, :3]) and not torch.allclose(narrow[0, 3], plain[0, 3])


def test_a_layer_that_attends_twice_is_found():
    context = RecordingContext([3, 3])
    call(context)
    with pytest.raises(CannotPack, match="more than once"):
        call(context)


def test_recording_context_notes_key_and_value_shapes():
    model, context = tiny_lm(), RecordingContext([3])
    run_backbone(model.hf.base_model, torch.tensor([4, 5, 6]), torch.arange(3), context)
    assert context.shapes == {0: (2, 8, 8), 1: (2, 8, 8)}


def test_other_implementation_is_switched_back_after_an_error():
    model = tiny_lm()
    with pytest.raises(RuntimeError, match="inside"), attention_implementation(model.hf, "eager"):
        assert model.config._attn_implementation == "eager"
        raise RuntimeError("inside")
    assert model.config._attn_implementation == "steepest"
