"""Keys that are accepted and change nothing in this run, because of other keys. One printed warning for each reason.

A warning exists only for keys the user gave, and not for a file that merely repeats what would be so anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from steepest.config.idle import Idle
from steepest.config.idle import names_of as _names
from steepest.config.idle_advantages import advantage_idle
from steepest.config.idle_curation import CORRECTION_IDLE, CURATION_IDLE
from steepest.config.needs import reads_ref_log_probs, uses_reference
from steepest.config.resolve import ACTOR, MODEL, REF, ROLLOUT
from steepest.config.reward_functions import GRADER, IN_WORKERS, JUDGE, functions_of
from steepest.config.schema import Config
from steepest.config.sections.sft import SFTConfig
from steepest.config.warnings_policy_loss import POLICY_LOSS_WARNINGS, policy_loss_idle
from steepest.registry import is_own_code


def _optim(section: str, get: Callable[[Any], Any]) -> list[Idle]:
    return [
        Idle(
            _names(section, "min_lr_ratio num_cycles"),
            lambda c: get(c).lr_scheduler_type == "constant",
            f"{section}.lr_scheduler_type is constant",
        ),
        Idle(
            _names(section, "lr_warmup_steps_ratio"),
            lambda c: get(c).lr_warmup_steps > 0,
            f"{section}.lr_warmup_steps wins",
        ),
        Idle(
            _names(section, "zero_indexed_step"),
            lambda c: get(c).lr_warmup_steps <= 0 and get(c).lr_warmup_steps_ratio == 0,
            "there is no warm-up",
        ),
    ]


def _is_here(path: str) -> bool:
    return Path(path).exists()


def _of_a_hub(section: str, get: Callable[[Any], Any]) -> list[Idle]:
    def nothing_is_fetched(c: Any) -> bool:
        model = get(c)
        return _is_here(model.path) and _is_here(getattr(model, "tokenizer_path", model.path))

    reason = f"{section}.path is on this machine"
    return [
        Idle((f"{section}.revision",), lambda c: _is_here(get(c).path), reason),
        Idle((f"{section}.hub",), nothing_is_fetched, reason),
    ]


def _rewards(c: Config) -> set[str]:
    """Names of the rewards that score, `grader` where reward.functions has none."""
    return {function.name for function in functions_of(c.reward.functions)} or {GRADER}


REWARD_IDLE = [
    Idle(("reward.mode",), lambda c: not _rewards(c) & {GRADER, "gsm8k"}, "no reward of reward.functions has modes"),
    Idle(
        _names("reward", "num_workers timeout_s"),
        lambda c: not any(name in IN_WORKERS or is_own_code(name) for name in _rewards(c)),
        "no reward of reward.functions runs in worker processes",
    ),
    Idle(
        _names("reward.reward_model", "model_path hub revision label micro_batch_size_per_gpu dtype trust_remote_code"),
        lambda c: not c.reward.reward_model.enable,
        "reward.functions names no reward_model, and reward.reward_model.enable is off",
    ),
    Idle(
        _names("reward.reward_model", "hub revision"),
        lambda c: _is_here(str(c.reward.reward_model.model_path)),
        "reward.reward_model.model_path is on this machine",
    ),
    Idle(("reward.judge",), lambda c: JUDGE not in _rewards(c), "reward.functions names no judge"),
]


def _actor(c: Config) -> Any:
    return c.actor_rollout_ref.actor


def _rollout(c: Config) -> Any:
    return c.actor_rollout_ref.rollout


def _lora(section: str, get: Callable[[Any], Any]) -> Idle:
    names = _names(section, "lora_alpha target_modules exclude_modules")
    return Idle(names, lambda c: get(c).lora_rank == 0, f"{section}.lora_rank=0 trains all weights, without an adapter")


PPO_IDLE = [
    Idle(
        ("critic", "algorithm.bootstrap_truncated"),
        lambda c: c.critic.enable is False,
        "this run has no critic (algorithm.adv_estimator)",
    ),
    Idle(
        (REF,),
        lambda c: not uses_reference(c),
        "no reference is needed: algorithm.use_kl_in_reward and actor.use_kl_loss are off",
    ),
    Idle(
        (REF,),
        lambda c: not reads_ref_log_probs(c),
        f"{ACTOR}.kl_loss_type=full has the reference compute in the actor's micro-batches",
    ),
    Idle(
        ("algorithm.kl_ctrl", "algorithm.kl_penalty"),
        lambda c: not c.algorithm.use_kl_in_reward,
        "algorithm.use_kl_in_reward is off",
    ),
    Idle(
        _names("algorithm.kl_ctrl", "horizon target_kl"),
        lambda c: c.algorithm.kl_ctrl.type == "fixed",
        "algorithm.kl_ctrl.type is fixed",
    ),
    Idle(
        _names(ACTOR, "kl_loss_coef kl_loss_type"),
        lambda c: not _actor(c).use_kl_loss,
        f"{ACTOR}.use_kl_loss is off (for the reward: algorithm.use_kl_in_reward)",
    ),
    Idle(
        (f"{ACTOR}.loss_scale_factor",),
        lambda c: not _actor(c).loss_agg_mode.endswith("-norm"),
        "no -norm loss_agg_mode",
    ),
    Idle(
        ("critic.loss_scale_factor",),
        lambda c: not str(c.critic.loss_agg_mode).endswith("-norm"),
        "no -norm loss_agg_mode",
    ),
    Idle(
        (f"{ACTOR}.use_prefix_sharing",),
        lambda c: _rollout(c).n == 1,
        f"{ROLLOUT}.n=1: no two responses have one prompt",
    ),
    *CORRECTION_IDLE,
    *CURATION_IDLE,
    Idle(("critic.data_loader_seed",), lambda c: not c.critic.shuffle, "critic.shuffle is off"),
    Idle(
        _names("trainer", "max_actor_ckpt_to_keep max_critic_ckpt_to_keep"),
        lambda c: c.trainer.save_freq < 0,
        "trainer.save_freq=-1 writes no checkpoints",
    ),
    Idle(
        _names("trainer", "log_val_generations validation_data_dir"),
        lambda c: not c.trainer.val_before_train and c.trainer.test_freq < 0,
        "there is no validation: trainer.val_before_train is off and trainer.test_freq is -1",
    ),
    Idle(
        ("trainer.resume_from_path",),
        lambda c: c.trainer.resume_mode != "resume_path",
        "resume_mode is not resume_path",
    ),
    Idle(
        ("custom_reward_function.name",),
        lambda c: c.custom_reward_function.path is None,
        "no custom_reward_function.path",
    ),
    Idle(("reward.mode",), lambda c: c.custom_reward_function.path is not None, "custom_reward_function scores"),
    *REWARD_IDLE,
    Idle(
        _names(ROLLOUT, "gpu_memory_utilization"),
        lambda c: _rollout(c).name == "hf",
        f"{ROLLOUT}.name=hf keeps no KV cache of its own; {ROLLOUT}.max_num_seqs bounds its memory",
    ),
    Idle(
        _names(
            ROLLOUT,
            "enforce_eager enable_chunked_prefill enable_prefix_caching max_num_batched_tokens engine_kwargs.vllm",
        ),
        lambda c: _rollout(c).name != "vllm",
        f"they are vLLM's, and {ROLLOUT}.name is another engine",
    ),
    Idle(
        _names(ROLLOUT, "free_cache_engine"),
        lambda c: _rollout(c).name == "hf",
        f"{ROLLOUT}.name=hf holds nothing between rollouts",
    ),
    Idle(
        _names(ROLLOUT, "max_model_len"),
        lambda c: _rollout(c).max_model_len > c.data.max_prompt_length + c.data.max_response_length,
        "no sequence is longer than data.max_prompt_length + data.max_response_length",
    ),
    Idle(
        _names("critic", "model.enable_gradient_checkpointing model.lora_alpha model.target_modules fsdp.dtype")
        + _names("critic.model", "exclude_modules"),
        lambda c: c.critic.share_base == "head",
        "critic.share_base=head trains a value head alone, on hidden states that are there already",
    ),
    Idle(
        _names("critic", "forward_micro_batch_size_per_gpu forward_max_token_len_per_gpu"),
        lambda c: c.critic.share_base == "head" and uses_reference(c),
        "critic.share_base=head reads its values in the reference's own pass",
    ),
    _lora(MODEL, lambda c: c.actor_rollout_ref.model),
    _lora("critic.model", lambda c: c.critic.model),
    *_of_a_hub(MODEL, lambda c: c.actor_rollout_ref.model),
    *_of_a_hub("critic.model", lambda c: c.critic.model),
    *_optim(f"{ACTOR}.optim", lambda c: _actor(c).optim),
    *_optim("critic.optim", lambda c: c.critic.optim),
]


def ppo_idle() -> list[Idle]:
    """The whole table of the PPO job. What estimators and losses state is read when it is asked for."""
    return [*PPO_IDLE, *advantage_idle(), *policy_loss_idle()]


SFT_IDLE = [
    Idle(
        ("trainer.resume_from_path",),
        lambda c: c.trainer.resume_mode != "resume_path",
        "resume_mode is not resume_path",
    ),
    Idle(_names("data", "val_max_samples"), lambda c: not c.data.val_files, "there are no data.val_files"),
    Idle(("trainer.test_freq",), lambda c: not c.data.val_files, "there are no data.val_files"),
    _lora("model", lambda c: c.model),
    *_of_a_hub("model", lambda c: c.model),
    *_optim("optim", lambda c: c.optim),
]


def idle_warnings(table: list[Idle], config: Config | SFTConfig, asked: Iterable[str]) -> Iterator[str]:
    """One sentence a reason, naming the keys of `asked` that it makes idle. A key is named once."""
    left = list(asked)
    for idle in table:
        named = [key for key in left if idle.speaks_of(key)]
        if named and idle.when(config):
            left = [key for key in left if key not in named]
            yield no_effect(named, idle.reason)


def no_effect(keys: list[str], reason: str) -> str:
    """`a, b have no effect: reason.`"""
    return f"{', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {reason}."


def overruled_micro_batches(given: dict[str, Any], config: Config) -> Iterator[str]:
    """Micro-batch sizes that a token budget (use_dynamic_bsz=True) overrules, and budgets that a size overrules."""
    arr = config.actor_rollout_ref
    passes = [(ACTOR, "ppo", arr.actor), (ROLLOUT, "log_prob", arr.rollout)]
    passes += [("critic", "ppo", config.critic)] if config.critic.enable is not False else []
    passes += [(REF, "log_prob", arr.ref)] if uses_reference(config) else []
    for section, prefix, node in passes:
        rows, tokens = f"{section}.{prefix}_micro_batch_size_per_gpu", f"{section}.{prefix}_max_token_len_per_gpu"
        dynamic = "use_dynamic_bsz" if prefix == "ppo" else "log_prob_use_dynamic_bsz"
        if getattr(node, dynamic) and given.get(rows) is not None:
            yield no_effect([rows], f"{section}.{dynamic}=True fills micro-batches to {tokens}")
        # the actor's budget is also the default of the other passes, so it is never idle for sure
        elif not getattr(node, dynamic) and tokens in given and section in (REF, ROLLOUT):
            yield no_effect([tokens], f"{rows} gives the size in sequences")


def critic_forward_is_overruled(given: dict[str, Any], config: Config) -> Iterator[str]:
    """The critic's forward size beside a token budget for its update."""
    key = "critic.forward_micro_batch_size_per_gpu"
    if config.critic.enable is not False and config.critic.use_dynamic_bsz and given.get(key) is not None:
        yield no_effect(
            [key], "the critic fills micro-batches to a token budget; critic.ppo_micro_batch_size_per_gpu is null"
        )


def clip_is_overruled(given: dict[str, Any], config: Config) -> Iterator[str]:
    """`clip_ratio` beside both of its sides."""
    sides = [f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high"]
    if f"{ACTOR}.clip_ratio" in given and all(given.get(side) is not None for side in sides):
        yield no_effect([f"{ACTOR}.clip_ratio"], "clip_ratio_low and clip_ratio_high are both given")


def gradient_free_kl(given: dict[str, Any], config: Config) -> Iterator[str]:
    """k1 as a loss: its expected gradient is zero (arXiv:2512.21852)."""
    actor = config.actor_rollout_ref.actor
    if actor.use_kl_loss and actor.kl_loss_type in ("kl", "k1"):
        yield (
            f"{ACTOR}.kl_loss_type={actor.kl_loss_type}: the expected gradient of this estimator as a loss is zero. "
            f"Use low_var_kl, or {actor.kl_loss_type}+ for its value with a true gradient."
        )


def kl_is_ignored(given: dict[str, Any], config: Config) -> Iterator[str]:
    """An explicit `use_kl_in_reward=True` with coefficient 0."""
    if config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.kl_coef == 0:
        yield "algorithm.use_kl_in_reward=True with kl_ctrl.kl_coef=0: the KL is measured, and the reward is unchanged."


def filtered_sampling(given: dict[str, Any], config: Config) -> Iterator[str]:
    """top_p or top_k in training: tokens are drawn from another distribution than the one that is trained."""
    rollout = config.actor_rollout_ref.rollout
    if rollout.top_p < 1 or rollout.top_k != -1:
        yield (
            f"{ROLLOUT}.top_p={rollout.top_p:g}, top_k={rollout.top_k}: responses are drawn from a filtered "
            "distribution, the losses use the whole one, so the samples are not quite the policy's, and mismatch/* is "
            f"not measured. For training use top_p=1 and top_k=-1; filters for validation are {ROLLOUT}.val_kwargs."
        )


def small_lora_rate(given: dict[str, Any], config: Config) -> Iterator[str]:
    """LoRA with the learning rate that suits all weights."""
    arr, critic = config.actor_rollout_ref, config.critic
    sections = [(f"{ACTOR}.optim.lr", arr.model.lora_rank > 0, arr.actor.optim.lr, "1e-5")]
    if critic.enable is not False:
        sections.append(("critic.optim.lr", critic.model.lora_rank > 0, critic.optim.lr, "1e-4"))
        sections.append(("critic.optim.lr", critic.share_base == "head", critic.optim.lr, "1e-3"))
    for key, trains_little, lr, usual in sections:
        if trains_little and key not in given:
            yield (
                f"{key}={lr:g} is the default for all weights; with so few of them trained, about {usual} is usual: "
                "see docs/lora.md."
            )


PPO_WARNINGS: list[Callable[[dict[str, Any], Config], Iterator[str]]] = [
    overruled_micro_batches,
    critic_forward_is_overruled,
    clip_is_overruled,
    gradient_free_kl,
    kl_is_ignored,
    filtered_sampling,
    small_lora_rate,
    *POLICY_LOSS_WARNINGS,
]
