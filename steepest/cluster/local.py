"""Every role in this process, and how the driver calls it.

The driver (trainer/) holds data order, tokenizer, rewards, advantages and logs. It reaches models and engine through
the methods of `LocalCluster` alone; an implementation over several processes offers the same methods and stands next to
this file. Batches come and go on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from steepest.assembly.description import Description, describe_roles
from steepest.assembly.roles import Roles
from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.devices.api import Device
from steepest.learner.critic import ValuesAndGradient
from steepest.learner.metrics import Metrics
from steepest.learner.update_plan import plan_update
from steepest.models.flops import generation_flops
from steepest.rollout import Completion, GenerationRequest


class LocalCluster:
    """One process that holds all roles of the run.

    `frees_engine`: the engine gives its memory back while the models train, and is woken with the new weights.
    """

    def __init__(self, roles: Roles, device: Device, *, frees_engine: bool) -> None:
        self.roles, self.device, self.frees_engine = roles, device, frees_engine

    # -- rollouts -------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """See RolloutEngine. `take_flops` leaves its operations out: see `generation_flops`."""
        return self.roles.engine.generate(requests)

    def generation_flops(self, batch: Batch) -> float:
        """Operations of generating these responses by an engine that keeps keys and values."""
        return generation_flops(self.roles.actor.model, batch)

    def release_engine(self) -> None:
        """All responses of a step are there: let the engine give its memory back, where that is asked for."""
        if self.frees_engine:
            self.roles.engine.sleep()

    def publish(self, version: int) -> None:
        """Give the engine the actor's weights as they are now, which wakes it."""
        if self.frees_engine:  # its allocator may be another one than torch's, which keeps memory of the training
            self.device.empty_cache()
        self.roles.engine.load_weights(self.roles.weights, version)

    # -- passes before the update ---------------------------------------------------------------------------

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(log-probs, entropies) (B, T) f32 by the actor, see Actor.log_probs."""
        return self.roles.actor.log_probs(batch)

    def log_probs_and_squares(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """See Actor.log_probs_and_squares."""
        return self.roles.actor.log_probs_and_squares(batch)

    def policy_is_reference(self) -> bool:
        """Whether the actor still computes as the reference, bit for bit."""
        reference = self.roles.reference
        assert reference is not None
        in_bf16 = reference.compute.dtype == self.roles.actor.compute.dtype == "bfloat16"
        return self.roles.actor.model.computes_as(reference.model, in_bf16=in_bf16)

    def ref_log_probs(self, batch: Batch) -> Tensor:
        """(B, T) f32 by the reference."""
        assert self.roles.reference is not None
        return self.roles.reference.log_probs(batch)

    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(values (B, T), final values (B,)) by the critic."""
        assert self.roles.critic is not None
        return self.roles.critic.values(batch)

    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall) -> ValuesAndGradient:
        """`values`, and the gradient of the critic's one update, see Critic.values_and_gradient."""
        assert self.roles.critic is not None
        return self.roles.critic.values_and_gradient(batch, estimator)

    # -- updates --------------------------------------------------------------------------------------------

    def update_actor(self, batch: Batch, step: int) -> Metrics:
        """One update by the plan of this process, see Actor.update_by."""
        actor = self.roles.actor
        (plan,) = plan_update(batch, actor.settings, step, shares_prompts=actor.compute.shares_prompts)
        return actor.update_by(batch, plan)

    def update_critic(self, batch: Batch, step: int) -> Metrics:
        """One update by the plan of this process, see Critic.update_by."""
        critic = self.roles.critic
        assert critic is not None
        (plan,) = plan_update(batch, critic.settings, step, shares_prompts=critic.compute.shares_prompts)
        return critic.update_by(batch, plan)

    def step_critic(self, batch: Batch, found: ValuesAndGradient) -> Metrics:
        """The optimizer step after `values_and_gradient`."""
        assert self.roles.critic is not None
        return self.roles.critic.step_on_gradient(batch, found)

    def take_flops(self) -> float:
        """Operations of the passes and updates since it was last called."""
        return self.roles.take_flops()

    # -- files and facts ------------------------------------------------------------------------------------

    def writers(self, tokenizer: Any) -> Mapping[str, Callable[[Path], None]]:
        """Sub-folder of a checkpoint -> what writes it."""
        roles = self.roles
        writers: dict[str, Callable[[Path], None]] = {"actor": partial(roles.actor.save, tokenizer=tokenizer)}
        if roles.critic is not None:
            writers["critic"] = partial(roles.critic.save, tokenizer=tokenizer)
        return writers

    def describe(self) -> Description:
        """Sizes, dtypes and notes of the roles."""
        return describe_roles(self.roles)
