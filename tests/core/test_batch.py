"""The batch: padding, masks and positions come from lengths, never from token ids."""

from __future__ import annotations

import pytest
import torch

from steepest.core.batch import Batch, RowStatus

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
    batch.leave_out(torch.tensor([F, F, T]), RowStatus.EQUAL_GROUP)
    batch.extras = {"one": torch.tensor([1.0, 2.0, 3.0]), "two": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    picked = batch.select(torch.tensor([2, 0]))
    assert picked.prompts.tolist() == [[0, 4], [0, 1]]
    assert picked.responses.tolist() == [[7, 8], [5, 0]]
    assert picked.samples == ["c", "a"]
    assert picked.group_ids.tolist() == [2, 0]
    assert picked.advantages is not None
    assert picked.advantages.tolist() == [[3.0, 4.0], [1.0, 0.0]]
    assert picked.values is None
    assert picked.row_status.tolist() == [RowStatus.EQUAL_GROUP, RowStatus.TRAINED]
    assert picked.response_mask.tolist() == [[T, T], [T, F]] and picked.loss_mask.tolist() == [[F, F], [T, F]]
    assert {name: extra.tolist() for name, extra in picked.extras.items()} == {"one": [3, 1], "two": [[5, 6], [1, 2]]}
    sliced = batch.select(slice(1, 3))
    assert sliced.samples == ["b", "c"]
    assert sliced.truncated.tolist() == [True, False]


def test_an_empty_response_still_has_a_column() -> None:
    batch = Batch.from_sequences([[1]], [[]], group_ids=[0], truncated=[True])
    assert batch.responses.shape == (1, 1)
    assert batch.response_mask.tolist() == [[False]]


def test_cat_pads_to_the_widest_and_numbers_groups_again() -> None:
    one = Batch.from_sequences(
        [[1, 2]], [[3]], group_ids=[5], truncated=[False], rollout_log_probs=[[-1.0]], samples=["a"], pad_id=9
    )
    two = Batch.from_sequences(
        [[4], [4]], [[5, 6, 7], [8]], group_ids=[5, 5], truncated=[True, False],
        rollout_log_probs=[[-2.0, -3.0, -4.0], [-5.0]], samples=["b", "c"], pad_id=9,
    )  # fmt: skip
    one.leave_out(torch.tensor([True]), RowStatus.TRUNCATED)
    two.loss_mask = torch.tensor([[False, True, True], [True, False, False]])
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
    assert both.row_status.tolist() == [RowStatus.TRUNCATED, 0, 0]
    assert both.loss_mask.tolist() == [[False] * 3, [False, True, True], [True, False, False]]
    none = one.select(torch.zeros(1, dtype=torch.bool))
    assert len(Batch.cat([none, two, none], pad_id=9)) == 2 and Batch.cat([none, two]).group_ids.tolist() == [0, 0]
    two.values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="values is None in some of the parts only"):
        Batch.cat([one, two])


def documented() -> Batch:
    """The example of the docstring of Batch."""
    return Batch.from_sequences(
        [[5, 6, 7], [8]],
        [[31, 40, 32, 2], [33, 34]],
        response_mask=[[T, F, T, T], [T, T]],
        group_ids=[0, 1],
        truncated=[F, T],
    )


def test_the_example_of_the_docstring_holds() -> None:
    batch = documented()
    assert batch.prompts.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.responses.tolist() == [[31, 40, 32, 2], [33, 34, 0, 0]]
    assert batch.response_mask.tolist() == [[T, F, T, T], [T, T, F, F]]
    assert batch.attention_mask.tolist() == [[T] * 7, [F, F, T, T, T, F, F]], "tool output is read"
    assert batch.row_status.tolist() == [RowStatus.TRAINED] * 2
    assert torch.equal(batch.loss_mask, batch.response_mask) and torch.equal(batch.trained_mask, batch.response_mask)
    batch.leave_out(torch.tensor([F, T]), RowStatus.REWARD_FAILED)
    batch.loss_mask = batch.loss_mask & torch.tensor([[T, T, F, T], [T, T, T, T]])
    assert batch.row_status.tolist() == [0, 1]
    assert batch.response_mask.tolist() == [[T, F, T, T], [T, T, F, F]]
    assert batch.trained_mask.tolist() == [[T, F, T, T], [F, F, F, F]]
    assert batch.loss_mask.tolist() == [[T, F, F, T], [F, F, F, F]]


def test_a_mask_of_another_length_than_its_response_is_refused() -> None:
    rows = {"prompts": [[1], [1]], "responses": [[2, 3], [4]], "group_ids": [0, 1], "truncated": [F, F]}
    with pytest.raises(ValueError, match="row 1: response_mask has 2 entries for 1 response tokens"):
        Batch.from_sequences(**rows, response_mask=[[T, T], [T, T]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        Batch.from_sequences(**rows, response_mask=[[T, T]])  # type: ignore[arg-type]


def test_the_last_policy_token_is_the_last_true_one_and_minus_one_without_any() -> None:
    batch = Batch.from_sequences(
        [[1]] * 4,
        [[2, 3, 4, 5], [2, 3], [2, 3, 4], []],
        response_mask=[[T, F, T, F], [T, T], [F, F, F], []],
        group_ids=[0] * 4,
        truncated=[F] * 4,
    )
    assert batch.last_policy_token.tolist() == [2, 1, -1, -1]


def test_the_first_reason_to_leave_a_row_out_is_kept() -> None:
    batch = Batch.from_sequences([[1]] * 3, [[2, 3]] * 3, group_ids=[0, 0, 1], truncated=[F] * 3)
    batch.leave_out(torch.tensor([T, F, F]), RowStatus.REWARD_FAILED)
    batch.leave_out(torch.tensor([T, T, F]), RowStatus.TRUNCATED)
    batch.leave_out(torch.tensor([T, T, F]), RowStatus.REJECTED)
    assert batch.row_status.tolist() == [RowStatus.REWARD_FAILED, RowStatus.TRUNCATED, RowStatus.TRAINED]
    assert batch.trained_mask.tolist() == batch.loss_mask.tolist() == [[F, F], [F, F], [T, T]]
    with pytest.raises(ValueError, match="TRAINED is no reason"):
        batch.leave_out(torch.tensor([T, F, F]), RowStatus.TRAINED)


def test_leaving_rows_out_of_a_selection_leaves_the_whole_batch_alone() -> None:
    whole = documented()
    whole.select(slice(0, 1)).leave_out(torch.tensor([T]), RowStatus.REJECTED)
    assert whole.row_status.tolist() == [0, 0] and torch.equal(whole.loss_mask, whole.response_mask)


def test_the_loss_mask_is_a_subset_of_the_trained_mask_after_any_sequence_of_writers() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(0, 6, (5,), generator=g).tolist()
        batch = Batch.from_sequences(
            [[1]] * 5,
            [[2] * n for n in lengths],
            response_mask=[(torch.rand(n, generator=g) > 0.4).tolist() for n in lengths],
            group_ids=range(5),
            truncated=[F] * 5,
        )
        written = batch.response_mask.clone()
        for status in torch.randint(1, 5, (3,), generator=g).tolist():
            batch.leave_out(torch.rand(5, generator=g) > 0.7, RowStatus(status))
            batch.loss_mask = batch.loss_mask & (torch.rand(written.shape, generator=g) > 0.3)
            assert not (batch.loss_mask & ~batch.trained_mask).any()
            assert not (batch.trained_mask & ~batch.response_mask).any()
            assert torch.equal(batch.response_mask, written)
            rows = torch.randperm(5, generator=g)[:3]
            both = Batch.cat([batch.select(rows), batch])
            for name in ("response_mask", "row_status", "loss_mask", "trained_mask"):
                mine = getattr(batch, name)
                assert torch.equal(getattr(both, name), torch.cat([mine[rows], mine])), name


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
