"""Requests of equal sampling, and engines that hold a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steepest.models.causal_lm import CausalLM
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.weights import LocalWeights, ModelDescription


def requests_of(prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[GenerationRequest]:
    """One request for each prompt; its id is its place."""
    return [GenerationRequest(prompt, sampling, str(place)) for place, prompt in enumerate(prompts)]


def loaded(make: Callable[..., Any], model: CausalLM, *, version: int = 0, **options: Any) -> Any:
    """The engine that `make` (a class or factory) builds for `model`, with the model's weights."""
    engine = make(ModelDescription.of(model), **options)
    engine.load_weights(LocalWeights(model), version)
    return engine
