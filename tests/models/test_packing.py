"""Places of targets, checked against literals; scatter puts them back."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from steepest.core.batch import Batch
from steepest.models.packing import pack_batch, pack_sequences, scatter


def two_rows() -> Batch:
    return Batch.from_sequences(
        [[11, 12, 13], [21]], [[14, 15], [22, 23, 24]], group_ids=[0, 1], truncated=[False, False], pad_id=15
    )


def test_pack_batch_keeps_real_tokens_only_even_when_the_pad_id_is_a_real_token():
    packed = pack_batch(two_rows(), two_rows().response_mask)
    assert packed.input_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert packed.lengths == (5, 4)
    # the token before each response token: 13 -> 14, 14 -> 15 | 21 -> 22, 22 -> 23, 23 -> 24
    assert packed.predict_index.tolist() == [2, 3, 5, 6, 7]
    assert packed.targets.tolist() == [14, 15, 22, 23, 24]
    assert packed.rows.tolist() == [0, 0, 1, 1, 1]
    assert packed.cols.tolist() == [0, 1, 0, 1, 2]
    assert packed.final_index.tolist() == [4, 8]


def test_pack_batch_scores_only_tokens_the_policy_produced():
    batch = two_rows()
    mask = batch.response_mask.clone()
    mask[1, 1] = False  # a tool token: still read, not scored
    packed = pack_batch(batch, mask)
    assert packed.input_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24]
    assert packed.targets.tolist() == [14, 15, 22, 24]
    assert packed.predict_index.tolist() == [2, 3, 5, 7]


def test_pack_batch_does_not_depend_on_padding_width():
    narrow = pack_batch(two_rows(), two_rows().response_mask)
    wide_batch = Batch.from_sequences(
        [[1] * 6, [11, 12, 13], [21]],
        [[1] * 7, [14, 15], [22, 23, 24]],
        group_ids=[0, 1, 2],
        truncated=[False] * 3,
    ).select(torch.tensor([1, 2]))
    wide = pack_batch(wide_batch, wide_batch.response_mask)
    for field in dataclasses.fields(narrow):
        mine, theirs = getattr(narrow, field.name), getattr(wide, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, field.name


def test_empty_prompt_is_refused():
    batch = Batch.from_sequences([[1], []], [[2], [3]], group_ids=[0, 1], truncated=[False, False])
    with pytest.raises(ValueError, match="row 1 .* empty prompt"):
        pack_batch(batch, batch.response_mask)


def test_pack_sequences_uses_the_sequence_as_columns():
    packed = pack_sequences([[5, 6, 7], [8, 9]], [[False, True, True], [False, True]])
    assert packed.targets.tolist() == [6, 7, 9]
    assert packed.predict_index.tolist() == [0, 1, 3]
    assert packed.rows.tolist() == [0, 0, 1]
    assert packed.cols.tolist() == [1, 2, 1]
    assert packed.final_index.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("ids", "mask", "text"),
    [([[1, 2]], [[True, True]], "first token"), ([[]], [[]], "at least 1"), ([[1, 2]], [[False]], "loss mask of 1")],
)
def test_pack_sequences_refuses_what_nothing_predicts(ids, mask, text):
    with pytest.raises(ValueError, match=text):
        pack_sequences(ids, mask)


def test_scatter_fills_places_and_carries_gradients():
    packed = pack_batch(two_rows(), two_rows().response_mask)
    values = torch.arange(1.0, 6.0, requires_grad=True)
    full = scatter(values, packed, (2, 4))
    assert full.tolist() == [[1, 2, 0, 0], [3, 4, 5, 0]]
    (full * torch.tensor([[10.0, 20, 30, 40], [50, 60, 70, 80]])).sum().backward()
    assert values.grad.tolist() == [10, 20, 50, 60, 70]
