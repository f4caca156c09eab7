"""What actor, critic, reference and SFT share: device, compute dtype, micro-batch passes, the optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from steepest.core.batch import Batch
from steepest.models.packing import Packed, pack_batch
from steepest.training.meters import Means, Metrics, Sums
from steepest.training.micro_batches import MicroBatches
from steepest.training.optim import Optimizer, OptimSettings, load_optimizer, save_optimizer

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class ComputeSettings:
    """Where and in which precision a model computes. Weights, gradients and moments are float32 in any case."""

    device: torch.device | str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products through torch.autocast."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a layer and compute them again in the backward pass."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype {self.dtype!r}: float32 or bfloat16")


class Trainable(Generic[ModelT]):
    """A model on its device, with the one way it is run (`passes`) and the one way it is stepped (`step`).

    Without `optim` the model is only read. Dropout is 0 in every model (see `models`), so train() and eval()
    compute the same; train mode is set during an update with gradient checkpointing, which transformers asks for.
    """

    def __init__(self, model: ModelT, *, compute: ComputeSettings, optim: OptimSettings | None) -> None:
        self.device = torch.device(compute.device)
        self.compute = compute
        self.model = model.to(self.device).eval()
        self.optimizer = None if optim is None else Optimizer(model.named_parameters(), optim)

    # -- passes ---------------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """The precision of every forward pass, with and without gradient: one place, so that ratios are 1."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute.dtype == "bfloat16")

    def micro_batches(self, batch: Batch, micro: MicroBatches, *, every_row: bool = False) -> Iterator[MicroBatch]:
        """The batch in micro-batches on the device. Rows without a policy token are left out unless `every_row`:
        they have no log-prob, no value and no loss."""
        chosen = torch.arange(len(batch)) if every_row else batch.response_mask.any(dim=1).nonzero()[:, 0]
        lengths = batch.lengths[chosen].tolist()
        for picks in micro.split(lengths):
            rows = chosen[picks]
            part = batch.select(rows)
            yield MicroBatch(rows, move(part, self.device), move(pack_batch(part), self.device))

    # -- updates --------------------------------------------------------------------------------------------

    def accumulate(self, parts: Iterable[Any], loss_of: Callable[[Any, Sums], Tensor]) -> Metrics:
        """Sum the gradients of `loss_of(part, sums)` over `parts`. Returns what `loss_of` added to `sums`."""
        sums = Sums()
        with self._training_mode():
            for part in parts:
                loss_of(part, sums).backward()
        return sums.read()

    def step(self, name: str, means: Means) -> None:
        """One optimizer step. Adds `<name>/grad_norm` (steps taken only) and `<name>/skipped_steps` to `means`."""
        assert self.optimizer is not None
        norm, taken = self.optimizer.step()
        means.count(f"{name}/skipped_steps", 0 if taken else 1)
        if taken:
            means.add({f"{name}/grad_norm": norm})

    def finish_iteration(self, name: str) -> Metrics:
        """The end of a training step: `<name>/lr` is the rate it used; the schedule moves on."""
        assert self.optimizer is not None
        lr = self.optimizer.lr
        self.optimizer.schedule_step()
        return {f"{name}/lr": lr}

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        if not self.compute.gradient_checkpointing:
            yield
            return
        enable, disable = _checkpointing_switches(self.model)
        # Switched on for the update only: with it on, transformers' layers refuse the KV cache that a rollout over
        # the same weights needs.
        enable({"use_reentrant": False})
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
            disable()

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Weights and tokenizer as a Hugging Face folder, and beside them the optimizer's state, into `folder`."""
        self.model.save(folder, tokenizer)  # type: ignore[operator]
        if self.optimizer is not None:
            save_optimizer(self.optimizer, folder)

    def load_optimizer(self, folder: Path) -> None:
        """Take over the optimizer's state from a folder made by `save`. The weights come from the model loader.

        Raises CheckpointError when the state is missing or belongs to another model.
        """
        assert self.optimizer is not None
        load_optimizer(self.optimizer, folder)

    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes: the weights, and two moments of the trained ones."""
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        return weights + (0 if self.optimizer is None else 2 * trained)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that go through the model together, on its device."""

    rows: Tensor
    """(b,) int64 on the CPU, where the rows stand in the batch."""
    batch: Batch
    packed: Packed
    """The rows' real tokens, end to end."""

    @property
    def shape(self) -> tuple[int, int]:
        """(b, T)."""
        return len(self.batch), self.batch.responses.shape[1]


def move(record: Any, device: torch.device) -> Any:
    """A dataclass with its tensors on `device`; the same object when `device` is the CPU."""
    if device.type == "cpu":
        return record
    tensors = {
        item.name: value.to(device, non_blocking=True)
        for item in dataclasses.fields(record)
        if isinstance(value := getattr(record, item.name), Tensor)
    }
    return dataclasses.replace(record, **tensors)


def _checkpointing_switches(model: nn.Module) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """How the transformers model inside `model` switches gradient checkpointing on and off."""
    for module in model.modules():
        for word in ("activation", "gradient"):  # renamed during transformers 5
            if hasattr(module, f"{word}_checkpointing_enable"):
                return getattr(module, f"{word}_checkpointing_enable"), getattr(module, f"{word}_checkpointing_disable")
    raise ValueError(f"{type(model).__name__} holds no transformers model, so it has no gradient checkpointing")
