"""The process that asks torch and the devices: `python -m steepest.doctor.probe`.

It prints each JSON object on a line of its own as soon as it is known, so that a crash or a hang loses no earlier
answer: `{"begin": stage}` before a stage, then `{"stage": ..., ...}` with what it found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from steepest.config.key_names import PPO_KEYS
from steepest.errors import key_names, render

if TYPE_CHECKING:
    from steepest.devices import Device

TORCH = "torch"
CHOICE = "choice"
CHECKS = " checks"
"""Suffix of a device's name: the stage of its checks."""


def main() -> None:
    """Run all stages once. Output of libraries goes to standard error, away from the answers."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if _stage(out, TORCH, _torch):
        from steepest.devices.api import by_preference

        *better, last = by_preference()  # every machine has the last one, so it answers before devices that may hang
        for device in [last, *better]:
            _stage(out, device.name, partial(_facts, device))
            _stage(out, device.name + CHECKS, partial(_checks, device))
        _stage(out, CHOICE, _choice)
    out.flush()
    os._exit(0)  # a broken library may crash at the interpreter's exit; all answers are printed


def _stage(out: TextIO, name: str, ask: Callable[[], Mapping[str, Any]]) -> bool:
    """Print the result of `ask`, or the error that it raises. Returns True for a result."""
    _print(out, {"begin": name})
    try:
        with key_names(PPO_KEYS):
            answer = dict(ask())
    except BaseException as error:  # whatever a broken package raises, SystemExit included, is an answer
        _print(out, {"stage": name, "error": f"{type(error).__name__}: {error}"})
        return False
    _print(out, {"stage": name, **answer})
    return True


def _print(out: TextIO, answer: Mapping[str, Any]) -> None:
    out.write(json.dumps(_in_keys(answer)) + "\n")
    out.flush()


def _in_keys(value: Any) -> Any:
    """The value with settings by their keys in all its texts."""
    if isinstance(value, str):
        return render(value, PPO_KEYS)
    if isinstance(value, Mapping):
        return {name: _in_keys(entry) for name, entry in value.items()}
    return [_in_keys(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "threads": torch.get_num_threads()}


def _choice() -> dict[str, Any]:
    from steepest.devices import select_device

    device = select_device()
    return {"device": device.name, "why": device.chosen_because}


def _facts(device: Device) -> dict[str, Any]:
    """The facts of a device as plain values; if it is not available, only those that need no hardware."""
    from steepest.rollout import vllm_versions

    reason = device.availability()
    facts: dict[str, Any] = {
        "available": reason is None,
        "reason": reason,
        "expected": device.expected(),
        "distributed_backend": device.distributed_backend,
        "visible_devices_variable": device.visible_devices_variable,
        "ray_resource": device.ray_resource,
        "allocator_variable": device.allocator_variable,
        "sleep_level": device.sleep_level,
        "vllm_install": device.vllm_install,
        "environment": device.environment(),
        "rollout_environment": device.rollout_environment(),
    }
    if reason is None:
        vllm = vllm_versions.installed()
        memory = device.memory()
        bf16, why_bf16 = device.supports_bf16()
        attention, why_attention = device.attention_implementation()
        facts |= {
            "count": device.count(),
            "hardware": device.hardware(),
            "memory_total": memory.total,
            "memory_available": memory.available,
            "bf16": bf16,
            "bf16_reason": why_bf16,
            "dtype": str(device.default_dtype()).removeprefix("torch."),
            "dtype_words": device.dtype_words(),
            "attention": attention,
            "attention_reason": why_attention,
            "vllm_problem": None if vllm is None else device.vllm_problem(*vllm),
        }
    return facts


def _checks(device: Device) -> dict[str, Any]:
    return {
        "versions": [asdict(check) for check in device.version_checks()],
        "setup": [asdict(check) for check in device.setup_checks()],
    }


if __name__ == "__main__":
    main()
