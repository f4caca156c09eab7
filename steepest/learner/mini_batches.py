"""Mini-batches: which rows of a step's batch share one optimizer step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steepest.learner.micro_batches import MicroBatches


@dataclass(frozen=True)
class UpdateSettings:
    """How often and in which pieces one batch is used for an update."""

    mini_batch_rows: int
    """Rows (responses, not prompts) per optimizer step."""
    micro: MicroBatches = field(default_factory=MicroBatches)
    """How a mini-batch is cut into forward and backward passes."""
    epochs: int = 1
    """Passes over the batch."""
    shuffle: bool = False
    """False: contiguous rows in order. True: a new order per epoch."""
    seed: int = 42
    """Seed of the shuffle."""

    def __post_init__(self) -> None:
        if self.mini_batch_rows < 1 or self.epochs < 1:
            raise ValueError(f"mini_batch_rows={self.mini_batch_rows}, epochs={self.epochs}: both must be at least 1")

    def num_updates(self, num_rows: int) -> int:
        """Optimizer steps that a batch of `num_rows` gives."""
        return self.epochs * -(-num_rows // self.mini_batch_rows)


def iterate_mini_batches(num_rows: int, settings: UpdateSettings, iteration: int) -> Iterator[Tensor]:
    """Row indices (m,) int64 of each mini-batch, epoch after epoch. The last of an epoch may be smaller.

    The order is a pure function of (settings.seed, iteration, epoch), so a resumed run draws the same one.
    """
    for epoch in range(settings.epochs):
        order = torch.arange(num_rows)
        if settings.shuffle:
            generator = torch.Generator().manual_seed(seed_of(settings.seed, iteration, epoch))
            order = torch.randperm(num_rows, generator=generator)
        yield from order.split(settings.mini_batch_rows)


def seed_of(*numbers: int) -> int:
    """One seed from several numbers, such as a run's seed and the iteration."""
    # A hash, not a sum: (seed 1, iteration 2) and (seed 2, iteration 1) must not share an order.
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
