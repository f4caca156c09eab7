"""The interface of a device, and the choice of one. Names of vendors are in backends/."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steepest.checks import Check
from steepest.devices.checks import DEV
from steepest.errors import ConfigError, DeviceError, render, setting
from steepest.registry import ModuleRegistry, Registry
from steepest.versions import pip_install

DEVICES = ModuleRegistry("device", setting("device"), package="steepest.devices.backends")

VARLEN = "flash_attention_2"
"""The name that transformers and verl use for a fused attention over packed sequences."""
PACKED_SDPA = "sdpa"
"""torch's scaled_dot_product_attention, with one call for all packed sequences of similar length."""

# Some libraries below torch raise a plain RuntimeError: cuBLAS, the CPU's allocator, older Ascend plug-ins.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


class VarlenAttention(Protocol):
    """Causal attention within each of several packed sequences."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, ends: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        """query (N, H, D), key (N, KV, D), value (N, KV, D) -> (N, H, D); H is a multiple of KV.

        `lengths` are those of the b sequences, `ends` (b + 1,) int32 on the device: 0 and their running sum.
        """
        ...


@dataclass(frozen=True)
class MemoryStats:
    """Memory of one device, in bytes."""

    total: int
    """All memory of the device; for the CPU the machine's memory, or the container's limit if that is lower."""
    available: int
    """Memory that can still be allocated now."""
    peak: int
    """The largest amount that this process has held since its start."""
    peak_reserved: int | None = None
    """The largest amount that torch's allocator has taken from the device, with memory it keeps; None on the CPU."""


class Device(ABC):
    """One backend. An instance only describes it: making one touches no hardware and never fails."""

    name: ClassVar[str]
    """The value of `trainer.device`."""
    preference: ClassVar[int] = 0
    """An unset `trainer.device` takes the device with the highest number among those present."""
    type: ClassVar[str]
    """The type of `torch.device`."""
    distributed_backend: ClassVar[str]
    """The backend for `init_process_group`; it can always send CPU tensors too."""
    visible_devices_variable: ClassVar[str | None]
    """The environment variable that chooses the cards a process sees."""
    ray_resource: ClassVar[str]
    """The name of this device among Ray's resources."""
    allocator_variable: ClassVar[str | None] = None
    """The environment variable that tunes torch's allocator for this device."""
    sleep_level: ClassVar[int | None] = None
    """The sleep level of vLLM that works on this device; None if it has no sleep mode."""
    vllm_install: ClassVar[str] = pip_install("vllm")
    """The instruction that installs vLLM for this device."""
    fused_adamw: ClassVar[bool] = False
    """True if torch's fused AdamW works on this device and is deterministic to the bit; else torch chooses a kernel."""

    measures_dtype: ClassVar[bool] = False
    """True if bf16 may be slower than fp32 although the hardware computes in it, so that a run has to time it."""

    def __init__(self) -> None:
        self.chosen_because = f"{setting('device')}={self.name}"
        """Words for the summary at start, a text for `errors.render`; `select_device` fills them in."""

    @abstractmethod
    def availability(self) -> str | None:
        """None when this machine has the device; else one sentence: why it cannot be used, a semicolon, the remedy.

        A text for `errors.render`.
        """

    def hide_unusable(self, wanted: str | None) -> None:
        """Keep a package of this device that cannot work here out of the process; see the function of this name."""
        return

    @abstractmethod
    def supports_bf16(self) -> tuple[bool, str]:
        """(True if the hardware computes in bf16, the reason in words)."""

    @abstractmethod
    def count(self) -> int:
        """The number of these devices that this process sees; 1 for the CPU."""

    @abstractmethod
    def memory(self, index: int = 0) -> MemoryStats:
        """Total, available and peak memory of device `index`, in bytes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work given to the current device is done."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Return memory that the allocator keeps but does not use to the device."""

    @abstractmethod
    def hardware(self, index: int = 0) -> str:
        """The name of the hardware, for the start summary."""

    def quick_look(self) -> str | None:
        """Does the same as `availability` without loading anything; None also if only loading the package can show
        it."""
        return None

    def environment(self) -> dict[str, str]:
        """Environment variables, with the values Steepest needs, for processes that share one of these devices."""
        return {}

    def rollout_environment(self) -> dict[str, str]:
        """Environment variables, with the values Steepest needs, that vLLM reads on this device at its start."""
        return {}

    def vllm_problem(self, distribution: str, version: str) -> str | None:
        """Why the vLLM of this package cannot run here: the reason, a semicolon, the remedy. None if it can."""
        return None

    def expected(self, dev: Path = DEV) -> str | None:
        """Signs of this device on this machine, usable or not; None without any. `steepest doctor` prints them.

        `dev` is the folder of device files.
        """
        return None

    def version_checks(self) -> list[Check]:
        """Checks whether the installed versions of this device's software fit together, for `steepest doctor`."""
        return []

    def setup_checks(self) -> list[Check]:
        """Checks of the environment variables that affect this device, for `steepest doctor`."""
        return []

    def varlen_attention(self, dtype: torch.dtype) -> tuple[VarlenAttention | None, str]:
        """(a fused attention over packed sequences for tensors of `dtype`, or None; the reason in words)."""
        return None, f"{self.name} has no fused attention for packed sequences"

    def attention_implementation(self, dtype: torch.dtype | None = None) -> tuple[str, str]:
        """(name, reason) of the attention for a model that computes in `dtype` (default: `default_dtype`)."""
        kernel, why = self.varlen_attention(self.default_dtype() if dtype is None else dtype)
        return (PACKED_SDPA if kernel is None else VARLEN), why

    def is_out_of_memory(self, error: BaseException) -> bool:
        """True if `error` is the error that torch raises when the device has too little memory."""
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        text = str(error)
        return isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)

    def torch_device(self, index: int = 0) -> torch.device:
        """Device `index` as a torch.device."""
        return torch.device(self.type, index)

    def default_dtype(self) -> torch.dtype:
        """The dtype of computation if the configuration names none: bf16 where the hardware has it, else fp32."""
        return torch.bfloat16 if self.supports_bf16()[0] else torch.float32

    @abstractmethod
    def prepare(self) -> None:
        """Set up this process for work on the device. Called once, at the start of a job."""

    def seed(self, seed: int) -> None:
        """Seed torch's generators, on the CPU and on every device of this type."""
        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, Tensor]:
        """The state of torch's generators, by name; `set_rng_state` takes it back bit for bit."""
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """Restore a state that `rng_state` returned."""
        torch.set_rng_state(state["cpu"])

    def describe(self) -> str:
        """One line for the summary: the device, its hardware, the default dtype and the reasons for each."""
        reason = self.supports_bf16()[1]
        return render(f"{self.name} ({self.hardware()}; {self.chosen_because}); {self.dtype_words()}: {reason}")

    def dtype_words(self) -> str:
        """What decides about the dtype that the configuration leaves open."""
        if self.measures_dtype and self.supports_bf16()[0]:
            return "bfloat16 where it is faster"
        return str(self.default_dtype()).removeprefix("torch.") + " by default"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Accelerator(Device):
    """Base class of devices with their own memory. `module` is torch's module of the device type.

    Memory is read from that module and not from `torch.accelerator.memory_*`: the Ascend plug-in for torch up to
    2.12 has no allocator that the latter accepts.
    """

    preference = 1

    @property
    def module(self) -> ModuleType:
        return torch.get_device_module(self.type)

    def count(self) -> int:
        return int(self.module.device_count())

    def memory(self, index: int = 0) -> MemoryStats:
        available, total = self.module.mem_get_info(index)
        held, reserved = self.module.max_memory_allocated(index), self.module.max_memory_reserved(index)
        return MemoryStats(int(total), int(available), int(held), int(reserved))

    def synchronize(self) -> None:
        self.module.synchronize()

    def empty_cache(self) -> None:
        self.module.empty_cache()

    def hardware(self, index: int = 0) -> str:
        return str(self.module.get_device_name(index))

    def supports_bf16(self) -> tuple[bool, str]:
        found = bool(self.module.is_bf16_supported())
        return found, f"{self.hardware()} has {'' if found else 'no '}bf16 arithmetic"

    def prepare(self) -> None:
        """Do nothing: there is nothing to set up."""

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.module.manual_seed_all(seed)

    def rng_state(self) -> dict[str, Tensor]:
        states = {f"{self.type}:{i}": state for i, state in enumerate(self.module.get_rng_state_all())}
        return super().rng_state() | states

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        super().set_rng_state(state)
        for i in range(self.count()):
            if f"{self.type}:{i}" in state:
                self.module.set_rng_state(state[f"{self.type}:{i}"], i)


def by_preference(table: Registry = DEVICES) -> list[Device]:
    """One of each device in `table`, in the order in which an unset `trainer.device` looks for the best one."""
    return sorted((_make(name, table) for name in table.names()), key=lambda device: -device.preference)


def hide_unusable(wanted: str | None = None) -> None:
    """Let every device keep a package of its own that cannot work here out of this process. Call it before transformers
    is imported, which imports such packages. `wanted` is trainer.device."""
    for device in by_preference():
        device.hide_unusable(wanted)


def select_device(name: str | None = None, table: Registry = DEVICES) -> Device:
    """The device called `name` in `table`; with None the best one present. `Device.chosen_because` holds the reason.

    Raises DeviceError if a named device is not usable: it is never replaced by another one.
    Raises ConfigError for a name that no device has.
    """
    if name is not None:
        device = _make(name, table)
        reason = device.availability()
        if reason is not None:
            raise DeviceError(f"{setting('device')}={name}: {reason}")
        return device
    missing: list[str] = []
    for device in by_preference(table):
        reason = device.quick_look() or device.availability()
        if reason is None:
            device.chosen_because = "; ".join([f"{setting('device')} is unset: the best device present", *missing])
            return device
        missing.append(f"no {device.name}: {reason.split(';')[0]}")
    raise DeviceError("No device at all can be used: " + "; ".join(missing))


def device_of(place: torch.device | str) -> Device:
    """The Device that a tensor's device belongs to. Raises DeviceError for one that is not in the table."""
    kind = torch.device(place).type
    for name in DEVICES.names():
        device = _make(name)
        if device.type == kind:
            return device
    raise DeviceError(f"torch device {str(place)!r}: no such device here; known: {', '.join(DEVICES.names())}.")


def _make(name: str, table: Registry = DEVICES) -> Device:
    kind, colon, index = name.partition(":")
    if colon and kind in table.names():
        variable = _make(kind, table).visible_devices_variable
        remedy = f"use {setting('device')}={kind}" + (
            f" with {variable}={index} in the environment" if variable else ""
        )
        raise ConfigError(f"{setting('device')}={name!r}: a device is named without an index; {remedy}.")
    made: Any = table.get(name).value()
    if not isinstance(made, Device):
        raise ConfigError(f"{setting('device')}={name!r}: it gave a {type(made).__name__}, which is no Device.")
    return made


def visible_devices(device: Device) -> str | None:
    """The environment variable for visible cards with its value; None if it is unset."""
    variable = device.visible_devices_variable
    return None if variable is None else os.environ.get(variable)
