"""Attention of packed sequences equals attention of each sequence alone, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from steepest.errors import ModelError
from steepest.models.attention import PackedContext, RecordingContext, attend_packed, attention_implementation
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

    x = torch.randn(1, 2, 6, 4)
    return attend_packed(Layer(), x, x, x, None, attention_context=context, **extra)


def test_a_call_without_context_is_refused():
    with pytest.raises(ModelError, match="without attention_context"):
        call(None)
    with pytest.raises(ModelError, match="without attention_context"):
        tiny_lm().hf(input_ids=torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    ("extra", "text"),
    [({"softcap": 50.0}, "soft-capping"), ({"s_aux": torch.ones(2)}, "sinks"), ({"dropout": 0.1}, "dropout 0.1")],
)
def test_what_is_not_computed_is_refused(extra, text):
    with pytest.raises(ModelError, match=text):
        call(PackedContext([3, 3]), **extra)


def test_a_sliding_window_counts_only_when_a_sequence_is_longer():
    with_window, _ = call(PackedContext([4, 2]), sliding_window=4)
    assert with_window.shape == (1, 6, 2, 4)
    with pytest.raises(ModelError, match=r"last 3 tokens only .* has 4"):
        call(PackedContext([4, 2]), sliding_window=3)


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
