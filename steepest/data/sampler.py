"""The order of samples: a pure function of seed and step, so a resumed run continues with the right rows."""

from __future__ import annotations

import random

from steepest.errors import ConfigError, DataError, setting


def permutation(num: int, seed: str) -> list[int]:
    """The numbers 0..num-1 in an order that depends on `seed` only, the same in every version of Python.

    They are sorted by random keys, because Python guarantees the sequence of `random()` for a seed, but not
    `shuffle()`.
    """
    draw = random.Random(f"steepest {seed}").random
    keys = [draw() for _ in range(num)]
    return sorted(range(num), key=keys.__getitem__)


class PromptSampler:
    """Which rows each training step takes. Every epoch is a new permutation; a last partial batch is left out.

    There is no state to save: `indices(step)` is a pure function of the step, which counts from 0 over the whole run.
    Raises DataError when the rows do not fill one batch.
    """

    def __init__(self, num_samples: int, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if batch_size < 1:
            raise ConfigError(f"{setting('train_batch_size')}={batch_size}: expected a number above 0.")
        if num_samples < batch_size:
            raise DataError(
                f"{setting('train_batch_size')}={batch_size} is more than the {num_samples} training prompts: not one "
                f"batch can be filled. Use {setting('train_batch_size')}={num_samples} or less, or more data."
                if num_samples
                else f"there are no training prompts: check {setting('train_files')} and "
                f"{setting('filter_overlong_prompts')}."
            )
        self.num_samples, self.batch_size, self.shuffle, self.seed = num_samples, batch_size, shuffle, seed
        self._order: tuple[int, list[int]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the data."""
        return self.num_samples // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that the step belongs to."""
        if step < 0:
            raise ValueError(f"step {step} is below 0")
        return step // self.steps_per_epoch

    def indices(self, step: int) -> list[int]:
        """The `batch_size` row numbers of the step, all different."""
        start = step % self.steps_per_epoch * self.batch_size
        return self._epoch_order(self.epoch(step))[start : start + self.batch_size]

    def _epoch_order(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = (
                permutation(self.num_samples, f"order {self.seed} {epoch}") if self.shuffle else range(self.num_samples)
            )
            self._order = (epoch, list(order))
        return self._order[1]


def batches(num: int, size: int | None) -> list[list[int]]:
    """All of 0..num-1 in order, `size` at a time (None: all at once); a smaller last batch is never dropped."""
    if size is not None and size < 1:
        raise ConfigError(f"{setting('val_batch_size')}={size}: expected a number above 0, or null for all at once.")
    step = size or max(num, 1)
    return [list(range(start, min(start + step, num))) for start in range(0, num, step)]
