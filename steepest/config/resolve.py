"""Fill in what is null: values that follow from other keys. The loaded Config holds the results.

Each function gets the tree of nested dicts and `is_set` (did the user give this key?), changes the tree in place and
returns {filled key: key it came from}. What also needs the data or the estimator is in plan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steepest.config.algorithms import ESTIMATORS, LOSSES
from steepest.config.environment import hub_from_environment
from steepest.config.reward_functions import REWARD_MODEL
from steepest.config.tree import get, put

IsSet = Callable[[str], bool]
TOKEN_BUDGET = 4096
"""Tokens a micro-batch by default. verl's 16384 (32768 for the critic) suit an 80 GB card; a 0.5B model needs about
2.5 MB a token for float32 activations, so 4096 tokens fit in 16 GB with the weights."""
MINI_BATCH = 256
ACTOR, REF, ROLLOUT, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "ref", "rollout", "model"))


class Deriver:
    """Fills null keys and remembers from what."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree, self.derived = tree, dict[str, str]()

    def __getitem__(self, key: str) -> Any:
        return get(self.tree, key)

    def fill(self, key: str, value: Any, origin: str) -> None:
        """Set `key` if it is null."""
        if self[key] is None and value is not None:
            put(self.tree, key, value)
            self.derived[key] = origin

    def copy(self, origin: str, *keys: str) -> None:
        """Let each null key follow `origin`."""
        for key in keys:
            self.fill(key, self[origin], origin)

    def micro_batches(self, rows: str, dynamic: str) -> None:
        """Either rows or a token budget: with a budget the number of rows is null."""
        self.fill(dynamic, self[rows] is None, rows)
        if self[dynamic] and self[rows] is not None:
            put(self.tree, rows, None)
            self.derived[rows] = dynamic


def resolve_ppo(tree: dict[str, Any], is_set: IsSet) -> dict[str, str]:
    """Fill in the PPO job's tree."""
    d = Deriver(tree)
    longest = d["data.max_prompt_length"] + d["data.max_response_length"]
    _resolve_models(d, is_set)
    batch = d["data.train_batch_size"]
    d.fill(f"{ACTOR}.ppo_mini_batch_size", batch if batch % MINI_BATCH else MINI_BATCH, "data.train_batch_size")
    _resolve_policy_loss(d, is_set)
    d.fill(f"{ACTOR}.ppo_max_token_len_per_gpu", max(TOKEN_BUDGET, longest), "data.max_response_length")
    d.fill(f"{ROLLOUT}.max_model_len", longest, "data.max_response_length")
    d.copy(f"{ACTOR}.fsdp_config.dtype", f"{ROLLOUT}.dtype", "critic.fsdp.dtype")
    greedy = d[f"{ROLLOUT}.val_kwargs.temperature"] == 0
    d.fill(f"{ROLLOUT}.val_kwargs.do_sample", not greedy, f"{ROLLOUT}.val_kwargs.temperature")
    _resolve_critic(d)
    _resolve_micro_batches(d)
    _resolve_kl(d, is_set)
    _resolve_reward(d)
    _resolve_trainer(d)
    d.copy("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep")
    d.copy("trainer.max_critic_ckpt_to_keep", "trainer.max_actor_ckpt_to_keep")
    return d.derived


def _resolve_hub(d: Deriver, key: str, is_set: IsSet) -> None:
    """The hub that the environment asks for, where the user gave none."""
    hub, chosen_by = hub_from_environment()
    if chosen_by is not None and not is_set(key):
        put(d.tree, key, hub)
        d.derived[key] = chosen_by


def _resolve_models(d: Deriver, is_set: IsSet) -> None:
    _resolve_hub(d, f"{MODEL}.hub", is_set)
    d.copy("data.tokenizer", f"{MODEL}.tokenizer_path")
    d.fill(f"{MODEL}.tokenizer_path", d[f"{MODEL}.path"] or None, f"{MODEL}.path")
    d.copy(f"{MODEL}.trust_remote_code", "data.trust_remote_code", "critic.model.trust_remote_code")
    d.fill("critic.model.path", d[f"{MODEL}.path"] or None, f"{MODEL}.path")
    d.copy(f"{MODEL}.hub", "critic.model.hub")
    if d["critic.model.path"] == d[f"{MODEL}.path"] and d["critic.model.hub"] == d[f"{MODEL}.hub"]:
        d.copy(f"{MODEL}.revision", "critic.model.revision")
    d.copy(f"{MODEL}.enable_gradient_checkpointing", "critic.model.enable_gradient_checkpointing")
    _resolve_lora(d)


def _resolve_lora(d: Deriver) -> None:
    if d["critic.share_base"] == "adapter":
        d.copy(f"{MODEL}.lora_rank", "critic.model.lora_rank")
    d.fill("critic.model.lora_rank", 0, "critic.share_base")
    if d["critic.share_base"] is not None and not d["critic.model.override_config"]:
        put(d.tree, "critic.model.override_config", dict(d[f"{MODEL}.override_config"]))
    for name in ("lora_alpha", "target_modules", "exclude_modules"):
        d.copy(f"{MODEL}.{name}", f"critic.model.{name}")


def _resolve_policy_loss(d: Deriver, is_set: IsSet) -> None:
    key, low, high = (f"{ACTOR}.{name}" for name in ("policy_loss.loss_mode", "clip_ratio_low", "clip_ratio_high"))
    loss = LOSSES.assume(d[key])  # the user's own function gets PPO's values
    if loss.clip_range is not None and not is_set(f"{ACTOR}.clip_ratio"):
        for side, value in zip((low, high), loss.clip_range, strict=True):
            d.fill(side, value, key)
    d.copy(f"{ACTOR}.clip_ratio", low, high)
    d.fill(f"{ACTOR}.clip_ratio_c", loss.ratio_bound, key)
    # The critic follows the user's word, not what suits a loss of whole responses.
    d.copy(f"{ACTOR}.loss_agg_mode", "critic.loss_agg_mode")
    d.fill("critic.loss_agg_mode", "token-mean", f"{ACTOR}.loss_agg_mode")
    d.fill(f"{ACTOR}.loss_agg_mode", loss.mean, key)


def _resolve_critic(d: Deriver) -> None:
    for name in (
        "ppo_mini_batch_size",
        "ppo_max_token_len_per_gpu",
        "ppo_epochs",
        "shuffle",
        "loss_scale_factor",
    ):
        d.copy(f"{ACTOR}.{name}", f"critic.{name}")
    estimator = ESTIMATORS.find(d["algorithm.adv_estimator"])
    if estimator is not None:  # else it is known when the run begins: plan.py
        d.fill("critic.enable", estimator.needs_critic, "algorithm.adv_estimator")


def _resolve_micro_batches(d: Deriver) -> None:
    d.copy(
        f"{ACTOR}.ppo_max_token_len_per_gpu",
        f"{REF}.log_prob_max_token_len_per_gpu",
        f"{ROLLOUT}.log_prob_max_token_len_per_gpu",
    )
    d.copy("critic.ppo_max_token_len_per_gpu", "critic.forward_max_token_len_per_gpu")
    for section, prefix in ((ACTOR, "ppo"), ("critic", "ppo"), (REF, "log_prob"), (ROLLOUT, "log_prob")):
        dynamic = f"{section}.{'log_prob_' if prefix == 'log_prob' else ''}use_dynamic_bsz"
        rows = f"{section}.{prefix}_micro_batch_size_per_gpu"
        d.micro_batches(rows, dynamic)
    forward = "critic.forward_micro_batch_size_per_gpu"
    if d["critic.use_dynamic_bsz"] and d[forward] is not None:
        put(d.tree, forward, None)
        d.derived[forward] = "critic.use_dynamic_bsz"
    d.copy("critic.ppo_micro_batch_size_per_gpu", forward)


def _resolve_kl(d: Deriver, is_set: IsSet) -> None:
    coef = "algorithm.kl_ctrl.kl_coef"
    is_on = d[coef] > 0 and (is_set(coef) or ESTIMATORS.assume(d["algorithm.adv_estimator"]).kl_by_default)
    d.fill("algorithm.use_kl_in_reward", is_on, coef if is_set(coef) else "algorithm.adv_estimator")


def _resolve_reward(d: Deriver) -> None:
    model = "reward.reward_model"
    d.copy(f"{MODEL}.hub", f"{model}.hub")
    d.copy(f"{ACTOR}.fsdp_config.dtype", f"{model}.dtype")
    if d[f"{model}.enable"] and not d["reward.functions"]:
        put(d.tree, "reward.functions", {REWARD_MODEL: 1.0})
        d.derived["reward.functions"] = f"{model}.enable"
    d.fill(f"{model}.enable", REWARD_MODEL in d["reward.functions"], "reward.functions")


def _resolve_trainer(d: Deriver) -> None:
    folder = f"checkpoints/{d['trainer.project_name']}/{d['trainer.experiment_name']}"
    d.fill("trainer.default_local_dir", folder, "trainer.experiment_name")


def resolve_sft(tree: dict[str, Any], is_set: IsSet) -> dict[str, str]:
    """Fill in the SFT job's tree."""
    d = Deriver(tree)
    _resolve_hub(d, "model.hub", is_set)
    d.fill("model.tokenizer_path", d["model.path"] or None, "model.path")
    d.fill("data.max_token_len_per_gpu", max(TOKEN_BUDGET, d["data.max_length"]), "data.max_length")
    _resolve_trainer(d)
    return d.derived
