"""`actor_rollout_ref.rollout`: generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from steepest.config.schema_model import ComputeDtype
from steepest.config.schema_types import (
    DERIVED,
    EngineName,
    Mapping,
    MinusOneOr,
    NonNegativeFloat,
    Positive,
    PositiveShare,
    Seed,
)


@dataclass(frozen=True)
class EngineKwargsConfig:
    """`actor_rollout_ref.rollout.engine_kwargs`."""

    vllm: Mapping = field(default_factory=dict)
    """Further arguments of `vllm.LLM`, as they are, e.g. `{block_size: 32}`."""


@dataclass(frozen=True)
class ValKwargsConfig:
    """`actor_rollout_ref.rollout.val_kwargs`: sampling in validation."""

    temperature: NonNegativeFloat = 0.0
    """0: greedy."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this probability; 1: all."""
    top_k: Annotated[int, MinusOneOr(1)] = -1
    """Sample from the most probable tokens, this many; -1: all."""
    n: Positive = 1
    """Responses a validation prompt; their scores are averaged."""
    do_sample: bool = DERIVED
    """Must agree with `temperature`: false is greedy; null: what `temperature` says."""


@dataclass(frozen=True)
class RolloutConfig:
    """`actor_rollout_ref.rollout`: generation, and the pass that computes old log-probs."""

    name: EngineName = "builtin"
    """Engine: builtin (the actor's own weights), vllm (a copy of them in vLLM, in process), hf (transformers, slow)."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature in training, above 0; log-probs everywhere are those at this temperature."""
    top_p: PositiveShare = 1.0
    """Sample from the smallest set of tokens with this probability; 1: all."""
    top_k: Annotated[int, MinusOneOr(1)] = -1
    """Sample from the most probable tokens, this many; -1: all."""
    n: Positive = 1
    """Responses a prompt."""
    ignore_eos: bool = False
    """Generate to the length limit even after an end token."""
    seed: Seed = 42
    """Seed of sampling: the same seed gives the same tokens."""
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)
    log_prob_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward of the old-log-prob pass; null: filled to the token budget."""
    log_prob_use_dynamic_bsz: bool = DERIVED
    """Fill that pass's micro-batches to a token budget; null: on unless the key above is given."""
    log_prob_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch of that pass; null: `actor.ppo_max_token_len_per_gpu`."""
    dtype: ComputeDtype = DERIVED
    """dtype of generation; null: `actor.fsdp_config.dtype`."""
    gpu_memory_utilization: PositiveShare = 0.5
    """Share of all memory (of the card; on CPU of the machine) that the engine may use for its KV cache; vLLM on a
    card: for its weights too."""
    max_num_seqs: Positive = 256
    """Sequences decoded at once, at most: a small `gpu_memory_utilization` allows fewer."""
    max_model_len: Positive = DERIVED
    """Longest sequence in tokens, prompt and response; null: `max_prompt_length + max_response_length`."""
    free_cache_engine: bool | None = None
    """Give the engine's memory back while the models train; null: on accelerators. verl: on."""
    tensor_model_parallel_size: Positive = 1
    """vLLM: cards that share the engine's model; at most those of the run."""
    enforce_eager: bool | None = None
    """vLLM: no compilation and no graphs; null: on the CPU. verl: off."""
    enable_chunked_prefill: bool = True
    """vLLM: a long prompt may be read in parts."""
    enable_prefix_caching: bool = True
    """vLLM: read a shared prompt once. The cache is emptied after each update."""
    max_num_batched_tokens: Positive = 8192
    """vLLM: tokens of one pass, at least `max_num_seqs`, and at least `max_model_len` without chunked prefill."""
    engine_kwargs: EngineKwargsConfig = field(default_factory=EngineKwargsConfig)
