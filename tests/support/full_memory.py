"""Memory that runs out at a chosen operation of torch. The allocation that fails is a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MORE_THAN_ANY_MACHINE = 10**13
"""Numbers of float32."""


class FullMemory(TorchDispatchMode):
    """Within the `with` block every operation whose name begins with `operation` (of torch's own below autograd, such
    as "embedding") first asks for more memory than any machine has."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.operation = operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith(self.operation):
            use_it_up()
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


def use_it_up(*_: Any, **__: Any) -> None:
    """Ask for more memory than any machine has: raises what torch raises then."""
    torch.empty(MORE_THAN_ANY_MACHINE)
