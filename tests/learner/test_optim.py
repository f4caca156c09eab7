from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from steepest.errors import CheckpointError, ModelError
from steepest.learner.optim import Optimizer, OptimSettings, load_optimizer, lr_factor, save_optimizer
from steepest.models.working_weights import half, keep


def factors(settings, count):
    return [lr_factor(i, settings) for i in range(count)]


def test_constant_without_warmup_is_the_full_rate_from_the_first_step():
    assert factors(OptimSettings(lr=1.0), 3) == [1.0, 1.0, 1.0]


def test_warmup_by_hand():
    settings = OptimSettings(lr=1.0, warmup_steps=4)
    assert factors(settings, 6) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    later = OptimSettings(lr=1.0, warmup_steps=4, zero_indexed_step=False)
    assert factors(later, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_by_hand():
    # warm-up 1, 5 steps: p = 0, 1/4, 1/2, 3/4; floor 0.2: 0.6 + 0.4 cos(pi p)
    settings = OptimSettings(lr=1.0, schedule="cosine", warmup_steps=1, total_steps=5, min_lr_ratio=0.2)
    root = math.sqrt(0.5)
    want = [0.0, 1.0, 0.6 + 0.4 * root, 0.6, 0.6 - 0.4 * root, 0.2]
    assert factors(settings, 6) == pytest.approx(want, abs=1e-12)
    # past the end the rate stays at the floor instead of rising again
    assert factors(settings, 9)[6:] == pytest.approx([0.2] * 3, abs=1e-12)


@pytest.mark.parametrize("warmup, cycles", [(0, 0.5), (3, 0.5), (2, 1.5)])
def test_schedules_are_those_of_transformers(warmup, cycles):
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    constant = get_constant_schedule_with_warmup(sgd, warmup).lr_lambdas[0]
    cosine = get_cosine_schedule_with_warmup(sgd, warmup, 20, cycles).lr_lambdas[0]
    ours = OptimSettings(lr=1.0, warmup_steps=warmup)
    assert factors(ours, 21) == pytest.approx([constant(i) for i in range(21)], abs=1e-12)
    ours = OptimSettings(lr=1.0, schedule="cosine", warmup_steps=warmup, total_steps=20, num_cycles=cycles)
    assert factors(ours, 21) == pytest.approx([cosine(i) for i in range(21)], abs=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schedule": "cosine"}, "needs the number of training steps"),
        ({"schedule": "linear"}, "constant or cosine"),
        ({"clip_grad": 0.0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        OptimSettings(lr=1.0, **changes)


def make(lr=0.1, start=(1.0, -2.0), **changes):
    weight = nn.Parameter(torch.tensor(start))
    return weight, Optimizer([("w", weight)], OptimSettings(lr=lr, **changes))


def test_first_adamw_step_by_hand():
    # m_hat = g, v_hat = g^2, so the step is lr * sign(g); decay first: w (1 - lr wd) - lr sign(g)
    weight, optimizer = make(lr=0.1, weight_decay=0.5, clip_grad=None)
    weight.grad = torch.tensor([3.0, -0.01])
    norm, taken = optimizer.step()
    assert (norm, taken) == (pytest.approx(math.hypot(3.0, 0.01)), True)
    assert weight.tolist() == pytest.approx([0.95 - 0.1, -1.9 + 0.1], abs=1e-5)
    assert weight.grad is None


def test_decay_acts_on_norms_and_biases_too():
    bias, norm = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Optimizer([("layer.bias", bias), ("norm.weight", norm)], OptimSettings(lr=0.1, weight_decay=0.5))
    bias.grad, norm.grad = torch.zeros(3), torch.zeros(3)
    optimizer.step()
    assert bias.tolist() == norm.tolist() == pytest.approx([0.95] * 3)


def test_gradients_are_clipped_by_their_global_norm():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = Optimizer([("a", a), ("b", b)], OptimSettings(lr=0.1, clip_grad=1.0))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    norm, _ = optimizer.step()
    # exp_avg = 0.1 * clipped gradient; 3/5 and 4/5 of a norm of 1
    assert norm == pytest.approx(5.0)
    assert optimizer.tensors()["a.exp_avg"].item() == pytest.approx(0.06, abs=1e-6)
    assert optimizer.tensors()["b.exp_avg"].item() == pytest.approx(0.08, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step_and_says_so(bad, caplog):
    weight, optimizer = make()
    weight.grad = torch.tensor([0.5, 0.5])
    optimizer.step()
    before, moments = weight.detach().clone(), {k: v.clone() for k, v in optimizer.tensors().items()}
    weight.grad = torch.tensor([1.0, bad])
    with caplog.at_level(logging.WARNING):
        norm, taken = optimizer.step()
    assert not taken and not math.isfinite(norm)
    assert torch.equal(weight, before) and weight.grad is None
    assert all(torch.equal(value, moments[name]) for name, value in optimizer.tensors().items())
    assert optimizer.num_skipped == 1
    assert "first bad gradient: w" in caplog.text and "Skipped so far: 1" in caplog.text


def test_a_norm_that_overflows_skips_the_step_too(caplog):
    weight, optimizer = make()
    weight.grad = torch.tensor([3e38, 3e38])
    _, taken = optimizer.step()
    assert not taken and "their norm overflows" in caplog.text


def test_learning_rate_zero_changes_no_bit_but_fills_the_moments():
    weight, optimizer = make(lr=0.0, start=(0.1, -1e-8))
    before = weight.detach().clone()
    weight.grad = torch.tensor([1.0, -1.0])
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.tensors()["w.exp_avg"].abs().min() > 0


def test_the_schedule_moves_per_iteration_not_per_optimizer_step():
    weight, optimizer = make(lr=1.0, warmup_steps=4)
    seen = []
    for _ in range(3):
        for _ in range(5):
            seen.append(optimizer.lr)
            weight.grad = torch.ones(2)
            optimizer.step()
        optimizer.schedule_step()
    assert seen == [0.0] * 5 + [0.25] * 5 + [0.5] * 5


def test_small_steps_survive_in_float32_and_bfloat16_masters_are_refused():
    # 1 - 1e-6 is a float32; in bfloat16 it is 1, which is why such masters are refused
    weight, optimizer = make(lr=1e-6, start=(1.0, 1.0), weight_decay=0.0)
    weight.grad = torch.ones(2)
    optimizer.step()
    assert weight[0].item() == pytest.approx(1 - 1e-6, abs=1e-7) and weight[0].item() != 1.0
    assert torch.tensor(1 - 1e-6).bfloat16().item() == 1.0
    with pytest.raises(ModelError, match="parameter w is torch.bfloat16: master weights have to be float32"):
        Optimizer([("w", nn.Parameter(torch.ones(2, dtype=torch.bfloat16)))], OptimSettings(lr=1e-6))


def test_state_goes_through_files_by_name_bit_for_bit(tmp_path):
    def run(optimizer, weight, count, seed):
        g = torch.Generator().manual_seed(seed)
        for _ in range(count):
            weight.grad = torch.randn(2, generator=g)
            optimizer.step()
            optimizer.schedule_step()

    settings = dict(schedule="cosine", total_steps=6, warmup_steps=1)
    weight, optimizer = make(**settings)
    run(optimizer, weight, 2, seed=1)
    save_optimizer(optimizer, tmp_path)
    other_weight, other = make(start=weight.tolist(), **settings)
    load_optimizer(other, tmp_path)
    assert other.iterations == 2 and other.lr == optimizer.lr
    assert other.tensors()["w.step"].item() == 2.0
    run(optimizer, weight, 3, seed=2)
    run(other, other_weight, 3, seed=2)
    assert torch.equal(weight, other_weight)


def test_a_state_before_the_first_step_is_empty_and_loads(tmp_path):
    _, optimizer = make()
    save_optimizer(optimizer, tmp_path)
    _, other = make()
    load_optimizer(other, tmp_path)
    assert other.tensors() == {} and other.iterations == 0


def test_a_state_of_another_model_is_refused(tmp_path):
    weight, optimizer = make()
    weight.grad = torch.ones(2)
    optimizer.step()
    save_optimizer(optimizer, tmp_path)
    wrong_name = Optimizer([("v", nn.Parameter(torch.ones(2)))], OptimSettings(lr=1.0))
    with pytest.raises(CheckpointError, match="has 'w' \\(1 such\\), which is no parameter of this model"):
        load_optimizer(wrong_name, tmp_path)
    wrong_shape = Optimizer([("w", nn.Parameter(torch.ones(3)))], OptimSettings(lr=1.0))
    with pytest.raises(CheckpointError, match=r"has \(2,\) for 'w.exp_avg'; the model needs \(3,\)"):
        load_optimizer(wrong_shape, tmp_path)
    (tmp_path / "optimizer.json").unlink()
    with pytest.raises(CheckpointError, match="has no optimizer.json"):
        load_optimizer(make()[1], tmp_path)


def test_frozen_parameters_are_left_alone():
    frozen, free = nn.Parameter(torch.ones(1), requires_grad=False), nn.Parameter(torch.ones(1))
    optimizer = Optimizer([("frozen", frozen), ("free", free)], OptimSettings(lr=0.1))
    free.grad = torch.ones(1)
    optimizer.step()
    assert frozen.item() == 1.0 and set(optimizer.tensors()) == {"free.exp_avg", "free.exp_avg_sq", "free.step"}


def test_a_loaded_state_is_a_copy():
    weight, optimizer = make()
    weight.grad = torch.ones(2)
    optimizer.step()
    other_weight, other = make()
    other.load(optimizer.tensors(), optimizer.numbers())
    before = {name: value.clone() for name, value in optimizer.tensors().items()}
    other_weight.grad = torch.ones(2)
    other.step()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.tensors().items())
    assert other.tensors()["w.step"].item() == 2.0


def test_a_step_is_taken_at_the_rate_of_its_place_in_the_schedule():
    """Adam's first step is the rate, whatever the gradient: 0 in the first training step, then half of the peak."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = Optimizer([("p", parameter)], OptimSettings(lr=0.1, warmup_steps=2, weight_decay=0.0))
    found = []
    for _ in range(3):
        parameter.grad = torch.ones(1)
        optimizer.step()
        optimizer.schedule_step()
        found.append(parameter.item())
    assert found == pytest.approx([1.0, 0.95, 0.85], abs=1e-5)


def test_a_step_counts_as_a_change_of_the_weight_and_writes_its_copy_and_a_skipped_one_does_not():
    """Engines know by the version that they are out of date; torch's fused AdamW leaves it as it is."""
    weight = nn.Parameter(torch.ones(3))
    keep([weight])
    copy, optimizer = half(weight), Optimizer([("w", weight)], OptimSettings(lr=0.1))
    for gradient, changes in ((1.0, True), (math.nan, False)):
        before, number = weight._version, float(copy[0])
        weight.grad = torch.full((3,), gradient)
        optimizer.step()
        assert (weight._version > before) == changes == (float(copy[0]) != number)
        assert torch.equal(copy, weight.detach().bfloat16())
