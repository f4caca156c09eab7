"""A prompt computed once for several responses: attention, log-probs, values, gradients of the rows by themselves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from steepest.core.batch import Batch
from steepest.models.packing import SharedPrompts, pack_batch, pack_shared, scatter
from steepest.models.shared_prompts import SharedPromptContext
from tests.support.tiny_models import FAMILIES, tiny_critic, tiny_lm

# (prompt, responses): two of unequal lengths, one alone, three of one length
GROUPS = [(7, (4, 9)), (5, (6,)), (40, (33, 33, 33))]


def make_batch(groups=GROUPS, vocabulary: int = 20, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    prompts, responses, ids = [], [], []
    for group, (size, lengths) in enumerate(groups):
        prompt = torch.randint(1, vocabulary, (size,), generator=g).tolist()
        for length in lengths:
            prompts.append(prompt)
            responses.append(torch.randint(1, vocabulary, (length,), generator=g).tolist())
            ids.append(group)
    return Batch.from_sequences(prompts, responses, group_ids=ids, truncated=[False] * len(ids))


def test_a_prompt_lies_in_the_pack_once_and_predicts_each_first_token():
    batch = Batch.from_sequences(
        [[1, 2, 3], [4, 5], [1, 2, 3]],
        [[6, 7], [8], [9]],
        group_ids=[0, 1, 0],  # a group need not lie side by side
        truncated=[False] * 3,
    )
    packed = pack_shared(batch, batch.response_mask)
    assert packed.input_ids.tolist() == [1, 2, 3, 6, 7, 9, 4, 5, 8]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert packed.lengths == (5, 3, 4), "in the order of the rows"
    assert packed.shared == SharedPrompts(segments=(3, 2, 1, 3), spans=((0, 3, 6),))
    assert (packed.rows.tolist(), packed.cols.tolist()) == ([0, 0, 1, 2], [0, 1, 0, 0])
    assert packed.predict_index.tolist() == [2, 3, 7, 2]
    assert packed.targets.tolist() == [6, 7, 8, 9]
    assert packed.final_index.tolist() == [4, 8, 5]


def test_a_batch_without_groups_is_packed_as_ever():
    batch = make_batch([(3, (2,)), (4, (5,))])
    shared, plain = pack_shared(batch, batch.response_mask), pack_batch(batch, batch.response_mask)
    assert shared.shared is None and torch.equal(shared.input_ids, plain.input_ids)


def test_rows_of_a_group_with_other_prompts_are_refused():
    batch = make_batch([(3, (2, 2))])
    prompts = batch.prompts.clone()
    prompts[1, 0] += 1
    with pytest.raises(ValueError, match="rows of one group have different prompts"):
        pack_shared(dataclasses.replace(batch, prompts=prompts), batch.response_mask)


def alone(batch: Batch, x: torch.Tensor, packed) -> list[torch.Tensor]:
    """(h, N, D) of the shared pack -> (h, n, D) of each row, its prompt repeated."""
    parts, place, rows = [], 0, iter(range(len(batch)))
    for size, lengths in GROUPS:
        start, place = place, place + size
        for length in lengths:
            parts.append(torch.cat([x[:, start : start + size], x[:, place : place + length]], 1))
            place += length
            next(rows)
    return parts


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("value_size", [8, 6])
def test_attention_equals_each_row_by_itself(heads, value_size):
    torch.manual_seed(0)
    num, kv = heads
    batch = make_batch()
    packed = pack_shared(batch, batch.response_mask)
    total = len(packed.input_ids)
    q, k = torch.randn(num, total, 8, requires_grad=True), torch.randn(kv, total, 8, requires_grad=True)
    v = torch.randn(kv, total, value_size, requires_grad=True)
    context = SharedPromptContext(packed.shared, max(packed.lengths))
    # 7x4 + 7x9 and 40x99 pairs over the prompts, and those of each causal segment
    own = sum(n * (n + 1) // 2 for n in (7, 4, 9, 11, 40, 33, 33, 33))
    assert context.max_length == 73 and context.num_pairs == own + 7 * 13 + 40 * 99
    out = context.attend(0, q, k, v, 0.3)
    want, weights, mine = [], [], []
    outs = alone(batch, out.transpose(0, 1), packed)
    for one, *parts in zip(outs, *(alone(batch, x, packed) for x in (q, k, v)), strict=True):
        one_q, one_k, one_v = parts
        keys, values = (x.repeat_interleave(num // kv, 0) for x in (one_k, one_v))
        n = one_q.shape[1]
        scores = (one_q @ keys.transpose(1, 2) * 0.3).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        want.append(F.softmax(scores, -1) @ values)
        weights.append(torch.randn(want[-1].shape))
        mine.append(one)
    for one, theirs in zip(mine, want, strict=True):
        torch.testing.assert_close(one, theirs, atol=1e-5, rtol=1e-5)
    loss = sum((a * w).sum() for a, w in zip(mine, weights, strict=True))
    wanted = sum((a * w).sum() for a, w in zip(want, weights, strict=True))
    grads, expected = torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(wanted, (q, k, v))
    for one, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_rows_by_themselves_in_every_family(family):
    batch = make_batch()
    backbone = tiny_lm(family).double()
    plain, shared = (
        backbone.hidden_states(p.input_ids, p.position_ids, backbone.attention.context(p))[p.predict_index]
        for p in (pack_batch(batch, batch.response_mask), pack_shared(batch, batch.response_mask))
    )
    assert plain.dtype == torch.float64 and (plain - shared).abs().max() < 1e-6  # rotary tables are float32
    assert plain.std() > 0.1


WITH_TERMS = {
    "mistral": {"sliding_window": 5},
    "gemma2": {"attn_logit_softcapping": 2.0, "sliding_window": 12, "head_dim": 8},
}


@pytest.mark.parametrize("family", WITH_TERMS)
def test_windows_and_soft_caps_are_those_of_rows_by_themselves(family):
    """Windows shorter than prompts and responses; also a prompt whose responses are empty."""
    batch = make_batch([*GROUPS, (6, (0, 0))])
    model = tiny_lm(family, **WITH_TERMS[family]).double()
    plain, shared = (
        model.hidden_states(p.input_ids, p.position_ids, model.attention.context(p))
        for p in (pack_batch(batch, batch.response_mask), pack_shared(batch, batch.response_mask))
    )
    packed = pack_batch(batch, batch.response_mask), pack_shared(batch, batch.response_mask)
    for index in ("predict_index", "final_index"):
        one, other = (x[getattr(p, index)] for x, p in zip((plain, shared), packed, strict=True))
        assert (one - other).abs().max() < 1e-6
    weight = torch.randn(plain[packed[0].predict_index].shape, generator=torch.Generator().manual_seed(0)).double()
    grads = [
        torch.autograd.grad((x[p.predict_index] * weight).sum(), list(model.hf.model.parameters()))
        for x, p in zip((plain, shared), packed, strict=True)
    ]
    for one, other in zip(*grads, strict=True):
        assert (one - other).abs().max() < 1e-5 * max(1.0, float(one.abs().max()))


def results(model, packed, batch) -> list[torch.Tensor]:
    """log-probs, entropies, and the gradients of a loss of both."""
    log_probs, entropies = model.log_probs(packed, with_entropy=True)
    shape = tuple(batch.responses.shape)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    loss = (scatter(log_probs, packed, shape) * weight).sum() + scatter(entropies, packed, shape).sum()
    return [log_probs, entropies, *torch.autograd.grad(loss, list(model.parameters()))]


def test_log_probs_entropies_and_gradients_equal_those_of_rows_by_themselves():
    batch, model = make_batch(), tiny_lm()
    plain, shared = (results(model, pack(batch, batch.response_mask), batch) for pack in (pack_batch, pack_shared))
    assert len(plain) > 20
    for one, theirs in zip(shared, plain, strict=True):
        assert (one - theirs).norm() <= 1e-5 * theirs.norm()


def test_values_before_and_after_each_response_equal_those_of_rows_by_themselves():
    batch, critic = make_batch(), tiny_critic()
    (plain, last), (shared, shared_last) = (
        critic.values(pack(batch, batch.response_mask), with_final=True) for pack in (pack_batch, pack_shared)
    )
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared_last, last, atol=1e-5, rtol=1e-5)
    assert plain.std() > 0.1 and len(last) == 6


def test_half_precision_rounds_both_alike():
    batch, model = make_batch(), tiny_lm()
    with torch.no_grad():
        exact = model.log_probs(pack_batch(batch, batch.response_mask))[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain, shared = (
                (model.log_probs(pack(batch, batch.response_mask))[0] - exact).abs().mean()
                for pack in (pack_batch, pack_shared)
            )
    assert 0 < shared < 1.5 * plain
