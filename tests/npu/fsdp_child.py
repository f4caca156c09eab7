"""Two processes train with FSDP2 over hccl and compare with one device; run by test_stand_in.py."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch_npu  # noqa: F401  (brings the device)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.npu.test_stand_in import tiny


def step(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The gradient norm of the second of two steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def work(rank: int, port: int) -> None:
    torch.npu.set_device(rank)
    backend = dist.get_default_backend_for_device("npu")
    dist.init_process_group(backend, rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    assert dist.get_backend() == "hccl"
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError as error:
        print("a CPU tensor is refused:", error, file=sys.stderr)
    else:
        raise SystemExit("hccl took a CPU tensor")
    mesh = init_device_mesh("npu", (2,))
    sharded, whole = tiny().npu(), tiny().npu()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(1)).npu()
    torch.testing.assert_close(step(sharded, ids[rank : rank + 1]), step(whole, ids), rtol=1e-4, atol=1e-5)
    for (name, shard), full in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(shard.full_tensor(), full, rtol=1e-3, atol=1e-4, msg=name)
    dist.all_reduce(torch.ones(1).npu())  # nobody leaves before both are done
    dist.destroy_process_group()
    print("equal", flush=True)
    # The comparison is what counts: when an interpreter shuts down, C++ threads of torch that still live may abort it.
    os._exit(0)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (number,), nprocs=2)
