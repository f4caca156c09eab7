"""Registers the stand-in for HCCL with torch.distributed: device tensors only, carried by gloo."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from . import _C


def _create(options: Any, group_options: object) -> Any:
    gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)
    return _C.wrap_gloo(gloo)


def register() -> None:
    """Make "hccl" the backend of npu tensors."""
    dist.Backend.register_backend("hccl", _create, extended_api=True, devices=["npu"])
