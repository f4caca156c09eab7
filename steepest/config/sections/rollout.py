"""`actor_rollout_ref.rollout`: generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from steepest.config.checks import ACTOR, ROLLOUT, Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.types import (
    DERIVED,
    ComputeDtype,
    EngineName,
    Mapping,
    MinusOneOr,
    NonNegativeFloat,
    Positive,
    PositiveShare,
    Seed,
)

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()


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


@SECTION.null
def resolve(d: Deriver) -> None:
    longest = d["data.max_prompt_length"] + d["data.max_response_length"]
    d.fill(f"{ROLLOUT}.max_model_len", longest, "data.max_response_length")
    d.copy(f"{ACTOR}.fsdp_config.dtype", f"{ROLLOUT}.dtype")
    temperature = f"{ROLLOUT}.val_kwargs.temperature"
    d.fill(f"{ROLLOUT}.val_kwargs.do_sample", d[temperature] != 0, temperature)


@SECTION.rule(f"{ROLLOUT}.temperature")
def training_samples(c: Config, is_set: IsSet) -> Iterator[str]:
    if c.actor_rollout_ref.rollout.temperature == 0:
        yield (
            f"{ROLLOUT}.temperature=0: temperature 0 is not a policy one can train. Use a value above 0, "
            f"e.g. 1.0; {ROLLOUT}.val_kwargs.temperature is the one for validation."
        )


@SECTION.rule(f"{ROLLOUT}.val_kwargs.temperature", f"{ROLLOUT}.val_kwargs.do_sample", f"{ROLLOUT}.val_kwargs.n")
def validation_sampling_agrees(c: Config, is_set: IsSet) -> Iterator[str]:
    val = c.actor_rollout_ref.rollout.val_kwargs
    key = f"{ROLLOUT}.val_kwargs"
    if val.do_sample and val.temperature == 0:
        yield f"{key}.do_sample=True with {key}.temperature=0: greedy. Set a temperature, or do_sample=False."
    if val.do_sample is False and val.temperature > 0:
        yield f"{key}.do_sample=False with {key}.temperature={val.temperature:g}: greedy is temperature=0."
    if val.n > 1 and val.temperature == 0:
        yield f"{key}.n={val.n} with {key}.temperature=0: the same answer {val.n} times. Set a temperature."


@SECTION.rule(f"{ROLLOUT}.tensor_model_parallel_size", "trainer.nnodes", "trainer.n_gpus_per_node")
def rollout_fits_the_cards(c: Config, is_set: IsSet) -> Iterator[str]:
    size, cards = c.actor_rollout_ref.rollout.tensor_model_parallel_size, c.trainer.nnodes * c.trainer.n_gpus_per_node
    if size > cards:
        yield (
            f"{ROLLOUT}.tensor_model_parallel_size={size}: the run has {cards} "
            f"card{'s' if cards > 1 else ''} (trainer.nnodes times trainer.n_gpus_per_node). Use at most {cards}."
        )


@SECTION.rule(f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs", f"{ROLLOUT}.enable_chunked_prefill")
def one_pass_of_vllm_is_large_enough(c: Config, is_set: IsSet) -> Iterator[str]:
    rollout = c.actor_rollout_ref.rollout
    tokens, longest = rollout.max_num_batched_tokens, c.data.max_prompt_length + c.data.max_response_length
    if rollout.name != "vllm":
        return
    if tokens < rollout.max_num_seqs:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={tokens}: each of {ROLLOUT}.max_num_seqs={rollout.max_num_seqs} "
            "sequences takes a token of a pass. Raise the one or lower the other."
        )
    if not rollout.enable_chunked_prefill and tokens < longest:
        yield (
            f"{ROLLOUT}.max_num_batched_tokens={tokens} with {ROLLOUT}.enable_chunked_prefill=False: a sequence of "
            f"{longest} tokens (data.max_prompt_length + data.max_response_length) does not fit. "
            f"Use at least {longest}."
        )


OWNED_BY_KEYS = {
    "model": "actor_rollout_ref.model.path",
    "tokenizer": "actor_rollout_ref.model.tokenizer_path",
    "skip_tokenizer_init": None,
    "load_format": None,
    "logprobs_mode": None,
    "disable_log_stats": None,
    "seed": f"{ROLLOUT}.seed",
    "dtype": f"{ROLLOUT}.dtype",
    "quantization": None,
    "max_model_len": f"{ROLLOUT}.max_model_len",
    "max_num_seqs": f"{ROLLOUT}.max_num_seqs",
    "max_num_batched_tokens": f"{ROLLOUT}.max_num_batched_tokens",
    "gpu_memory_utilization": f"{ROLLOUT}.gpu_memory_utilization",
    "tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "enforce_eager": f"{ROLLOUT}.enforce_eager",
    "enable_chunked_prefill": f"{ROLLOUT}.enable_chunked_prefill",
    "enable_prefix_caching": f"{ROLLOUT}.enable_prefix_caching",
    "enable_sleep_mode": f"{ROLLOUT}.free_cache_engine",
}
"""Arguments of vllm.LLM that have a key of their own; None: that Steepest sets itself."""


@SECTION.rule(f"{ROLLOUT}.engine_kwargs.vllm")
def engine_arguments_are_free(c: Config, is_set: IsSet) -> Iterator[str]:
    for name in c.actor_rollout_ref.rollout.engine_kwargs.vllm:
        if name in OWNED_BY_KEYS:
            key = OWNED_BY_KEYS[name]
            yield f"{ROLLOUT}.engine_kwargs.vllm.{name}: " + (f"use {key}." if key else "Steepest sets it. Remove it.")


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            names_of(ROLLOUT, "gpu_memory_utilization"),
            lambda c: c.actor_rollout_ref.rollout.name == "hf",
            f"{ROLLOUT}.name=hf keeps no KV cache of its own; {ROLLOUT}.max_num_seqs bounds its memory",
        ),
        NoEffect(
            names_of(
                ROLLOUT,
                "enforce_eager enable_chunked_prefill enable_prefix_caching max_num_batched_tokens engine_kwargs.vllm",
            ),
            lambda c: c.actor_rollout_ref.rollout.name != "vllm",
            f"they are vLLM's, and {ROLLOUT}.name is another engine",
        ),
        NoEffect(
            names_of(ROLLOUT, "free_cache_engine"),
            lambda c: c.actor_rollout_ref.rollout.name == "hf",
            f"{ROLLOUT}.name=hf holds nothing between rollouts",
        ),
        NoEffect(
            names_of(ROLLOUT, "max_model_len"),
            lambda c: c.actor_rollout_ref.rollout.max_model_len > c.data.max_prompt_length + c.data.max_response_length,
            "no sequence is longer than data.max_prompt_length + data.max_response_length",
        ),
    ]


@SECTION.warning
def filtered_sampling(given: dict[str, Any], config: Config) -> Iterator[str]:
    """top_p or top_k in training: tokens are drawn from another distribution than the one that is trained."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.top_p < 1 or rollout.top_k != -1:
        yield (
            f"{ROLLOUT}.top_p={rollout.top_p:g}, top_k={rollout.top_k}: responses are drawn from a filtered "
            "distribution, the losses use the whole one, so the samples are not quite the policy's, and mismatch/* is "
            f"not measured. For training use top_p=1 and top_k=-1; filters for validation are {ROLLOUT}.val_kwargs."
        )
