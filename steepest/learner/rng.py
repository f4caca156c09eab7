"""Every random state of a process as plain JSON, so that a resumed run draws what the unbroken one would have."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from steepest.devices.api import Device
from steepest.errors import CheckpointError


def rng_state(device: Device) -> dict[str, Any]:
    """States of Python's `random`, numpy's global generator and torch's (CPU and device), JSON-able."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": _plain(numpy_state),
        "torch": {name: _encode(state) for name, state in device.rng_state().items()},
    }


def set_rng_state(state: dict[str, Any], device: Device) -> None:
    """Put back what `rng_state` gave, also after a trip through JSON. Raises CheckpointError for anything else."""
    try:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        inner = state["numpy"]["state"]
        key = np.array(inner["key"], dtype=np.uint32)
        np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
        device.set_rng_state({name: _decode(text) for name, text in state["torch"].items()})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the random states of the checkpoint cannot be read: {error!r}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.cpu().tolist())).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
