"""Metrics that state what they average: token means within a mini-batch, then the mean over mini-batches."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.reducer import IDENTITY, Reducer

Metrics = dict[str, float]


class Sums:
    """Sums and maxima over the micro-batches of one mini-batch. Tensors stay on their device until `read`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar."""
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_token_mean(self, name: str, values: Tensor, mask: Tensor, num_tokens: float) -> None:
        """Add this micro-batch's share of a mean over the mini-batch's `num_tokens` policy tokens. values: (b, T)."""
        self.add(name, values.detach().float().masked_fill(~mask, 0.0).sum() / num_tokens)

    def take_max(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._maxima[name] = value.maximum(self._maxima[name]) if name in self._maxima else value

    def read(self, reducer: Reducer = IDENTITY) -> Metrics:
        """The numbers, by one transfer for all of them: on an accelerator each one waits for the device.

        `reducer` makes them those of all ranks; each has to have added the same names in the same order.
        """
        sums, maxima = list(self._sums.values()), list(self._maxima.values())
        found = [reducer.sum(torch.stack(sums))] if sums else []
        found += [reducer.max(torch.stack(maxima))] if maxima else []
        names = [*self._sums, *self._maxima]
        return dict(zip(names, torch.cat(found).tolist(), strict=True)) if found else {}


class Means:
    """Plain means over the mini-batches of one training step, and counts."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._values.setdefault(name, []).append(value)

    def count(self, name: str, number: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + number

    def read(self) -> Metrics:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        return means | {name: float(number) for name, number in self._counts.items()}
