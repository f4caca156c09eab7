"""What the rest of the code may ask a device, and the choice of one. The only names of vendors are in this folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest.errors import ConfigError, DeviceError
from steepest.registry import Registry

DEVICES = Registry("device", "trainer.device")


@dataclass(frozen=True)
class MemoryStats:
    """Memory of one device, in bytes."""

    total: int
    """What the device has; for the CPU, the machine's memory or the container's limit if that is lower."""
    available: int
    """What can still be taken now."""
    peak: int
    """The most this process has held since it started, or since `reset_peak_memory`."""


class Device(ABC):
    """One backend. An instance is a description: making one touches no hardware and never fails."""

    name: ClassVar[str]
    """The value of `trainer.device`."""
    type: ClassVar[str]
    """The type of `torch.device`."""
    distributed_backend: ClassVar[str]
    """For `init_process_group`; CPU tensors can always travel too."""
    visible_devices_variable: ClassVar[str | None]
    """The environment variable that chooses the cards a process sees."""
    ray_resource: ClassVar[str]
    """The name Ray counts this device under."""

    def __init__(self) -> None:
        self.chosen_because = f"trainer.device={self.name}"
        """Words for the summary at start; `select_device` fills them in."""

    @abstractmethod
    def availability(self) -> str | None:
        """None when this machine has the device; else one sentence: why it cannot be used, a semicolon, the remedy."""

    @abstractmethod
    def supports_bf16(self) -> tuple[bool, str]:
        """Whether bf16 arithmetic is done in hardware, and the words that say why."""

    @abstractmethod
    def count(self) -> int:
        """How many of these devices this process sees; 1 for the CPU."""

    @abstractmethod
    def memory(self, index: int = 0) -> MemoryStats:
        """Total, available and peak memory of device `index`, in bytes."""

    @abstractmethod
    def reset_peak_memory(self, index: int = 0) -> None:
        """Start measuring the peak of device `index` from what is held now."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all work given to the current device is done."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give memory that the allocator keeps without use back to the device."""

    @abstractmethod
    def hardware(self, index: int = 0) -> str:
        """The name of the hardware, for the summary at start."""

    def torch_device(self, index: int = 0) -> torch.device:
        """Device `index` as a torch.device."""
        return torch.device(self.type, index)

    def default_dtype(self) -> torch.dtype:
        """The dtype of compute when the configuration names none: bf16 where the hardware has it, else fp32."""
        return torch.bfloat16 if self.supports_bf16()[0] else torch.float32

    def seed(self, seed: int) -> None:
        """Seed torch's random numbers, on the CPU and on every device of this type."""
        torch.manual_seed(seed)

    def rng_state(self) -> dict[str, Tensor]:
        """The state of torch's generators, by name; `set_rng_state` takes it back bit for bit."""
        return {"cpu": torch.get_rng_state()}

    def set_rng_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `rng_state` gave."""
        torch.set_rng_state(state["cpu"])

    def describe(self) -> str:
        """One line for the summary: the device, its hardware, the default dtype and the reasons for each."""
        reason = self.supports_bf16()[1]
        dtype = str(self.default_dtype()).removeprefix("torch.")
        return f"{self.name} ({self.hardware()}; {self.chosen_because}); {dtype} by default: {reason}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Accelerator(Device):
    """What devices with memory of their own share. `module` is torch's module of the device type.

    Memory is read from that module and not from `torch.accelerator.memory_*`: the Ascend plug-in for torch up to
    2.12 has no allocator that the latter accepts.
    """

    @property
    def module(self) -> ModuleType:
        return torch.get_device_module(self.type)

    def count(self) -> int:
        return int(self.module.device_count())

    def memory(self, index: int = 0) -> MemoryStats:
        available, total = self.module.mem_get_info(index)
        return MemoryStats(int(total), int(available), int(self.module.max_memory_allocated(index)))

    def reset_peak_memory(self, index: int = 0) -> None:
        self.module.reset_peak_memory_stats(index)

    def synchronize(self) -> None:
        self.module.synchronize()

    def empty_cache(self) -> None:
        self.module.empty_cache()

    def hardware(self, index: int = 0) -> str:
        return str(self.module.get_device_name(index))

    def supports_bf16(self) -> tuple[bool, str]:
        found = bool(self.module.is_bf16_supported())
        return found, f"{self.hardware()} has {'' if found else 'no '}bf16 arithmetic"

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


PREFERENCE = ("cuda", "npu", "cpu")
"""The order in which an unset `trainer.device` looks for the best device."""


def select_device(name: str | None = None) -> Device:
    """The device called `name`; with None, the best one present, and why in `Device.chosen_because`.

    Raises DeviceError when a named device is not there: a named device is never replaced by another.
    Raises ConfigError for a name that no device has.
    """
    if name is not None:
        device = _make(name)
        reason = device.availability()
        if reason is not None:
            raise DeviceError(f"trainer.device={name}: {reason}")
        return device
    missing: list[str] = []
    for candidate in PREFERENCE:
        device = _make(candidate)
        reason = device.availability()
        if reason is None:
            device.chosen_because = "; ".join(["trainer.device is unset: the best device present", *missing])
            return device
        missing.append(f"no {candidate}: {reason.split(';')[0]}")
    raise DeviceError("No device at all can be used: " + "; ".join(missing))


def _make(name: str) -> Device:
    kind, colon, index = name.partition(":")
    if colon and kind in DEVICES.names():
        variable = _make(kind).visible_devices_variable
        remedy = f"use trainer.device={kind}" + (f" with {variable}={index} in the environment" if variable else "")
        raise ConfigError(f"trainer.device={name!r}: a device is named without an index; {remedy}.")
    made: Any = DEVICES.get(name).value()
    if not isinstance(made, Device):
        raise ConfigError(f"trainer.device={name!r}: it gave a {type(made).__name__}, which is no Device.")
    return made


def visible_devices(device: Device) -> str | None:
    """What the environment says about visible cards; None when it says nothing."""
    variable = device.visible_devices_variable
    return None if variable is None else os.environ.get(variable)
