"""What the models of a run hold: parameters, how many are trained, bytes. A base that two share counts once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

TRAINING_BYTES = 12
"""Of a trained parameter beside itself: its gradient and two Adam moments, float32."""


@dataclass(frozen=True)
class Size:
    """Of one model, without what an earlier one holds already."""

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


def sizes(models: Any) -> Mapping[str, Size]:
    """`models.Models` -> role -> size, of the models that there are."""
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
    """Of one model; `seen` are the ids of parameters that are counted already, and takes those counted here."""
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
