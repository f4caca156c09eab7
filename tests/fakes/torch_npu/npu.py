"""The module `torch.npu`: the names a trainer uses, over the stand-in device. Parameter names are the real module's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import _C

NAME = "Ascend910-FAKE"
Stream, Event = torch.Stream, torch.Event
_Device = torch.device | str | int | None


def _index(device: Any = None) -> int:
    if device is None:
        return _C.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _C.current_device() if index is None else index


def is_available() -> bool:
    return _C.device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    """Nothing has to be woken."""


_lazy_init = init


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return _C.device_count()


def current_device() -> int:
    return _C.current_device()


def set_device(device: _Device) -> None:
    _C.set_device(_index(device))


class device:
    """Context manager: the body runs with another current device."""

    def __init__(self, device: _Device) -> None:
        self.idx, self.prev = _index(device), -1

    def __enter__(self) -> None:
        self.prev = _C.current_device()
        _C.set_device(self.idx)

    def __exit__(self, type: Any, value: Any, traceback: Any) -> None:
        _C.set_device(self.prev)


@dataclass(frozen=True)
class _Properties:
    total_memory: int
    name: str = NAME


def get_device_name(device_name: _Device = None) -> str:
    return NAME


def get_device_properties(device_name: _Device = None) -> _Properties:
    return _Properties(mem_get_info(device_name)[1])


def get_device_capability(device: _Device = None) -> None:
    """None, as the real one gives unless an environment variable is set."""


# -- memory ---------------------------------------------------------------------------------------------------


def mem_get_info(device: _Device = None) -> tuple[int, int]:
    """(free, total)"""
    _, _, _, _, free, total = _C.memory(_index(device))
    return free, total


def memory_stats(device: _Device = None) -> dict[str, int]:
    kinds = [f"{kind}_bytes.all.{when}" for kind in ("allocated", "reserved") for when in ("current", "peak")]
    return dict(zip(kinds, _C.memory(_index(device))[:4], strict=True))


def memory_allocated(device: _Device = None) -> int:
    return _C.memory(_index(device))[0]


def max_memory_allocated(device: _Device = None) -> int:
    return _C.memory(_index(device))[1]


def memory_reserved(device: _Device = None) -> int:
    return _C.memory(_index(device))[2]


def max_memory_reserved(device: _Device = None) -> int:
    return _C.memory(_index(device))[3]


def reset_peak_memory_stats(device: _Device = None) -> None:
    _C.reset_peak(_index(device))


def empty_cache() -> None:
    _C.empty_cache()


def set_per_process_memory_fraction(fraction: float, device: _Device = None) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    index = _index(device)
    _C.set_memory_limit(index, int(mem_get_info(index)[1] * fraction))


# -- streams --------------------------------------------------------------------------------------------------


def synchronize(device: _Device = None) -> None:
    torch.accelerator.synchronize(_index(device))


def current_stream(device: _Device = None) -> torch.Stream:
    return torch.accelerator.current_stream(_index(device))


def default_stream(device: _Device = None) -> torch.Stream:
    return current_stream(device)


def set_stream(stream: torch.Stream) -> None:
    torch.accelerator.set_stream(stream)


@contextlib.contextmanager
def stream(stream: torch.Stream) -> Iterator[torch.Stream]:
    """There is one stream, so nothing changes."""
    yield stream


# -- random numbers -------------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    _C.default_generator(_C.current_device()).manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(device_count()):
        _C.default_generator(index).manual_seed(int(seed))


def initial_seed() -> int:
    return _C.default_generator(_C.current_device()).initial_seed()


def get_rng_state(device: _Device = "npu") -> torch.Tensor:
    return _C.default_generator(_index(device)).get_state()


def set_rng_state(new_state: torch.Tensor, device: _Device = "npu") -> None:
    _C.default_generator(_index(device)).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


class random:
    """torch.npu.random, as transformers calls it."""

    get_rng_state = staticmethod(get_rng_state)
    set_rng_state = staticmethod(set_rng_state)
    get_rng_state_all = staticmethod(get_rng_state_all)
    set_rng_state_all = staticmethod(set_rng_state_all)


default_generators = tuple(_C.default_generator(index) for index in range(_C.device_count()))


# -- precision ------------------------------------------------------------------------------------------------


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, torch.bfloat16, torch.float32]


# -- for tests; not in the real module ------------------------------------------------------------------------

op_counts = _C.op_counts
"""Operator -> calls, since `reset_counts`."""
transfer_counts = _C.transfer_counts
"""h2d, d2h, d2d, synchronize, empty_cache, and sync: the times the host had to wait for a value of the device."""
reset_counts = _C.reset_counts
set_memory_limit = _C.set_memory_limit
"""(device index, bytes)"""
