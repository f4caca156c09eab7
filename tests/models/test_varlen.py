"""The device's own attention: chosen with a reason, equal to packed SDPA, tried before it is used."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from steepest.devices.backends.cpu import CPUDevice
from steepest.devices.backends.cuda import CUDADevice
from steepest.devices.backends.npu import NPUDevice
from steepest.errors import ConfigError, ModelError
from steepest.models.attention import PackedContext
from steepest.models.varlen import Attention, VarlenContext, check_varlen, choose_attention
from tests.support.tiny_models import tiny_lm

KEY = "critic.model.override_config.attn_implementation"
LENGTHS = (3, 17, 1, 40, 9)


def kernel(query, key, value, *, ends, lengths, scale):
    """A VarlenAttention in plain torch, that takes its sequences from `ends`."""
    outs = []
    for start, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True))
    return torch.cat(outs, 1).transpose(0, 1)


def made(dtype=torch.float32, size=8):
    torch.manual_seed(0)
    return [torch.randn(heads, sum(LENGTHS), size, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def test_it_equals_packed_sdpa_in_values_and_gradients():
    parts = made()
    weight = torch.randn(sum(LENGTHS), 4, 8)
    for scale in (0.3, None):
        found = VarlenContext(LENGTHS, "cpu", kernel).attend(0, *parts, scale)
        want = PackedContext(LENGTHS).attend(0, *parts, scale)
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad((out * weight).sum(), parts) for out in (found, want)]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_what_a_kernel_is_given():
    seen = {}

    def note(query, key, value, **rest):
        seen.update(rest, shapes=[tuple(x.shape) for x in (query, key, value)], dtypes={x.dtype for x in (query, key)})
        seen["contiguous"] = all(x.is_contiguous() for x in (query, key, value))
        return query

    context = VarlenContext(LENGTHS, "cpu", note)
    assert context.max_length == 40
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context.attend(3, *made(), None)
    assert seen["ends"].tolist() == [0, 3, 20, 21, 61, 70] and seen["ends"].dtype == torch.int32
    assert seen["lengths"] == LENGTHS and seen["scale"] == 8**-0.5 and seen["contiguous"]
    assert seen["shapes"] == [(70, 4, 8), (70, 2, 8), (70, 2, 8)]
    assert seen["dtypes"] == {torch.bfloat16}, "queries of a norm over fp32 weights are fp32 under autocast"


def test_values_of_another_size_than_keys_are_refused():
    q, k, _ = made()
    with pytest.raises(ModelError, match=r"values have another size \(6\) than its keys \(8\).*=sdpa"):
        VarlenContext(LENGTHS, "cpu", kernel).attend(0, q, k, torch.zeros(2, 70, 6), None)


def test_a_model_with_it_has_the_same_log_probs_and_gradients():
    from steepest.models.packing import pack_sequences

    model = tiny_lm()
    ids = [[1, 5, 7, 2], [3, 4], [9, 8, 7, 6, 5, 4, 3]]
    packed = pack_sequences(ids, [[False] + [True] * (len(row) - 1) for row in ids])
    found = {}
    for attention in (Attention(), Attention("flash_attention_2", "", kernel)):
        model.attention = attention
        model.zero_grad()
        log_probs, _ = model.log_probs(packed)
        log_probs.square().sum().backward()
        found[attention.name] = [log_probs.detach(), *(p.grad.clone() for p in model.parameters())]
    for mine, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    assert model.copy_as(torch.bfloat16).attention.kernel is None, "the rollout engine's copy keeps to SDPA"


@pytest.mark.parametrize(
    ("asked", "device", "dtype", "name", "why"),
    [
        (None, CPUDevice(), torch.bfloat16, "sdpa", "cpu has no fused attention for packed sequences"),
        (None, NPUDevice(), torch.bfloat16, "flash_attention_2", "torch-npu has a fused attention"),
        (None, NPUDevice(), torch.float32, "sdpa", "the fused attention computes in bfloat16, not in float32"),
        ("products", CPUDevice(), torch.bfloat16, "products", f"asked for by {KEY}"),
        ("sdpa", NPUDevice(), torch.bfloat16, "sdpa", f"asked for by {KEY}"),
        ("flash_attention_2", NPUDevice(), torch.bfloat16, "flash_attention_2", f"asked for by {KEY}"),
    ],
)
def test_the_choice_and_its_reason(asked, device, dtype, name, why):
    found = choose_attention(asked, device, dtype, KEY)
    assert (found.name, found.why, found.kernel is None) == (name, why, name in ("sdpa", "products"))
    assert found.describe() == f"{name}, on packed sequences ({why})"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("flash_attention_2", f"{KEY}=flash_attention_2: it cannot run here: cpu has no fused attention"),
        (
            "eager",
            f"{KEY}=eager: no such attention over packed sequences. Known: flash_attention_2, sdpa, products. Leave",
        ),
    ],
)
def test_what_is_asked_for_is_never_replaced(asked, words):
    with pytest.raises(ConfigError) as caught:
        choose_attention(asked, CPUDevice(), torch.bfloat16, KEY)
    assert str(caught.value).startswith(words)


def sees_ahead(query, key, value, *, ends, lengths, scale):
    return kernel(query.flip(0), key.flip(0), value.flip(0), ends=ends, lengths=lengths, scale=scale).flip(0)


def one_sequence(query, key, value, *, ends, lengths, scale):
    return kernel(query, key, value, ends=ends[[0, -1]], lengths=lengths, scale=scale)


def other_scale(query, key, value, *, ends, lengths, scale):
    return kernel(query, key, value, ends=ends, lengths=lengths, scale=1.0)


def not_a_number(query, key, value, **rest):
    return kernel(query, key, value, **rest) * float("nan")


def no_gradient_to_values(query, key, value, **rest):
    return kernel(query, key, value.detach(), **rest) + 0 * value.sum()


def other_card(query, key, value, **rest):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")


def other_version(query, key, value):
    return query


def trial(chosen):
    attention = Attention("flash_attention_2", "", chosen, KEY)
    check_varlen(attention, tiny_lm().config, torch.device("cpu"), torch.bfloat16)


def test_a_right_kernel_passes_its_trial():
    heads = []

    def counted(query, key, value, **rest):
        heads.append((query.shape[1], key.shape[1]))
        return kernel(query, key, value, **rest)

    trial(counted)
    assert heads and all(query >= key for query, key in heads)
    assert trial(None) is None, "packed SDPA has no kernel to try"


@pytest.mark.parametrize("wrong", [sees_ahead, one_sequence, other_scale, not_a_number, no_gradient_to_values])
def test_a_kernel_with_other_numbers_does_not(wrong):
    with pytest.raises(ModelError, match=rf"flash_attention_2 differs from plain attention by .* or set {KEY}=sdpa"):
        trial(wrong)


def test_nor_does_one_that_fails():
    with pytest.raises(
        ModelError, match=r"fails for \d+ heads of \d+ \(FlashAttention only supports Ampere GPUs or ne"
    ):
        trial(other_card)
    with pytest.raises(ModelError, match=r"fails for .*unexpected keyword argument"):
        trial(other_version)


def test_flash_attn_is_called_by_its_public_interface(monkeypatch):
    """The package's own signature, with plain torch behind it: what can be known of it without a card."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert causal and dropout_p == 0.0 and max_seqlen_q == max_seqlen_k == max(LENGTHS)
        assert q.dtype == torch.bfloat16 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        return kernel(q, k, v, ends=cu_seqlens_q, lengths=None, scale=softmax_scale)

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    found = choose_attention(None, CUDADevice(), torch.bfloat16, KEY)
    assert (found.name, found.why) == ("flash_attention_2", "the package flash-attn is installed")
    parts = made(torch.bfloat16)
    out = VarlenContext(LENGTHS, "cpu", found.kernel).attend(0, *parts, None)
    torch.testing.assert_close(out, PackedContext(LENGTHS).attend(0, *parts, None), atol=0.02, rtol=0.02)
