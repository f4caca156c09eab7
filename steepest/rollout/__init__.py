"""Generation: the engine protocol, the engines, and the table that names them.

Factories import their engine when called, so asking for the names loads neither torch nor an engine's own packages.
"""

from __future__ import annotations

from typing import Any

from steepest.rollout.api import ROLLOUT_ENGINES, Completion, RolloutEngine, SamplingParams

__all__ = ["ROLLOUT_ENGINES", "Completion", "RolloutEngine", "SamplingParams"]


@ROLLOUT_ENGINES.register("builtin")
def builtin(model: Any, **options: Any) -> RolloutEngine:
    """The engine in the trainer's own process; see builtin.engine.BuiltinEngine."""
    from steepest.rollout.builtin.engine import BuiltinEngine

    return BuiltinEngine(model, **options)


@ROLLOUT_ENGINES.register("hf")
def hf(model: Any, **options: Any) -> RolloutEngine:
    """transformers' generate, slow and independent; see hf.HFEngine."""
    from steepest.rollout.hf import HFEngine

    return HFEngine(model, **options)


def _check_vllm(device: Any) -> None:
    from steepest.rollout.vllm import check_install

    check_install(device)


@ROLLOUT_ENGINES.register("vllm", settings=True, check=_check_vllm)
def vllm(model: Any, **options: Any) -> RolloutEngine:
    """vLLM in the trainer's process; see vllm.VLLMEngine."""
    from steepest.rollout.vllm import start_engine

    return start_engine(model, **options)
