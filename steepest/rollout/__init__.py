"""Generation: the interface of engines, the engines, and the table of their names.

A factory imports its engine when it is called, so reading the names loads neither torch nor an engine's packages.
"""

from __future__ import annotations

from typing import Any

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


@ROLLOUT_ENGINES.register("builtin")
def builtin(description: Any, **options: Any) -> RolloutEngine:
    """Steepest's own engine; see builtin.engine.BuiltinEngine."""
    from steepest.rollout.builtin.engine import BuiltinEngine

    return BuiltinEngine(description, **options)


@ROLLOUT_ENGINES.register("hf")
def hf(description: Any, **options: Any) -> RolloutEngine:
    """transformers' generate, which is slow and shares no code with ours; see hf.HFEngine."""
    from steepest.rollout.hf import HFEngine

    return HFEngine(description, **options)


def _check_vllm(device: Any) -> None:
    from steepest.rollout.vllm import check_install

    check_install(device)


@ROLLOUT_ENGINES.register("vllm", settings=True, check=_check_vllm)
def vllm(description: Any, **options: Any) -> RolloutEngine:
    """vLLM in the trainer's process; see vllm.VLLMEngine."""
    from steepest.rollout.vllm import start_engine

    return start_engine(description, **options)
