"""Working weights: the copy follows its master, and is never out of date."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from steepest.models.working_weights import copied_bytes, drop, half, keep, refresh, working


def kept(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    keep([weight])
    return weight


def test_the_copy_is_one_tensor_with_the_masters_numbers():
    weight = kept(3, 4)
    assert half(weight).dtype == torch.bfloat16 and torch.equal(half(weight), weight.bfloat16())
    assert half(weight) is half(weight) and not half(weight).requires_grad
    assert copied_bytes([weight]) == 2 * 12


def test_a_weight_in_bf16_is_its_own_copy_and_one_that_is_not_kept_is_cast_each_time():
    low, other = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(3))
    keep([low])
    assert half(low) is low and working(low) is low
    assert half(other) is not half(other) and torch.equal(half(other), other.bfloat16())
    assert copied_bytes([low, other]) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(3.0),
        lambda weight: weight[1].zero_(),
        lambda weight: setattr(weight, "data", torch.full((3, 4), 7.0)),
        lambda weight: weight.copy_(torch.ones(3, 4)),
    ],
    ids=["in place", "through a view", "other memory", "copied"],
)
def test_a_change_behind_its_back_is_seen_and_written_in_place(change):
    weight = kept(3, 4)
    copied = half(weight)
    with torch.no_grad():
        change(weight)
    assert not torch.equal(copied, weight.bfloat16())
    assert half(weight) is copied and torch.equal(copied, weight.bfloat16())


def test_refresh_writes_into_the_same_memory_and_makes_no_copy():
    weight, other = kept(3, 4), nn.Parameter(torch.ones(3))
    copied = half(weight)
    with torch.no_grad():
        weight.add_(1.0)
    refresh([weight, other])
    assert torch.equal(copied, weight.bfloat16())
    assert copied_bytes([other]) == 0


def test_the_gradient_arrives_at_the_master_in_float32():
    weight, x = kept(3, 4), torch.randn(5, 4).bfloat16()
    for _ in range(2):
        nn.functional.linear(x, working(weight)).sum().backward()
    once = torch.ones(5, 3).bfloat16().t() @ x
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(weight.grad, 2 * once.float())
    assert not half(weight).requires_grad and half(weight).grad_fn is None


def test_a_step_between_forward_and_backward_is_an_error():
    weight = kept(3, 4)
    x = torch.ones(5, 4, dtype=torch.bfloat16, requires_grad=True)
    loss = nn.functional.linear(x, working(weight)).sum()
    with torch.no_grad():
        weight.add_(1.0)
    refresh([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_written_in_inference_mode_serves_a_backward_pass():
    weight = kept(3, 4)
    with torch.no_grad():
        weight.add_(1.0)
    drop([weight])
    with torch.inference_mode():
        keep([weight])
        half(weight)
    x = torch.ones(5, 4, dtype=torch.bfloat16, requires_grad=True)
    nn.functional.linear(x, working(weight)).sum().backward()
    assert torch.equal(x.grad, half(weight).float().sum(0).bfloat16().expand(5, 4))


def test_a_copy_is_neither_pickled_nor_copied_and_dies_with_its_master():
    weight = kept(3, 4)
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert copied_bytes([other]) == 0 and torch.equal(other, weight)
    from steepest.models import working_weights

    before = len(working_weights._COPIES)
    del weight
    assert len(working_weights._COPIES) == before - 1
