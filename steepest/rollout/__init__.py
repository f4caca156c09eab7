"""Generation: the interface of engines, the engines, and the table of their names.

An engine is one file in engines/. The table imports it when a run asks for it, so reading the names loads neither torch
nor an engine's packages.
"""

from steepest.rollout.api import (
    ROLLOUT_ENGINES,
    Completion,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
    WeightSource,
)

__all__ = [
    "ROLLOUT_ENGINES",
    "Completion",
    "GenerationRequest",
    "RolloutEngine",
    "SamplingParams",
    "WeightSource",
]
