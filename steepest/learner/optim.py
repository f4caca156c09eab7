"""AdamW with fp32 master weights, gradient clipping, and a learning rate that moves once per training step."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from steepest.core.reducer import IDENTITY, Reducer
from steepest.devices.api import device_of
from steepest.errors import CheckpointError, ModelError
from steepest.models.file_weights import read_tensors
from steepest.models.working_weights import refresh

_log = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule. Defaults are verl's, but for `lr`, which must be given."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """Decoupled, on every parameter, norms and biases included (as verl)."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    """Training steps of linear warm-up."""
    total_steps: int = 0
    """Training steps of the run; read by the cosine only."""
    min_lr_ratio: float = 0.0
    """Floor of the cosine, as a share of lr."""
    num_cycles: float = 0.5
    """Waves of the cosine; 0.5 falls once from lr to the floor."""
    zero_indexed_step: bool = True
    """True (as verl and transformers): with warm-up, the first training step has lr 0. False: lr / warmup_steps."""

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule={self.schedule!r}: constant or cosine")
        if self.schedule == "cosine" and self.total_steps < 1:
            raise ValueError(f"total_steps={self.total_steps}: a cosine needs the number of training steps")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise ValueError(f"clip_grad={self.clip_grad}: must be above 0, or None for no clipping")


def lr_factor(iteration: int, settings: OptimSettings) -> float:
    """What lr is multiplied with in the training step that comes after `iteration` finished ones.

        s = iteration (+ 1 when zero_indexed_step is false)
        s < warmup:  s / warmup
        constant:    1
        cosine:      max(r, (1 + r) / 2 + (1 - r) / 2 * cos(2 pi num_cycles p)),   r = min_lr_ratio,
                     p = min(1, (s - warmup) / max(1, total_steps - warmup))

    verl and transformers do not bound p; there the rate rises again in steps after the last one.
    """
    step = iteration if settings.zero_indexed_step else iteration + 1
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    floor = settings.min_lr_ratio
    progress = min(1.0, (step - settings.warmup_steps) / max(1, settings.total_steps - settings.warmup_steps))
    wave = math.cos(2.0 * math.pi * settings.num_cycles * progress)
    return max(floor, (1.0 + floor) / 2 + (1.0 - floor) / 2 * wave)


class Optimizer:
    """AdamW over named parameters.

    `step()` follows every mini-batch; `schedule_step()` follows every training step (iteration), however many
    mini-batches it had. Gradients are zeroed by `step()`.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSettings) -> None:
        self.settings = settings
        self.iterations = 0
        """Training steps finished: the position in the schedule."""
        self.num_skipped = 0
        """Optimizer steps skipped since the start of the run because of a NaN or inf gradient."""
        self._named = {name: parameter for name, parameter in named_parameters if parameter.requires_grad}
        _require_float32(self._named)
        devices = {parameter.device for parameter in self._named.values()}
        self._fused = all(device_of(device).fused_adamw for device in devices)
        self._adamw = torch.optim.AdamW(
            list(self._named.values()),
            lr=self.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True if self._fused else None,
        )

    @property
    def lr(self) -> float:
        """The learning rate of the present training step."""
        return self.settings.lr * lr_factor(self.iterations, self.settings)

    def step(self, reducer: Reducer = IDENTITY) -> tuple[float, bool]:
        """Clip, step, zero the gradients. Returns (global L2 norm before clipping, whether the step was taken).

        A norm that is NaN or inf changes neither weights nor moments: the step is skipped, counted and reported.
        Clipping multiplies by min(1, clip_grad / (norm + 1e-6)). On several ranks the gradients are summed over the
        ranks before this is called. All clip by the largest of their norms, which are equal up to rounding, and all
        skip the step if one of them has to.
        """
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        found = reducer.max(torch.stack([norm, (~norm.isfinite()).to(norm.dtype)]))
        norm, (size, bad) = found[0], found.tolist()  # the one time that a step waits for the device
        finite = bad == 0.0
        if finite:
            if self.settings.clip_grad is not None:
                torch.nn.utils.clip_grads_with_norm_(self._named.values(), self.settings.clip_grad, norm)
            for group in self._adamw.param_groups:
                group["lr"] = self.lr
            self._adamw.step()
            if self._fused:  # which changes weights without a new version, by which engines and copies see a change
                torch.autograd.graph.increment_version(self._named.values())
            refresh(self._named.values())
        else:
            self.num_skipped += 1
            _log.warning(
                "optimizer step skipped: the gradient norm is %s (%s). Skipped so far: %d. Weights are unchanged.",
                size,
                self._first_bad() or "no single gradient is, their norm overflows",
                self.num_skipped,
            )
        self._adamw.zero_grad(set_to_none=True)
        return size, finite

    def schedule_step(self) -> None:
        """One training step is over: move along the schedule."""
        self.iterations += 1

    def tensors(self) -> dict[str, Tensor]:
        """`<parameter name>.exp_avg`, `.exp_avg_sq` (shape of the parameter) and `.step` (scalar), all float32.

        The tensors are the live ones, not copies. Empty before the first step.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self._named.items():
            state = self._adamw.state.get(parameter, {})
            found.update({f"{name}.{moment}": state[moment] for moment in _MOMENTS if moment in state})
        return found

    def numbers(self) -> dict[str, int]:
        """What is not a tensor: the position in the schedule and the count of skipped steps."""
        return {"iterations": self.iterations, "num_skipped": self.num_skipped}

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        """Take over a state made by `tensors` and `numbers`; the inputs are copied.

        Raises CheckpointError for a name that the model has not, a missing moment or another shape.
        """
        names = {key.rpartition(".")[0] for key in tensors}
        unknown = sorted(names - set(self._named))
        if unknown:
            raise CheckpointError(
                f"the optimizer state has {unknown[0]!r} ({len(unknown)} such), which is no parameter of this model. "
                "It belongs to another model: start without it or give the right checkpoint."
            )
        for name in names:
            self._adamw.state[self._named[name]] = self._moments(name, tensors)
        self.iterations, self.num_skipped = int(numbers["iterations"]), int(numbers["num_skipped"])

    def _moments(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        parameter, state = self._named[name], {}
        for moment in _MOMENTS:
            key = f"{name}.{moment}"
            want = torch.Size([]) if moment == "step" else parameter.shape
            if key not in tensors or tensors[key].shape != want:
                found = tuple(tensors[key].shape) if key in tensors else "nothing"
                raise CheckpointError(f"the optimizer state has {found} for {key!r}; the model needs {tuple(want)}.")
            on_host = moment == "step" and not self._fused
            device = torch.device("cpu") if on_host else parameter.device
            state[moment] = tensors[key].to(device=device, dtype=torch.float32, copy=True)
        return state

    def _first_bad(self) -> str | None:
        for name, parameter in self._named.items():
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                return f"first bad gradient: {name}"
        return None


def _whole(norm: Tensor) -> Tensor:
    """The norm as a plain number: that of sharded gradients is a DTensor, of which each rank knows its part."""
    gather = getattr(norm, "full_tensor", None)
    return norm if gather is None else gather()


def save_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Write `optimizer.safetensors` (moments by parameter name) and `optimizer.json` (numbers)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.tensors().items()}
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(optimizer.numbers(), indent=1) + "\n", encoding="utf-8")


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Read what `save_optimizer` wrote. Raises CheckpointError when a file is missing or does not fit the model."""
    for name in ("optimizer.safetensors", "optimizer.json"):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: a folder of weights only cannot be resumed from.")
    numbers = json.loads((folder / "optimizer.json").read_text(encoding="utf-8"))
    optimizer.load(read_tensors(folder / "optimizer.safetensors"), numbers)


def _require_float32(named: dict[str, nn.Parameter]) -> None:
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise ModelError(
                f"parameter {name} is {parameter.dtype}: master weights have to be float32, since a step of lr 1e-6 is "
                "lost in bfloat16's rounding. Load the model in float32; bfloat16 compute is a setting of its own."
            )
