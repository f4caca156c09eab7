"""Generation: the engine protocol, the engines, and the table that names them.

An engine is one file in engines/. The table imports it when it is asked for it, so asking for the names loads neither
torch nor an engine's own packages.
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
