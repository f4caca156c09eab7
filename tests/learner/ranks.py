"""Several ranks in threads of one process: replicas whose gradients are summed, with a deadline instead of a hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from steepest.core.reducer import Reducer
from steepest.learner.trainable import Trainable

T = TypeVar("T")
DEADLINE_SECONDS = 30.0


class RankReducer:
    """The Reducer of one rank. A rank that does not come within the deadline breaks the barrier for all."""

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self._slots, self._barrier = rank, slots, barrier
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        """What was asked for, in order: (method, shape)."""

    def sum(self, value: Tensor) -> Tensor:
        return self._of_all("sum", value).sum(0)

    def max(self, value: Tensor) -> Tensor:
        return torch.nan_to_num(self._of_all("max", value), nan=-torch.inf).amax(0)  # as gloo may: no NaN comes through

    def _of_all(self, method: str, value: Tensor) -> Tensor:
        self.calls.append((method, tuple(value.shape)))
        self._slots[self.rank] = value.detach().clone()
        self._barrier.wait()
        found = torch.stack([slot for slot in self._slots if slot is not None])
        self._barrier.wait()
        return found


def on_ranks(number: int, job: Callable[[RankReducer], T]) -> list[T]:
    """`job` in one thread a rank. Raises the first error of a rank, and BrokenBarrierError where one waits in vain."""
    slots: list[Tensor | None] = [None] * number
    barrier = threading.Barrier(number, timeout=DEADLINE_SECONDS)
    found: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        reducer = RankReducer(rank, slots, barrier)
        try:
            found[rank] = job(reducer)
            barrier.wait()  # one that makes a call more would wait for the others here
        except threading.BrokenBarrierError as error:
            errors.append(error)
        except BaseException as error:
            errors.insert(0, error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * DEADLINE_SECONDS)
    if errors:
        raise errors[0]
    return [found[rank] for rank in range(number)]


class Counts:
    """How often a model's call, and the backward pass of its answer, have run."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.forward = self.backward = 0
        model.register_forward_hook(self._after)

    def _after(self, module: Any, args: Any, answer: Sequence[Any]) -> None:
        self.forward += 1
        differentiable = [x for x in answer if isinstance(x, Tensor) and x.requires_grad]
        if differentiable:
            differentiable[0].register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backward += 1


def sum_gradients(trainable: Trainable[Any], reducer: RankReducer) -> Counts:
    """Make a trainable one replica of several: its gradients are summed over the ranks before each optimizer step.

    A rank without a gradient for a parameter fails: a sharded model would wait for it.
    """
    trainable.reducer = reducer
    optimizer = trainable.optimizer
    assert optimizer is not None
    step, named = optimizer.step, optimizer._named

    def summed(reducer: Reducer) -> tuple[float, bool]:
        missing = [name for name, parameter in named.items() if parameter.grad is None]
        assert not missing, missing
        for parameter in named.values():
            assert parameter.grad is not None
            parameter.grad = reducer.sum(parameter.grad)
        return step(reducer)

    optimizer.step = summed  # type: ignore[method-assign]
    return Counts(trainable.model)
