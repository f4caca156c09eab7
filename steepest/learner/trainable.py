"""What actor, critic, reference and SFT share: device, compute dtype, micro-batch passes, the optimizer step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steepest.core.batch import Batch
from steepest.core.reducer import IDENTITY, Reducer
from steepest.devices.api import device_of
from steepest.devices.memory import RESUMES, memory_guard
from steepest.errors import ModelError, setting
from steepest.learner.metrics import Means, Metrics, Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import Optimizer, OptimSettings, load_optimizer, save_optimizer
from steepest.learner.update_plan import Cut, plan_passes
from steepest.models.packing import Packed, pack_batch, pack_nothing, pack_shared
from steepest.models.varlen import OWN_FORWARD, Attention, attention_of, check_varlen
from steepest.models.working_weights import use_copies

ModelT = TypeVar("ModelT", bound=nn.Module)
RecordT = TypeVar("RecordT", Batch, Packed)

_SMALLER = "Take a smaller model, or a device with more memory."


@dataclass(frozen=True)
class ComputeSettings:
    """Where and in which precision a model computes. Weights, gradients and moments are always float32."""

    device: torch.device | str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: matrix products through torch.autocast, with the weights' copies in bf16 (`models.working_weights`)."""
    gradient_checkpointing: bool = False
    """Keep no activations inside a layer and compute them again in the backward pass."""
    attention: Attention = field(default_factory=Attention)
    """Packed SDPA, or the device's own (see `choose_attention`)."""
    shares_prompts: bool = False
    """The responses of one prompt are computed over one copy of its tokens (on the CPU, with packed SDPA)."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute dtype {self.dtype!r}: float32 or bfloat16")


class Trainable(Generic[ModelT]):
    """A model on its device, with the one way it is run (`passes`) and the one way it is stepped (`step`).

    Without `optim` the model is only read. A model stays in evaluation mode also while it is trained: some families
    choose experts at random in train mode. Only modules that compute their layers twice are in train mode during an
    update with gradient checkpointing, which transformers asks for.
    """

    role: ClassVar[str]
    """What messages call it."""
    reducer: Reducer = IDENTITY
    """Sums and maxima over the ranks, for metrics and the gradient norm; set by what starts more than one rank."""

    def __init__(self, model: ModelT, *, compute: ComputeSettings, optim: OptimSettings | None) -> None:
        self.device = torch.device(compute.device)
        hf = cast(PreTrainedModel, model.hf)
        if compute.gradient_checkpointing and not hf.supports_gradient_checkpointing:
            raise ModelError(
                f"{setting('enable_gradient_checkpointing', self.role)}=true: transformers has none for "
                f"{type(hf).__name__}. Set it to false, and lower the micro-batch if memory runs out."
            )
        attention = attention_of(hf, compute.attention)
        shares = compute.shares_prompts and attention.name != OWN_FORWARD
        self.compute = compute = replace(compute, attention=attention, shares_prompts=shares)
        self._flops = 0.0
        with self._memory("weights, on their way to the device", _SMALLER):
            self.model = model.to(self.device).eval()
            if compute.dtype == "bfloat16":
                use_copies(hf)
        self.model.attention = compute.attention  # type: ignore[assignment]
        with self._memory("trial of its attention", _SMALLER):
            check_varlen(compute.attention, self.model.config, self.device, getattr(torch, compute.dtype))
        self.optimizer = None if optim is None else Optimizer(self._saved(), optim)

    def _saved(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What the optimizer may train and `save` writes: all weights, or an adapter's."""
        found: Iterator[tuple[str, nn.Parameter]] = self.model.saved_parameters()  # type: ignore[operator]
        return found

    # -- passes ---------------------------------------------------------------------------------------------

    def autocast(self) -> torch.autocast:
        """The precision of every forward pass, with and without gradient: one place, so that ratios are 1."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute.dtype == "bfloat16")

    def run(self, request: Any) -> Any:
        """One pass through the model, by its one entry (see models/passes.py). Its arithmetic is counted."""
        found = self.model(request)
        self.count(found.flops)
        return found

    def count(self, flops: float) -> None:
        """Add operations to those that `take_flops` returns next."""
        self._flops += flops

    def take_flops(self) -> float:
        """Operations of the passes since this was last called, backward passes included (see models/flops.py)."""
        taken, self._flops = self._flops, 0.0
        return taken

    def cut(self, batch: Batch, micro: MicroBatches, mask: Tensor, *, every_row: bool = False) -> Cut:
        """The plan of the passes over a batch in one process; see `plan_passes`."""
        (cut,) = plan_passes(batch, micro, mask, every_row=every_row, shares_prompts=self.compute.shares_prompts)
        return cut

    def micro_batches(self, batch: Batch, cut: Cut, mask: Tensor) -> Iterator[MicroBatch]:
        """The micro-batches of a plan on the device; the targets of each are the tokens of `mask`.

        mask is (B, T) bool: `batch.trained_mask` in passes before the update, `batch.loss_mask` in the update.
        """
        pack = pack_shared if self.compute.shares_prompts else pack_batch
        for picks in cut:
            rows = torch.tensor(picks, dtype=torch.int64)
            if not picks:
                yield MicroBatch(rows, self.moved(_empty_row(batch)), self.moved(pack_nothing()))
                continue
            part = batch.select(rows)
            yield MicroBatch(rows, self.moved(part), self.moved(pack(part, mask[rows])))

    def moved(self, record: RecordT) -> RecordT:
        """A dataclass with its tensors on the device."""
        with self._memory("data, on their way to the device", _SMALLER):
            return move(record, self.device)

    @contextmanager
    def memory(self, doing: str, part: Any, micro: MicroBatches, *, backward: bool = False) -> Iterator[None]:
        """Run one micro-batch: when memory runs out, say which, and which setting to lower."""
        packed = getattr(part, "packed", part)
        rows, tokens = len(packed.lengths), len(packed.input_ids)
        what = f"{doing}: a micro-batch of {rows} sequence(s), {tokens} tokens"
        if rows > 1:
            now, size = (micro.rows, rows) if micro.rows is not None else (micro.tokens, tokens)
            remedy = f"Lower {micro.setting} below {size} (now {now})"
        else:
            remedy = f"One sequence alone is too much: lower {setting('max_length')}"
        if backward and not self.compute.gradient_checkpointing:
            remedy += f", or set {setting('enable_gradient_checkpointing', self.role)}=true"
        with self._memory(what, f"{remedy}, or take a smaller model."):
            yield

    def _memory(self, doing: str, remedy: str) -> AbstractContextManager[None]:
        return memory_guard(device_of(self.device), lambda: (f"{self.role} {doing}", f"{remedy} {RESUMES}"))

    # -- updates --------------------------------------------------------------------------------------------

    def accumulate(self, parts: Iterable[Any], loss_of: Callable[[Any, Sums], Tensor], micro: MicroBatches) -> Metrics:
        """Sum the gradients of `loss_of(part, sums)` over `parts`, which `micro` cut. Returns what `loss_of` added to
        `sums`."""
        sums = Sums()
        with self._training_mode():
            for part in parts:
                with self.memory("update", part, micro, backward=True):
                    loss_of(part, sums).backward()
        return sums.read(self.reducer)

    def step(self, name: str, means: Means) -> None:
        """One optimizer step. Adds `<name>/grad_norm` (steps taken only) and `<name>/skipped_steps` to `means`."""
        assert self.optimizer is not None
        with self._memory("optimizer step, with two moments of each weight", _SMALLER):
            norm, taken = self.optimizer.step(self.reducer)
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
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # and not train(): what is inside of them stays in evaluation mode
        try:
            yield
        finally:
            self.model.eval()
            disable()

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write weights and tokenizer as a Hugging Face folder, and the optimizer's state, into `folder`."""
        self.model.save(folder, tokenizer)  # type: ignore[operator]
        if self.optimizer is not None:
            save_optimizer(self.optimizer, folder)

    def load_optimizer(self, folder: Path) -> None:
        """Take over the optimizer's state from a folder made by `save`. The weights come from the model loader.

        Raises CheckpointError when the state is missing or belongs to another model.
        """
        assert self.optimizer is not None
        with self._memory("optimizer state, on its way to the device", _SMALLER):
            load_optimizer(self.optimizer, folder)

    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes: the weights, and two moments of the trained ones."""
        saved = [parameter for _, parameter in self._saved()]
        weights = sum(p.numel() * p.element_size() for p in saved)
        trained = sum(p.numel() * p.element_size() for p in saved if p.requires_grad)
        return weights + (0 if self.optimizer is None else 2 * trained)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a batch that go through the model together, on its device.

    An empty one (see update_plan.py) has no `rows`; its `batch` is one row of zeros whose masks are false.
    """

    rows: Tensor
    """(b,) int64 on the CPU, where the rows stand in the batch."""
    batch: Batch
    packed: Packed
    """The rows' real tokens, end to end."""

    @property
    def shape(self) -> tuple[int, int]:
        """(b, T)."""
        return len(self.batch), self.batch.responses.shape[1]

    def write(self, found: Tensor, target: Tensor) -> None:
        """Put what was found for the rows, (b, ...) on any device, into their places of a tensor of the whole batch."""
        target[self.rows] = found[: len(self.rows)].cpu()


def _empty_row(batch: Batch) -> Batch:
    """One row of zeros with the fields of the batch: nothing of it is trained."""
    fields = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
    found: dict[str, Any] = {name: _zero_row(x) for name, x in fields.items() if isinstance(x, Tensor)}
    return Batch(**found, extras={name: _zero_row(x) for name, x in batch.extras.items()})


def _zero_row(field: Tensor) -> Tensor:
    return field.new_zeros((1, *field.shape[1:]))


def move(record: RecordT, device: torch.device) -> RecordT:
    """A dataclass with its tensors on `device`; the same object when `device` is the CPU."""
    if device.type == "cpu":
        return record
    tensors: dict[str, Any] = {
        item.name: value.to(device, non_blocking=True)
        for item in dataclasses.fields(record)
        if isinstance(value := getattr(record, item.name), Tensor)
    }
    if isinstance(record, Batch):
        tensors["extras"] = {name: value.to(device, non_blocking=True) for name, value in record.extras.items()}
    return dataclasses.replace(record, **tensors)


def _checkpointing_switches(model: nn.Module) -> tuple[Callable[[dict[str, Any]], None], Callable[[], None]]:
    """How the transformers model inside `model` switches gradient checkpointing on and off."""
    for module in model.modules():
        for word in ("activation", "gradient"):  # renamed during transformers 5
            if hasattr(module, f"{word}_checkpointing_enable"):
                return getattr(module, f"{word}_checkpointing_enable"), getattr(module, f"{word}_checkpointing_disable")
    raise ValueError(f"{type(model).__name__} holds no transformers model, so it has no gradient checkpointing")
