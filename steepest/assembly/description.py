"""What the roles of a run are, in numbers and words that travel to the driver: sizes, dtypes, attention, the engine's
copies. A base that two models share counts once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steepest.assembly.roles import Models, Roles
from steepest.models.flops import key_value_numbers
from steepest.models.working_weights import copied_bytes

TRAINING_BYTES = 12
"""Bytes of a trained parameter in addition to the parameter itself: its gradient and two Adam moments, float32."""


@dataclass(frozen=True)
class Size:
    """Size of one model; parameters that an earlier model holds are excluded."""

    parameters: int = 0
    trained: int = 0
    bytes: int = 0
    """Weights, and gradients and moments of those that are trained."""
    shares_base: bool = False
    """Whether it runs on the actor's base."""
    halved: bool = False
    """Whether it holds matrices in bf16."""

    def describe(self, count: Any) -> str:
        """For the summary at start; `count` writes a number."""
        if self.shares_base:
            return f"{count(self.parameters)} on the actor's base" if self.parameters else "the actor's base"
        some = f", of which {count(self.trained)} are trained" if 0 < self.trained < self.parameters else ""
        return f"{count(self.parameters)}{some}"


def sizes(models: Models) -> Mapping[str, Size]:
    """Role -> size, of the models that there are."""
    seen: set[int] = set()
    found: dict[str, Size] = {}
    # What a critic has added to the actor's base is the critic's, so it comes first.
    shared = models.critic is not None and getattr(models.critic.model, "shares_base", False)
    for role in ("critic", "actor", "reference") if shared else ("actor", "critic", "reference"):
        part = getattr(models, role)
        if part is not None:
            found[role] = size_of(part, seen, only_saved=role == "critic" and shared)
    return {role: found[role] for role in ("actor", "critic", "reference") if role in found}


def size_of(part: Any, seen: set[int] | None = None, *, only_saved: bool = False) -> Size:
    """The size of one model. `seen` has the ids of parameters that are counted already, and gets those counted here."""
    seen = set() if seen is None else seen
    saved = dict(part.model.saved_parameters())
    held = [p for p in (saved.values() if only_saved else part.model.parameters()) if id(p) not in seen]
    seen.update(id(p) for p in held)
    trains = part.optimizer is not None
    trained = sum(p.numel() for p in saved.values() if trains and p.requires_grad)
    return Size(
        parameters=sum(p.numel() for p in held),
        trained=trained,
        bytes=sum(p.numel() * p.element_size() for p in held) + TRAINING_BYTES * trained,
        shares_base=only_saved or not held,
        halved=any(p.dtype == torch.bfloat16 for p in held),
    )


@dataclass(frozen=True)
class Description:
    """Everything that the summary, the health limits and the checkpoints of a run ask of its roles."""

    sizes: Mapping[str, Size]
    compute: str
    """dtype that the actor computes in."""
    attention: str
    """What the actor attends with; the critic too where it differs."""
    shares_prompts: bool
    """Whether the responses of a prompt are computed over one copy of it."""
    kv_numbers: int
    """Keys and values of one token in all layers, as numbers."""
    cast_bytes: int
    """Copies in bfloat16 of weights in float32, of all models."""
    engine_copy_bytes: int
    engine_notes: tuple[str, ...]
    checkpoint_bytes: int
    """About how many bytes a checkpoint takes."""


def describe_roles(roles: Roles) -> Description:
    """The description of roles in this process."""
    actor, critic = roles.actor, roles.critic
    attention = actor.compute.attention.describe()
    if critic is not None and critic.compute.attention.describe() != attention:
        attention = f"actor {attention}; critic {critic.compute.attention.describe()}"
    return Description(
        sizes=sizes(roles),
        compute=actor.compute.dtype,
        attention=attention,
        shares_prompts=actor.compute.shares_prompts,
        kv_numbers=key_value_numbers(actor.model.config),
        cast_bytes=cast_bytes(roles),
        engine_copy_bytes=roles.engine.copied_bytes,
        engine_notes=roles.engine.notes,
        checkpoint_bytes=sum(part.checkpoint_bytes() for part in (actor, critic) if part is not None),
    )


def cast_bytes(models: Models) -> int:
    """Bytes of the copies in bfloat16 that the models keep of weights in float32; a shared weight has one copy."""
    parts = (part for part in (models.actor, models.critic, models.reference) if part is not None)
    weights = {id(weight): weight for part in parts for weight in part.model.parameters()}
    return copied_bytes(weights.values())
