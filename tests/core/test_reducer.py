"""Numbers over ranks: those of all rows where each rank has a part of them, and in one process not a bit changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steepest.core.aggregation import LossDenominators
from steepest.core.masked import masked_mean, masked_var, whiten
from steepest.core.reducer import IDENTITY
from steepest.core.value_losses import explained_variance

NAN = float("nan")


class Recorded:
    """A reducer that is asked by one rank after the other: first it writes down, then it knows the others' parts."""

    def __init__(self, parts: dict[int, list[Tensor]], rank: int) -> None:
        self.parts, self.rank, self.calls = parts, rank, 0

    def _all(self, value: Tensor) -> Tensor:
        mine = self.parts.setdefault(self.rank, [])
        if len(mine) == self.calls:
            mine.append(value.clone())
        mine[self.calls] = value.clone()
        found = torch.stack(
            [self.parts[rank][self.calls] for rank in sorted(self.parts) if len(self.parts[rank]) > self.calls]
        )
        self.calls += 1
        return found

    def sum(self, value: Tensor) -> Tensor:
        return self._all(value).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return self._all(value).amax(0)


def on_ranks(jobs: Sequence[Callable[[Any], Any]], rounds: int = 6) -> list[Any]:
    """Each job with the reducer of its rank, again and again until later calls have seen earlier sums of all."""
    parts: dict[int, list[Tensor]] = {}
    found: list[Any] = []
    for _ in range(rounds):
        found = [job(Recorded(parts, rank)) for rank, job in enumerate(jobs)]
    return found


def inputs(seed: int, rows: int = 6) -> tuple[Tensor, Tensor]:
    """(x, mask), with NaN where the mask is false and one row without a true position."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, 5, generator=g) < 0.6
    mask[1] = False
    mask[0, 0] = mask[-1, 1] = True
    return torch.where(mask, torch.randn(rows, 5, generator=g) * 10 ** (seed % 5 - 2), NAN), mask


def whiten_as_it_was(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    centred = torch.where(mask, x - masked_mean(x, mask), torch.zeros_like(x))
    var = centred.square().sum() / (mask.sum() - 1).clamp(min=1)
    return centred * torch.rsqrt(var + eps)


def explained_as_it_was(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    true_returns = returns[mask]
    if true_returns.numel() == 0 or bool(true_returns.max() == true_returns.min()):
        return None
    return 1.0 - float(masked_var(returns - values, mask) / masked_var(returns, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_in_one_process_whitening_changes_no_bit(dtype):
    for seed in range(60):
        x, mask = inputs(seed, rows=3 + seed % 7)
        x = x.to(dtype)
        if seed % 9 == 0:
            mask = torch.zeros_like(mask).index_fill_(1, torch.tensor([0]), seed % 2 == 0)
            x = torch.where(mask, 1.5, x.nan_to_num(0))
        assert torch.equal(whiten(x, mask), whiten_as_it_was(x, mask))
        assert torch.equal(whiten(x, mask, reducer=IDENTITY), whiten_as_it_was(x, mask))


def test_in_one_process_the_explained_variance_changes_no_bit():
    for seed in range(40):
        (returns, mask), (values, _) = inputs(seed), inputs(seed + 100)
        values = values.nan_to_num(0.5)
        if seed % 8 == 0:
            returns = torch.where(mask, 2.0, returns)
        if seed % 8 == 1:
            mask = torch.zeros_like(mask)
        assert explained_variance(values, returns, mask) == explained_as_it_was(values, returns, mask)
    nan = explained_variance(torch.zeros(1, 2), torch.tensor([[NAN, 1.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert nan is not None and nan != nan


def test_the_identity_gives_its_argument():
    x = torch.ones(2)
    assert IDENTITY.sum(x) is x and IDENTITY.max(x) is x


@pytest.mark.parametrize("cut", [1, 2, 5, 6])
def test_whitening_over_ranks_is_that_of_all_rows(cut):
    """Trap 40: a rank that whitened its own rows would take their mean away. With 6 a rank has no row at all."""
    for seed in range(5):
        x, mask = inputs(seed)
        parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
        found = on_ranks([lambda reducer, p=part: whiten(*p, reducer=reducer) for part in parts])
        torch.testing.assert_close(torch.cat(found), whiten(x, mask), rtol=1e-5, atol=1e-6)
        spread = on_ranks([lambda reducer, p=part: masked_var(*p, reducer) for part in parts])
        torch.testing.assert_close(torch.stack(spread), masked_var(x, mask).expand(2))


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_counts_and_explained_variance_over_ranks_are_those_of_all_rows(seed, cut):
    (returns, mask), (values, _) = inputs(seed), inputs(seed + 100)
    values = values.nan_to_num(0.5)
    rows = (slice(0, cut), slice(cut, None))
    counts = on_ranks([lambda reducer, r=r: LossDenominators.of(mask[r], reducer) for r in rows])
    assert counts == [LossDenominators.of(mask)] * 2
    explained = on_ranks(
        [lambda reducer, r=r: explained_variance(values[r], returns[r], mask[r], reducer) for r in rows]
    )
    assert explained == [pytest.approx(explained_variance(values, returns, mask), rel=1e-4)] * 2


def test_returns_that_vary_between_ranks_only_do_vary():
    mask, values = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3)
    varied = on_ranks(
        [lambda reducer, r=r: explained_variance(values, torch.full((1, 3), r), mask, reducer) for r in (1.0, 2.0)]
    )
    assert varied[0] == varied[1] == pytest.approx(0.0)
    equal = on_ranks([lambda reducer: explained_variance(values, torch.ones(1, 3), mask, reducer)] * 2)
    assert equal == [None, None]
