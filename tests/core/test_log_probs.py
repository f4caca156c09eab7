"""Chunked log-probs against plain autograd over the whole (M, V) logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from steepest.core import log_probs as module
from steepest.core.log_probs import CHUNK_LOGITS, log_softmax, token_log_probs
from steepest.errors import ConfigError
from steepest.rollout.builtin.sampler import sample

M, H, V = 23, 8, 17


def make(seed: int = 0, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """hidden, weight and bias as leaves, and targets."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(M, H), (V, H), (V,)][: 3 if bias else 2]
    leaves = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randint(0, V, (M,), generator=generator)


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula, the whole table at once, in the dtype it is given."""
    z = hidden @ weight.T + (0 if bias is None else bias)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, 1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


def copies(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def padded(leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 0.25},
    {"softcap": 2.0},
    {"temperature": 1.5, "logit_scale": 2.0, "softcap": 3.0},
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_equal_plain_autograd(
    options: dict[str, Any], chunk_tokens: int | None, bias: bool
) -> None:
    leaves, targets = make(bias=bias)
    exact = copies(leaves, torch.float64)
    got = token_log_probs(*padded(leaves), targets, with_entropy=True, chunk_tokens=chunk_tokens, **options)
    want = plain(*padded(exact), targets, **options)
    assert got[1] is not None
    assert got[0].dtype == got[1].dtype == torch.float32
    assert got[0].shape == got[1].shape == (M,)
    for g, w in zip(got, want, strict=True):
        assert_close(g, w.float(), rtol=1e-5, atol=1e-5)
    weights = torch.randn(2, M, generator=torch.Generator().manual_seed(1))
    (weights[0] * got[0] + weights[1] * got[1]).sum().backward()
    (weights[0].double() * want[0] + weights[1].double() * want[1]).sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert_close(leaf.grad, reference.grad.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("part", [0, 1])
def test_each_output_has_its_own_gradient(part: int) -> None:
    leaves, targets = make()
    exact = copies(leaves, torch.float64)
    got = token_log_probs(*padded(leaves), targets, with_entropy=True, chunk_tokens=5, temperature=0.7)[part]
    assert got is not None
    got.sum().backward()
    plain(*padded(exact), targets, temperature=0.7)[part].sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert_close(leaf.grad, reference.grad.float(), rtol=1e-5, atol=2e-5)


def test_by_hand() -> None:
    # logits ln 1, ln 3 -> probabilities 1/4, 3/4; entropy ln 4 - 3/4 ln 3
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3.0)]])
    log_probs, entropies = token_log_probs(hidden, weight, None, torch.tensor([1]), with_entropy=True)
    assert_close(log_probs, torch.tensor([math.log(0.75)]))
    assert_close(entropies, torch.tensor([math.log(4.0) - 0.75 * math.log(3.0)]))
    # temperature 1/2 squares the odds: 1/10, 9/10
    cold, none = token_log_probs(hidden, weight, None, torch.tensor([1]), temperature=0.5)
    assert_close(cold, torch.tensor([math.log(0.9)]))
    assert none is None


@given(st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_chunks_and_token_order_change_nothing(seed: int, chunk_tokens: int) -> None:
    leaves, targets = make(seed)
    other = copies(leaves, torch.float32)
    whole, whole_entropy = token_log_probs(*padded(leaves), targets, with_entropy=True)
    order = torch.randperm(M, generator=torch.Generator().manual_seed(seed))
    parts, parts_entropy = token_log_probs(
        other[0][order], other[1], other[2], targets[order], with_entropy=True, chunk_tokens=chunk_tokens
    )
    assert whole_entropy is not None and parts_entropy is not None
    assert_close(parts, whole[order], rtol=1e-5, atol=1e-5)
    assert_close(parts_entropy, whole_entropy[order], rtol=1e-5, atol=1e-5)
    (whole + whole_entropy).sum().backward()
    (parts + parts_entropy).sum().backward()
    for leaf, one in zip(leaves, other, strict=True):
        assert leaf.grad is not None and one.grad is not None
        assert_close(one.grad, leaf.grad, rtol=1e-5, atol=2e-5)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes, and of those in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.float32 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, Tensor):
                self.numel = max(self.numel, item.numel())
                self.float32 = max(self.float32, item.numel() * (item.dtype == torch.float32))
        return out


def run_and_measure(run: Callable[[], tuple[Tensor, Tensor | None]]) -> int:
    with Largest() as largest:
        log_probs, entropies = run()
        assert entropies is not None
        (log_probs + entropies).sum().backward()
    return largest.numel


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1000, 2, generator=generator, requires_grad=True)
    weight = torch.randn(50, 2, generator=generator, requires_grad=True)
    targets = torch.zeros(1000, dtype=torch.int64)
    # 1000 tokens by 64 at a time are 16 chunks of 62 or 63; hidden and its gradient have 2000 elements
    chunked = run_and_measure(
        lambda: token_log_probs(hidden, weight, None, targets, with_entropy=True, chunk_tokens=64)
    )
    assert chunked == 63 * 50
    # the control: one chunk does make all of them
    whole = run_and_measure(
        lambda: token_log_probs(hidden, weight, None, targets, with_entropy=True, chunk_tokens=1000)
    )
    assert whole == 1000 * 50


def test_a_chunk_holds_sixteen_million_logits_by_default() -> None:
    """200 tokens of 2**17 words are two chunks of 100: 128 would just fit."""
    assert module.CHUNK_LOGITS == 16 * 1024 * 1024 == 128 * 2**17
    hidden, weight = (torch.ones(n, 1, requires_grad=True) for n in (200, 2**17))
    targets = torch.zeros(200, dtype=torch.int64)
    found = run_and_measure(lambda: token_log_probs(hidden, weight, None, targets, with_entropy=True))
    assert found == 100 * 2**17


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_inputs_get_no_gradient(needs: tuple[bool, bool, bool]) -> None:
    leaves, targets = make()
    for leaf, wanted in zip(leaves, needs, strict=True):
        leaf.requires_grad_(wanted)
    exact = copies(leaves, torch.float32)
    token_log_probs(*padded(leaves), targets)[0].sum().backward()
    plain(*padded(exact), targets)[0].sum().backward()
    for leaf, reference, wanted in zip(leaves, exact, needs, strict=True):
        assert (leaf.grad is not None) == wanted
        if leaf.grad is not None:
            assert_close(leaf.grad, reference.grad, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk_tokens", [3, 100])
def test_a_second_backward_pass_gives_the_same_again(softcap: float | None, chunk_tokens: int) -> None:
    """The chunk that stays from the forward pass is used once."""
    (hidden, weight, bias), targets = make()
    found = token_log_probs(
        hidden, weight, bias, targets, with_entropy=True, chunk_tokens=chunk_tokens, softcap=softcap
    )
    assert found[1] is not None
    loss = (found[0] * torch.linspace(-1, 1, len(targets))).sum() + found[1].sum()
    first = torch.autograd.grad(loss, [hidden, weight, bias], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [hidden, weight, bias]), strict=True):
        assert_close(a, b)
        assert a.abs().max() > 0.01


def test_no_tokens() -> None:
    leaves, _ = make()
    log_probs, entropies = token_log_probs(
        leaves[0][:0], leaves[1], leaves[2], torch.zeros(0, dtype=torch.int64), with_entropy=True
    )
    assert entropies is not None
    assert log_probs.shape == entropies.shape == (0,)
    log_probs.sum().backward()
    assert leaves[1].grad is not None
    assert not leaves[1].grad.any()


def test_a_gradient_scatters_into_targets_that_repeat() -> None:
    # all tokens have one target: d sum(log_prob) / d bias = M * (onehot - p) with p uniform
    hidden, weight = torch.zeros(4, 2), torch.zeros(5, 2)
    bias = torch.zeros(5, requires_grad=True)
    token_log_probs(hidden, weight, bias, torch.full((4,), 3), chunk_tokens=3)[0].sum().backward()
    assert bias.grad is not None
    assert_close(bias.grad, torch.tensor([-0.8, -0.8, -0.8, 3.2, -0.8]))


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [3e4], [-3e4]], requires_grad=True)
    log_probs, entropies = token_log_probs(hidden, weight, None, torch.tensor([1, 1]), with_entropy=True)
    assert entropies is not None
    assert_close(log_probs.detach(), torch.tensor([0.0, -6e4]))
    assert_close(entropies.detach(), torch.tensor([0.0, 0.0]))
    (log_probs + entropies).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_half_precision_parameters_get_gradients_of_their_dtype() -> None:
    leaves, targets = make(dtype=torch.bfloat16)
    exact = copies(leaves, torch.float64)
    log_probs, entropies = token_log_probs(*padded(leaves), targets, with_entropy=True, chunk_tokens=5)
    want, want_entropy = plain(*padded(exact), targets)
    assert entropies is not None
    assert log_probs.dtype == entropies.dtype == torch.float32
    # logits of size 5 in bf16 are right to 5 / 256
    assert_close(log_probs, want.float(), rtol=0, atol=0.04)
    assert_close(entropies, want_entropy.float(), rtol=0, atol=0.04)
    log_probs.sum().backward()
    want.sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert leaf.grad.dtype == torch.bfloat16
        assert_close(leaf.grad.float(), reference.grad.float(), rtol=0.03, atol=0.15)


def test_weight_gradients_add_up_in_fp32() -> None:
    # Two tokens of the vocabulary, p = 1/2 each; every chunk adds 0.5 to the gradient of the target's row. Sums in
    # bf16 stop growing at 128, where 0.5 is below half a step; 600 * 0.5 = 300 must come out.
    hidden = torch.ones(600, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    token_log_probs(hidden, weight, bias, torch.zeros(600, dtype=torch.int64), chunk_tokens=1)[0].sum().backward()
    assert weight.grad is not None and bias.grad is not None
    assert weight.grad.tolist() == [[300.0], [-300.0]]
    assert bias.grad.tolist() == [300.0, -300.0]


def test_autocast_chooses_the_dtype_of_the_product_and_nothing_else() -> None:
    leaves, targets = make()
    low = copies(leaves, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, entropies = token_log_probs(*padded(leaves), targets, with_entropy=True, chunk_tokens=5)
        assert entropies is not None
        (log_probs + entropies).sum().backward()  # backward inside autocast must not be caught by it
    assert log_probs.dtype == torch.float32
    # the same product as bf16 factors give; the bias is added in fp32 on both sides
    bias = low[2].detach().float()
    hidden, weight = low[0].detach(), low[1].detach()
    want = torch.log_softmax((hidden @ weight.T).float() + leaves[2].detach(), 1).gather(1, targets[:, None])[:, 0]
    assert_close(log_probs.detach(), want, rtol=1e-6, atol=1e-6)
    assert not torch.equal(bias, leaves[2].detach())
    fp32, _ = token_log_probs(*padded(copies(leaves, torch.float32)), targets)
    assert (log_probs - fp32).abs().max() > 1e-4  # the control: fp32 gives other numbers
    exact = copies(leaves, torch.float64)
    sum_of = plain(*padded(exact), targets)
    (sum_of[0] + sum_of[1]).sum().backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert_close(leaf.grad, reference.grad.float(), rtol=0.03, atol=0.15)


def test_without_autocast_the_product_runs_in_the_dtype_of_hidden() -> None:
    leaves, targets = make()
    hidden = leaves[0].detach().bfloat16().requires_grad_()
    log_probs, _ = token_log_probs(hidden, leaves[1], None, targets)
    low, _ = token_log_probs(hidden.detach(), leaves[1].detach().bfloat16(), None, targets)
    assert torch.equal(log_probs, low)
    log_probs.sum().backward()
    assert hidden.grad is not None and leaves[1].grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert leaves[1].grad.dtype == torch.float32


Compute = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def entropy_curve(compute: Compute, num_steps: int = 50) -> list[float]:
    """Mean entropy at each step of a training that pushes towards the targets and holds on to some entropy."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 16, generator=generator).requires_grad_()
    weight = (torch.randn(40, 16, generator=generator) * 0.3).requires_grad_()
    targets = torch.randint(0, 40, (64,), generator=generator)
    optimizer = torch.optim.AdamW([hidden, weight], lr=0.02)
    curve = []
    for _ in range(num_steps):
        log_probs, entropies = compute(hidden, weight, targets)
        optimizer.zero_grad()
        (-log_probs.mean() - 0.1 * entropies.mean()).backward()
        optimizer.step()
        curve.append(entropies.mean().item())
    return curve


def test_fifty_steps_of_training_have_the_entropy_curve_of_the_whole_table() -> None:
    # Trap 27: a chunk that rounds its share shows only after dozens of steps.
    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_probs, entropies = token_log_probs(hidden, weight, None, targets, with_entropy=True, chunk_tokens=7)
        assert entropies is not None
        return log_probs, entropies

    def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return plain(hidden, weight, None, targets)

    got, want = entropy_curve(chunked), entropy_curve(whole)
    assert got == pytest.approx(want, abs=1e-4)
    assert want[0] - want[-1] > 1.0  # the control: the curve moves


def test_fifty_steps_under_autocast_drift_no_further_than_the_whole_table_does() -> None:
    def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_probs, entropies = token_log_probs(hidden, weight, None, targets, with_entropy=True, chunk_tokens=7)
        assert entropies is not None
        return log_probs, entropies

    got = entropy_curve(chunked)
    want = entropy_curve(lambda hidden, weight, targets: plain(hidden, weight, None, targets))
    # bf16 factors are right to 1/256; the curve must stay within that of fp32, and on both sides of it
    assert got == pytest.approx(want, abs=0.02)


def test_wrong_arguments_are_named() -> None:
    leaves, targets = make()
    for temperature in (0.0, -1.0):
        with pytest.raises(ConfigError, match=r"^temperature=.*above 0"):
            token_log_probs(*padded(leaves), targets, temperature=temperature)
    with pytest.raises(ValueError, match=r"targets \(3,\) do not fit"):
        token_log_probs(*padded(leaves), targets[:3])
    with pytest.raises(ValueError, match=r"weight \(17, 7\)"):
        token_log_probs(leaves[0], leaves[1][:, :7], None, targets)


@pytest.mark.parametrize("vocabulary", [32_000, 152_000, 262_000])
def test_memory_is_flat_in_vocabulary_and_tokens(vocabulary):
    """Two chunks of tokens: nothing is larger than one chunk's logits, forward and backward."""
    chunk = CHUNK_LOGITS // vocabulary
    num_tokens, size = 2 * chunk, 4
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, size, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, size, generator=generator, requires_grad=True)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    with Largest() as largest:
        log_probs, entropies = token_log_probs(hidden, weight, None, targets, with_entropy=True)
        (log_probs.sum() + entropies.sum()).backward()
    assert chunk * vocabulary == largest.numel <= CHUNK_LOGITS
    assert largest.numel * 2 == num_tokens * vocabulary > 1.9 * CHUNK_LOGITS


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("vocabulary", [8192, 49_152, 262_144])
def test_a_large_vocabulary_adds_no_bias(vocabulary: int, softcap: float | None) -> None:
    """torch's kernel for the CPU makes each log-prob 2.8e-5 too high at 262,144 tokens. Of engine, trainer and
    `log_softmax` none may."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(16, 4, generator=generator), 1.5 * torch.randn(vocabulary, 4, generator=generator)
    targets = torch.randint(vocabulary, (16,), generator=generator)
    exact = plain(hidden.double(), weight.double(), None, targets, softcap=softcap)
    found, entropies = token_log_probs(hidden, weight, None, targets, with_entropy=True, softcap=softcap)
    alone, _ = token_log_probs(hidden, weight, None, targets, softcap=softcap)
    assert entropies is not None and torch.equal(found, alone)
    for got, want in ((found, exact[0]), (entropies, exact[1])):
        assert abs(float((got.double() - want).mean())) < 1e-6
        assert_close(got.double(), want, atol=4e-6, rtol=0)
    if softcap is None:
        logits = hidden @ weight.T
        whole = log_softmax(logits).gather(1, targets[:, None])[:, 0].double()
        token, sampled = sample(logits, torch.linspace(0.1, 0.9, 16))
        of_sampled = plain(hidden.double(), weight.double(), None, token)[0]
        for got, want in ((whole, exact[0]), (sampled.double(), of_sampled)):
            assert abs(float((got - want).mean())) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [7, None])
@pytest.mark.parametrize("options", OPTIONS)
def test_in_bf16_all_but_the_products_is_exact(options: dict[str, Any], chunk_tokens: int | None) -> None:
    """Against float64 on the logits that the product in bf16 gives. Gradients are rounded to bf16 once on the way."""
    leaves, targets = make(dtype=torch.bfloat16)
    low = copies(leaves, torch.float32)
    rounded = (leaves[0] @ leaves[1].T).detach().double()
    # logits with the rounded numbers, and the gradients of those that were not rounded
    exact = copies(leaves, torch.float64)
    product = exact[0] @ exact[1].T
    product = product + (rounded - product).detach()
    want = plain(product, torch.eye(V, dtype=torch.float64), exact[2], targets, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_log_probs(*padded(low), targets, with_entropy=True, chunk_tokens=chunk_tokens, **options)
    assert got[1] is not None
    for g, w in zip(got, want, strict=True):
        assert_close(g, w.float(), rtol=1e-5, atol=1e-5)
    (got[0] + 0.3 * got[1]).sum().backward()
    (want[0] + 0.3 * want[1]).sum().backward()
    for leaf, reference in zip(low, exact, strict=True):
        assert leaf.grad is not None and reference.grad is not None
        assert float((leaf.grad - reference.grad).norm()) < 2**-8 * float(reference.grad.norm())


def test_in_bf16_no_float32_table_of_all_logits_and_no_copy_of_the_weight() -> None:
    """20 tokens over 70,000 words: two blocks of fp32 logits one after another, and a weight that is bf16 already."""
    tokens, vocabulary = 20, 70_000
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (tokens, vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    low = weight.detach().bfloat16()
    with Largest() as largest, torch.autocast("cpu", dtype=torch.bfloat16):
        found, entropies = token_log_probs(hidden, weight, None, targets, with_entropy=True, half=lambda _: low)
    assert entropies is not None
    assert largest.numel == tokens * vocabulary, "the logits in bf16, and no larger chunk"
    assert largest.float32 <= 2**20
    want = plain(hidden.detach().bfloat16().float(), low.float(), None, targets)
    assert_close(found, want[0], rtol=0, atol=0.05)
    with Largest() as largest:
        (found + entropies).sum().backward()
    assert largest.float32 == max(vocabulary * 4, 14 * vocabulary), "the weight's gradient, or a block of logits"
