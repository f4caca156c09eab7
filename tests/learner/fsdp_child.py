"""Two processes whose model is sharded by FSDP2 over Gloo, against one process; run by test_fsdp.py.

The last line of rank 0 is JSON: the largest difference of a weight after the update, and both metrics.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.optim import Optimizer
from steepest.learner.reference import Reference
from steepest.learner.trainable import ComputeSettings
from steepest.learner.update_plan import plan_passes, plan_update
from tests.learner.test_ranks import OPTIM, SETTINGS, build, uneven
from tests.support.learner_parts import policy, with_log_probs

WORLD = 2


class GlooReducer:
    def sum(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.SUM)

    def max(self, value: Tensor) -> Tensor:
        return self._reduced(value, dist.ReduceOp.MAX)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, op=how)
        return value


def make(dtype: Any) -> Actor:
    compute = ComputeSettings(dtype=dtype)
    actor = build(compute=compute, loss=ActorLossSettings(use_kl_loss=True, kl_loss_type="full", kl_loss_coef=0.5))
    actor.reference = Reference(policy(seed=5), compute=compute)
    return actor


def shard(model: Any) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    parts = [*model.hf.base_model.layers, model]
    for part in parts:
        fully_shard(part, mesh=mesh)
    for part in parts:  # losses are divided by counts over all ranks, so gradients are summed
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)


def work(rank: int, file: str, dtype: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{file}", timeout=timedelta(seconds=60)
    )
    one, sharded = make(dtype), make(dtype)
    batch = with_log_probs(uneven(), one, shift=0.3)
    shard(sharded.model)
    assert isinstance(sharded.reference, Reference)
    shard(sharded.reference.model)
    sharded.optimizer, sharded.reducer = Optimizer(sharded.model.named_parameters(), OPTIM), GlooReducer()
    cut = plan_passes(batch, SETTINGS.micro, batch.trained_mask, ranks=WORLD)[rank]
    passed = sharded.reducer.sum(sharded.log_probs(batch, cut)[0])
    wanted_passed = one.log_probs(batch)[0]
    found = sharded.update_by(replace(batch), plan_update(batch, SETTINGS, 1, ranks=WORLD)[rank])
    wanted = one.update(replace(batch), step=1)
    pairs = zip(sharded.model.parameters(), one.model.parameters(), strict=True)
    far = max(float((mine.full_tensor() - other).abs().max()) for mine, other in pairs)
    if rank == 0:
        passes = float((passed - wanted_passed).abs().max())
        print(json.dumps({"weights": far, "log_probs": passes, "found": found, "wanted": wanted}))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(work, args=(sys.argv[1], sys.argv[2]), nprocs=WORLD)
