"""Sums and maxima over the ranks of a run: what makes a number of one rank a number of the whole batch.

A rank holds a part of the rows, or of the gradients. Whatever is a mean, a count or a norm of all of them is made of
sums and maxima that a `Reducer` takes over the ranks. In one process it is `Identity`, which changes no bit.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """Adds up, or takes the largest, over all ranks. Every rank has to call the same methods in the same order.

    The argument is a tensor of any shape, the same on every rank, on the CPU or on the rank's device; the result has
    its shape, dtype and device, is the same on every rank and has no gradient. The argument is not changed. `max` need
    not return NaN where a rank has one.
    """

    def sum(self, value: Tensor) -> Tensor: ...
    def max(self, value: Tensor) -> Tensor: ...


class Identity:
    """The reducer of one process: the argument itself."""

    def sum(self, value: Tensor) -> Tensor:
        return value

    def max(self, value: Tensor) -> Tensor:
        return value


IDENTITY = Identity()
