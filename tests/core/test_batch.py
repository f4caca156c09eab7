"""The batch: padding, masks and positions come from lengths, never from token ids."""

from __future__ import annotations

import pytest
import torch

from steepest.core.batch import Batch

T, F = True, False


def test_prompts_are_padded_left_and_responses_right() -> None:
    batch = Batch.from_sequences(
        [[5, 6, 7], [8]],
        [[9], [3, 4]],
        group_ids=[0, 1],
        truncated=[False, True],
        rollout_log_probs=[[-0.5], [-1.5, -2.5]],
        pad_id=99,
    )
    assert batch.prompts.tolist() == [[5, 6, 7], [99, 99, 8]]
    assert batch.responses.tolist() == [[9, 99], [3, 4]]
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 99], [99, 99, 8, 3, 4]]
    assert batch.attention_mask.tolist() == [[T, T, T, T, F], [F, F, T, T, T]]
    # padding on the left has position 0; the count starts at the first real token
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    assert batch.response_mask.tolist() == [[T, F], [T, T]]
    assert batch.rollout_log_probs is not None
    assert batch.rollout_log_probs.tolist() == [[-0.5, 0.0], [-1.5, -2.5]]
    assert batch.prompt_lengths.tolist() == [3, 1]
    assert batch.response_lengths.tolist() == [1, 2]
    assert batch.lengths.tolist() == [4, 3]
    assert batch.group_ids.tolist() == [0, 1]
    assert batch.truncated.tolist() == [False, True]
    assert len(batch) == 2
    assert batch.responses.dtype == torch.int64
    assert batch.response_mask.dtype == torch.bool
    assert batch.rollout_log_probs.dtype == torch.float32


def test_every_end_token_counts_and_nothing_after_it() -> None:
    # Trap 4. Two end ids, 2 and 7. The engine stops at the first of either and hands over what it produced, the end
    # token included; the third answer was cut by the length limit.
    batch = Batch.from_sequences(
        [[1]] * 4,
        [[5, 2], [5, 6, 3, 7], [5, 6, 3, 4, 5], [2]],
        group_ids=[0, 0, 1, 1],
        truncated=[False, False, True, False],
    )
    assert batch.response_mask.tolist() == [
        [T, T, F, F, F],  # 5 <end 2>
        [T, T, T, T, F],  # 5 6 3 <end 7>
        [T, T, T, T, T],  # cut
        [T, F, F, F, F],  # <end 2> at once: one token, not none
    ]
    assert batch.response_mask.sum().item() == 12


def test_a_pad_id_equal_to_the_end_id_changes_no_mask() -> None:
    # Trap 5. With pad = end = 2, a mask made by `!= pad` would drop the end token, and the 2 inside the prompt.
    rows = {"prompts": [[2, 5], [5]], "responses": [[6, 2], [6, 7, 8, 2]], "group_ids": [0, 1], "truncated": [F, F]}
    same = Batch.from_sequences(**rows, pad_id=2)  # type: ignore[arg-type]
    other = Batch.from_sequences(**rows, pad_id=0)  # type: ignore[arg-type]
    assert same.responses.tolist() == [[6, 2, 2, 2], [6, 7, 8, 2]]
    assert same.response_mask.tolist() == [[T, T, F, F], [T, T, T, T]]
    assert same.attention_mask.tolist() == [[T, T, T, T, F, F], [F, T, T, T, T, T]]
    for name in ("response_mask", "attention_mask", "position_ids", "lengths"):
        assert torch.equal(getattr(same, name), getattr(other, name)), name


def test_select_takes_rows_of_every_field_in_the_order_given() -> None:
    batch = Batch.from_sequences(
        [[1], [2, 3], [4]], [[5], [6], [7, 8]], group_ids=[0, 1, 2], truncated=[F, T, F], samples=["a", "b", "c"]
    )
    batch.advantages = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
    batch.extras = {"one": torch.tensor([1.0, 2.0, 3.0]), "two": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    picked = batch.select(torch.tensor([2, 0]))
    assert picked.prompts.tolist() == [[0, 4], [0, 1]]
    assert picked.responses.tolist() == [[7, 8], [5, 0]]
    assert picked.samples == ["c", "a"]
    assert picked.group_ids.tolist() == [2, 0]
    assert picked.advantages is not None
    assert picked.advantages.tolist() == [[3.0, 4.0], [1.0, 0.0]]
    assert picked.values is None
    assert {name: extra.tolist() for name, extra in picked.extras.items()} == {"one": [3, 1], "two": [[5, 6], [1, 2]]}
    sliced = batch.select(slice(1, 3))
    assert sliced.samples == ["b", "c"]
    assert sliced.truncated.tolist() == [True, False]


def test_an_empty_response_still_has_a_column() -> None:
    batch = Batch.from_sequences([[1]], [[]], group_ids=[0], truncated=[True])
    assert batch.responses.shape == (1, 1)
    assert batch.response_mask.tolist() == [[False]]


def test_cat_pads_to_the_widest_and_numbers_groups_anew() -> None:
    one = Batch.from_sequences(
        [[1, 2]], [[3]], group_ids=[5], truncated=[False], rollout_log_probs=[[-1.0]], samples=["a"], pad_id=9
    )
    two = Batch.from_sequences(
        [[4], [4]], [[5, 6, 7], [8]], group_ids=[5, 5], truncated=[True, False],
        rollout_log_probs=[[-2.0, -3.0, -4.0], [-5.0]], samples=["b", "c"], pad_id=9,
    )  # fmt: skip
    both = Batch.cat([one, two], pad_id=9)
    assert both.prompts.tolist() == [[1, 2], [9, 4], [9, 4]]
    assert both.responses.tolist() == [[3, 9, 9], [5, 6, 7], [8, 9, 9]]
    assert both.response_mask.tolist() == [[True, False, False], [True, True, True], [True, False, False]]
    assert both.rollout_log_probs is not None and both.rollout_log_probs[0].tolist() == [-1.0, 0.0, 0.0]
    assert both.group_ids.tolist() == [0, 1, 1] and both.samples == ["a", "b", "c"]
    assert both.truncated.tolist() == [False, True, False] and both.values is None
    whole = Batch.from_sequences(
        [[1, 2], [4], [4]], [[3], [5, 6, 7], [8]], group_ids=[0, 1, 1], truncated=[False, True, False], pad_id=9
    )
    assert torch.equal(both.position_ids, whole.position_ids) and torch.equal(both.input_ids, whole.input_ids)
    none = one.select(torch.zeros(1, dtype=torch.bool))
    assert len(Batch.cat([none, two, none], pad_id=9)) == 2 and Batch.cat([none, two]).group_ids.tolist() == [0, 0]
    two.values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="values is None in some of the parts only"):
        Batch.cat([one, two])


def test_cat_joins_extras_row_by_row() -> None:
    one = Batch.from_sequences([[1]], [[3]], group_ids=[0], truncated=[False])
    two = Batch.from_sequences([[4], [4]], [[5, 6], [8]], group_ids=[0, 0], truncated=[False, False])
    one.extras = {"row": torch.tensor([1.0]), "token": torch.tensor([[2.0]])}
    two.extras = {"row": torch.tensor([3.0, 4.0]), "token": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}
    both = Batch.cat([one, two], pad_id=9)
    assert both.extras["row"].tolist() == [1, 3, 4] and both.extras["token"].tolist() == [[2, 0], [5, 6], [7, 8]]
    assert one.extras["row"].tolist() == [1]
    for missing_in in (one, two):
        kept, missing_in.extras = missing_in.extras, {"token": missing_in.extras["token"]}
        with pytest.raises(ValueError, match=r"Batch.cat: extras\['row'\] is missing in some of the parts only"):
            Batch.cat([one, two])
        missing_in.extras = kept
