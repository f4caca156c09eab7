"""The rollout engine of a run, from the configuration; and when it gives its memory back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steepest.assembly.compute import compute_dtype
from steepest.config.schema import Config
from steepest.devices.api import Accelerator, Device
from steepest.learner.rng import rng_state, set_rng_state
from steepest.models.load import end_token_ids
from steepest.rollout import ROLLOUT_ENGINES, RolloutEngine
from steepest.rollout.engines.vllm import VLLMSettings
from steepest.rollout.weights import ModelDescription


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with its response; a larger `rollout.max_model_len` changes nothing."""
    return min(
        config.actor_rollout_ref.rollout.max_model_len, config.data.max_prompt_length + config.data.max_response_length
    )


def frees_engine(config: Config, device: Device) -> bool:
    """Whether the engine gives its memory back while the models train; by default where memory is a card's."""
    wanted = config.actor_rollout_ref.rollout.free_cache_engine
    return isinstance(device, Accelerator) if wanted is None else wanted


def vllm_settings(config: Config, device: Device) -> VLLMSettings:
    """What the configuration and the device say to vLLM."""
    rollout = config.actor_rollout_ref.rollout
    eager = rollout.enforce_eager
    return VLLMSettings(
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        enforce_eager=not isinstance(device, Accelerator) if eager is None else eager,
        enable_chunked_prefill=rollout.enable_chunked_prefill,
        enable_prefix_caching=rollout.enable_prefix_caching,
        max_num_batched_tokens=rollout.max_num_batched_tokens,
        usual_rows=config.data.train_batch_size * rollout.n,
        sleep_level=device.sleep_level if frees_engine(config, device) else None,
        environment=device.rollout_environment(),
        extra=rollout.engine_kwargs.vllm,
    )


def build_engine(
    config: Config, description: ModelDescription, tokenizer: Any, folder: Path, device: Device
) -> RolloutEngine:
    """The rollout engine for a model, without weights. `folder` has the model's list of end tokens. Random states are
    put back after the engine's start."""
    random = rng_state(device)
    try:
        return _make_engine(config, description, tokenizer, folder, device)
    finally:
        set_rng_state(random, device)


def _make_engine(
    config: Config, description: ModelDescription, tokenizer: Any, folder: Path, device: Device
) -> RolloutEngine:
    rollout = config.actor_rollout_ref.rollout
    entry = ROLLOUT_ENGINES.get(rollout.name)
    more = {"settings": vllm_settings(config, device)} if entry.facts.get("settings") else {}
    return entry.value(
        description,
        end_token_ids=end_token_ids(folder, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        dtype=getattr(torch, compute_dtype(rollout.dtype, device)),
        max_num_seqs=rollout.max_num_seqs,
        max_model_len=longest_sequence(config),
        # A share of all memory, not of the free memory: a resumed run must batch as the first one did.
        kv_memory_bytes=int(rollout.gpu_memory_utilization * device.memory().total),
        **more,
    )
