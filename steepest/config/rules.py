"""What keys must be to each other. Each rule is a small function; all of them run, and all problems are told at once.

A rule names the keys it reads and is passed over when one of them could not be read at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from steepest.config.algorithms import ESTIMATORS
from steepest.config.environment import switch_problems
from steepest.config.resolve import ACTOR, REF, ROLLOUT, IsSet
from steepest.config.schema import Config
from steepest.config.sections.sft import SFTConfig

Check = Callable[[Any, IsSet], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """A check and the keys it reads."""

    keys: tuple[str, ...]
    check: Check


PPO_RULES: list[Rule] = []
SFT_RULES: list[Rule] = []


def rule(*keys: str, table: list[Rule] = PPO_RULES) -> Callable[[Check], Check]:
    """Decorator: add the function to a table of rules."""

    def add(check: Check) -> Check:
        table.append(Rule(keys, check))
        return check

    return add


@rule("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size")
def mini_batches_divide_the_batch(c: Config, is_set: IsSet) -> Iterator[str]:
    batch = c.data.train_batch_size
    sizes = {f"{ACTOR}.ppo_mini_batch_size": c.actor_rollout_ref.actor.ppo_mini_batch_size}
    if is_set("critic.ppo_mini_batch_size"):
        sizes["critic.ppo_mini_batch_size"] = c.critic.ppo_mini_batch_size
    for key, size in sizes.items():
        if size and batch % size:
            divisors = [d for d in range(1, batch + 1) if batch % d == 0]
            near = min(divisors, key=lambda d: (abs(d - size), d))
            yield f"{key}={size}: must divide data.train_batch_size={batch}, e.g. {near}."


@rule("algorithm.adv_estimator", f"{ROLLOUT}.n")
def estimators_need_groups(c: Config, is_set: IsSet) -> Iterator[str]:
    name = c.algorithm.adv_estimator
    if ESTIMATORS.assume(name).in_groups and c.actor_rollout_ref.rollout.n < 2:
        yield (
            f"{ROLLOUT}.n=1 with algorithm.adv_estimator={name}: a group of one has no baseline, "
            f"so every advantage is zero. Use {ROLLOUT}.n >= 2."
        )


@rule(f"{ROLLOUT}.temperature")
def training_samples(c: Config, is_set: IsSet) -> Iterator[str]:
    if c.actor_rollout_ref.rollout.temperature == 0:
        yield (
            f"{ROLLOUT}.temperature=0: temperature 0 is not a policy one can train. Use a value above 0, "
            f"e.g. 1.0; {ROLLOUT}.val_kwargs.temperature is the one for validation."
        )


@rule(f"{ROLLOUT}.tensor_model_parallel_size", "trainer.nnodes", "trainer.n_gpus_per_node")
def rollout_fits_the_cards(c: Config, is_set: IsSet) -> Iterator[str]:
    size, cards = c.actor_rollout_ref.rollout.tensor_model_parallel_size, c.trainer.nnodes * c.trainer.n_gpus_per_node
    if size > cards:
        yield (
            f"{ROLLOUT}.tensor_model_parallel_size={size}: the run has {cards} "
            f"card{'s' if cards > 1 else ''} (trainer.nnodes times trainer.n_gpus_per_node). Use at most {cards}."
        )


@rule(f"{ROLLOUT}.max_num_batched_tokens", f"{ROLLOUT}.max_num_seqs", f"{ROLLOUT}.enable_chunked_prefill")
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


@rule(f"{ROLLOUT}.engine_kwargs.vllm")
def engine_arguments_are_free(c: Config, is_set: IsSet) -> Iterator[str]:
    for name in c.actor_rollout_ref.rollout.engine_kwargs.vllm:
        if name in OWNED_BY_KEYS:
            key = OWNED_BY_KEYS[name]
            yield f"{ROLLOUT}.engine_kwargs.vllm.{name}: " + (f"use {key}." if key else "Steepest sets it. Remove it.")


@rule("trainer.nnodes", "trainer.n_gpus_per_node")
def one_process(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    world = c.trainer.nnodes * c.trainer.n_gpus_per_node
    if world > 1:
        yield (
            f"trainer.nnodes={c.trainer.nnodes} times trainer.n_gpus_per_node={c.trainer.n_gpus_per_node} is {world}: "
            "one process in this version. Set both to 1."
        )


@rule("trainer.resume_mode", "trainer.resume_from_path")
def resume_path_is_given(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    if c.trainer.resume_mode == "resume_path" and not c.trainer.resume_from_path:
        yield (
            "trainer.resume_mode=resume_path: needs trainer.resume_from_path=.../global_step_N, "
            "or use trainer.resume_mode=auto."
        )


def _micro_batch_problems(
    section: str, rows: str, dynamic: str, has_rows: bool, is_dynamic: bool | None
) -> Iterator[str]:
    if is_dynamic is False and not has_rows:
        yield (
            f"{section}.{dynamic}=False: needs {section}.{rows}, or remove it and micro-batches are filled "
            "to a token budget."
        )


@rule(
    *(f"{ACTOR}.{name}" for name in ("use_dynamic_bsz", "ppo_micro_batch_size_per_gpu")),
    *(f"critic.{name}" for name in ("use_dynamic_bsz", "ppo_micro_batch_size_per_gpu")),
    *(f"{x}.log_prob_{name}" for x in (REF, ROLLOUT) for name in ("use_dynamic_bsz", "micro_batch_size_per_gpu")),
)
def micro_batches_have_a_size(c: Config, is_set: IsSet) -> Iterator[str]:
    both = "ppo_micro_batch_size_per_gpu", "use_dynamic_bsz"
    log_prob = "log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz"
    arr = c.actor_rollout_ref
    for section, names, node in (
        (ACTOR, both, arr.actor),
        ("critic", both, c.critic),
        (REF, log_prob, arr.ref),
        (ROLLOUT, log_prob, arr.rollout),
    ):
        yield from _micro_batch_problems(section, *names, *(getattr(node, n) for n in names))


@rule(
    "data.max_prompt_length",
    "data.max_response_length",
    f"{ACTOR}.ppo_max_token_len_per_gpu",
    "critic.ppo_max_token_len_per_gpu",
    "critic.forward_max_token_len_per_gpu",
    f"{REF}.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
    f"{ROLLOUT}.max_model_len",
)
def one_sequence_fits(c: Config, is_set: IsSet) -> Iterator[str]:
    arr = c.actor_rollout_ref
    longest = c.data.max_prompt_length + c.data.max_response_length
    for key, tokens in (
        (f"{ACTOR}.ppo_max_token_len_per_gpu", arr.actor.ppo_max_token_len_per_gpu),
        ("critic.ppo_max_token_len_per_gpu", c.critic.ppo_max_token_len_per_gpu),
        ("critic.forward_max_token_len_per_gpu", c.critic.forward_max_token_len_per_gpu),
        (f"{REF}.log_prob_max_token_len_per_gpu", arr.ref.log_prob_max_token_len_per_gpu),
        (f"{ROLLOUT}.log_prob_max_token_len_per_gpu", arr.rollout.log_prob_max_token_len_per_gpu),
        (f"{ROLLOUT}.max_model_len", arr.rollout.max_model_len),
    ):
        if is_set(key) and tokens is not None and tokens < longest:
            yield (
                f"{key}={tokens}: one sequence may have data.max_prompt_length + data.max_response_length = {longest} "
                f"tokens. Use at least {longest}."
            )


@rule(f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor", "critic.loss_agg_mode", "critic.loss_scale_factor")
def norm_has_a_scale(c: Config, is_set: IsSet) -> Iterator[str]:
    actor = c.actor_rollout_ref.actor
    wanted: dict[str, tuple[str | None, float | None]] = {ACTOR: (actor.loss_agg_mode, actor.loss_scale_factor)}
    if is_set("critic.loss_agg_mode"):
        wanted["critic"] = (c.critic.loss_agg_mode, c.critic.loss_scale_factor)
    for section, (mode, scale) in wanted.items():
        if mode == "seq-mean-token-sum-norm" and scale is None:
            yield (
                f"{section}.loss_agg_mode={mode}: needs {section}.loss_scale_factor, the fixed length to divide by, "
                f"e.g. {c.data.max_response_length} (data.max_response_length)."
            )


@rule("algorithm.adv_estimator", "critic.enable", "trainer.critic_warmup")
def critic_fits_the_estimator(c: Config, is_set: IsSet) -> Iterator[str]:
    name = c.algorithm.adv_estimator
    spec = ESTIMATORS.find(name)
    if spec is not None and spec.needs_critic and c.critic.enable is False:
        yield f"critic.enable=False with algorithm.adv_estimator={name}: {name} needs values. Remove it."
    if spec is not None and not spec.needs_critic and c.critic.enable:
        yield f"critic.enable=True with algorithm.adv_estimator={name}: nothing would read the values. Remove it."
    if c.trainer.critic_warmup and c.critic.enable is False:
        yield (
            f"trainer.critic_warmup={c.trainer.critic_warmup} without a critic (adv_estimator={name}): "
            "nothing would be trained in those steps. Remove it."
        )


@rule("trainer.critic_warmup", "trainer.total_training_steps")
def actor_is_trained(c: Config, is_set: IsSet) -> Iterator[str]:
    steps = c.trainer.total_training_steps
    if steps and c.trainer.critic_warmup >= steps:
        yield (
            f"trainer.critic_warmup={c.trainer.critic_warmup}: the actor would never be trained in "
            f"trainer.total_training_steps={steps}. Use less."
        )


@rule("algorithm.kl_ctrl.type", "algorithm.kl_ctrl.kl_coef", "algorithm.use_kl_in_reward")
def adaptive_kl_can_move(c: Config, is_set: IsSet) -> Iterator[str]:
    control = c.algorithm.kl_ctrl
    if control.type == "adaptive" and control.kl_coef == 0:
        yield "algorithm.kl_ctrl.type=adaptive with kl_coef=0: it is multiplied, so it stays 0. Start above 0."


@rule(f"{ROLLOUT}.val_kwargs.temperature", f"{ROLLOUT}.val_kwargs.do_sample", f"{ROLLOUT}.val_kwargs.n")
def validation_sampling_agrees(c: Config, is_set: IsSet) -> Iterator[str]:
    val = c.actor_rollout_ref.rollout.val_kwargs
    key = f"{ROLLOUT}.val_kwargs"
    if val.do_sample and val.temperature == 0:
        yield f"{key}.do_sample=True with {key}.temperature=0: greedy. Set a temperature, or do_sample=False."
    if val.do_sample is False and val.temperature > 0:
        yield f"{key}.do_sample=False with {key}.temperature={val.temperature:g}: greedy is temperature=0."
    if val.n > 1 and val.temperature == 0:
        yield f"{key}.n={val.n} with {key}.temperature=0: the same answer {val.n} times. Set a temperature."


@rule("actor_rollout_ref.model.hub")
@rule("model.hub", table=SFT_RULES)
def hub_switches_are_clear(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from switch_problems()


@rule("data.tokenizer", "actor_rollout_ref.model.tokenizer_path")
def one_tokenizer(c: Config, is_set: IsSet) -> Iterator[str]:
    mine, other = c.data.tokenizer, c.actor_rollout_ref.model.tokenizer_path
    if mine and mine != other:
        yield f"data.tokenizer={mine} and actor_rollout_ref.model.tokenizer_path={other}: two tokenizers. Give one."


def _is_no_template(key: str, text: str | None) -> Iterator[str]:
    if text is not None and "{" not in text:
        yield (
            f"{key}={text}: not a Jinja template, it has no {{{{ ... }}}}, so every prompt would become this text. "
            f'Give the template itself, not its file: {key}="$(cat FILE)".'
        )


@rule("actor_rollout_ref.model.custom_chat_template")
def chat_template_is_one(c: Config, is_set: IsSet) -> Iterator[str]:
    yield from _is_no_template(
        "actor_rollout_ref.model.custom_chat_template", c.actor_rollout_ref.model.custom_chat_template
    )


@rule("model.custom_chat_template", table=SFT_RULES)
def sft_chat_template_is_one(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from _is_no_template("model.custom_chat_template", c.model.custom_chat_template)


@rule("trainer.val_only", "trainer.val_before_train")
def something_to_do(c: Config, is_set: IsSet) -> Iterator[str]:
    if c.trainer.val_only and not c.trainer.val_before_train:
        yield "trainer.val_only=True with trainer.val_before_train=False: nothing to do. Remove one of them."


@rule("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep")
def checkpoints_are_kept_together(c: Config, is_set: IsSet) -> Iterator[str]:
    actor, critic = c.trainer.max_actor_ckpt_to_keep, c.trainer.max_critic_ckpt_to_keep
    if actor != critic:
        yield (
            f"trainer.max_actor_ckpt_to_keep={actor} and trainer.max_critic_ckpt_to_keep={critic}: a checkpoint holds "
            "actor and critic together. Give one of them, or the same number."
        )


@rule("data.train_max_samples", "data.train_batch_size")
def a_batch_is_full(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    rows, batch = c.data.train_max_samples, c.data.train_batch_size
    if 0 < rows < batch:
        yield (
            f"data.train_max_samples={rows}: fewer than data.train_batch_size={batch}, so no batch is ever full. "
            f"Use data.train_batch_size <= {rows}."
        )


@rule("data.max_length", "data.max_token_len_per_gpu", table=SFT_RULES)
def one_sample_fits(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    tokens = c.data.max_token_len_per_gpu
    if tokens is not None and tokens < c.data.max_length:
        yield (
            f"data.max_token_len_per_gpu={tokens}: one sample may have data.max_length={c.data.max_length} tokens. "
            f"Use at least {c.data.max_length}."
        )


rule("trainer.nnodes", "trainer.n_gpus_per_node", table=SFT_RULES)(one_process)
rule("trainer.resume_mode", "trainer.resume_from_path", table=SFT_RULES)(resume_path_is_given)
rule("data.train_max_samples", "data.train_batch_size", table=SFT_RULES)(a_batch_is_full)
