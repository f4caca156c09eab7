"""What each job calls the settings that errors and notes of lower layers name (see `errors.setting`): its keys.

Needs no package but the standard library's: `steepest doctor` names settings on a machine where others do not load.
A name is a setting, or `owner.setting` where several parts of a run have a setting of that name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from steepest.config.schema import Config, SFTConfig


def model_keys(section: str) -> dict[str, str]:
    """The settings of the model in a section of either job: `path` -> `critic.model.path`.

    Raises KeyError for a section that no job has.
    """
    found: list[Any] = [Config(), SFTConfig()]
    for name in section.split("."):
        found = [getattr(part, name) for part in found if hasattr(part, name)]
    if not found:
        raise KeyError(f"no job has a section {section}")
    return {item.name: f"{section}.{item.name}" for item in dataclasses.fields(found[0])}


def _by_last_part(*keys: str, owner: str = "") -> dict[str, str]:
    """Setting -> key for keys whose last part is the name of the setting."""
    prefix = f"{owner}." if owner else ""
    return {f"{prefix}{key.rpartition('.')[2]}": key for key in keys}


def _passes(owner: str, section: str, prefix: str) -> dict[str, str]:
    """The size of a micro-batch, for one kind of pass."""
    return {
        f"{owner}.micro_batch_rows": f"{section}.{prefix}micro_batch_size_per_gpu",
        f"{owner}.micro_batch_tokens": f"{section}.{prefix}max_token_len_per_gpu",
    }


_OF_BOTH_JOBS = _by_last_part(
    "data.train_files",
    "data.val_files",
    "data.train_max_samples",
    "data.val_max_samples",
    "data.train_batch_size",
    "data.prompt_key",
    "data.ignored_columns",
    "data.truncation",
    "data.apply_chat_template_kwargs",
    "trainer.device",
    "trainer.logger",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "trainer.resume_mode",
)

_DATA_HUB = {"data_hub": "data.hub"}

PPO_KEYS: Mapping[str, str] = {
    **model_keys("actor_rollout_ref.model"),
    **_OF_BOTH_JOBS,
    **_DATA_HUB,
    **_by_last_part(
        "data.val_batch_size",
        "data.max_prompt_length",
        "data.max_response_length",
        "data.filter_overlong_prompts",
        "data.reward_fn_key",
        "data.answer_key",
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref.rollout.temperature",
        "actor_rollout_ref.rollout.max_num_seqs",
        "actor_rollout_ref.rollout.max_model_len",
        "actor_rollout_ref.rollout.gpu_memory_utilization",
        "actor_rollout_ref.rollout.free_cache_engine",
        "actor_rollout_ref.actor.clip_ratio_c",
        "actor_rollout_ref.actor.kl_loss_type",
        "actor_rollout_ref.actor.policy_loss.loss_mode",
        "algorithm.adv_estimator",
        "algorithm.kl_penalty",
        "algorithm.rollout_correction.rollout_is",
        "algorithm.rollout_correction.rollout_rs",
        "algorithm.pf_ppo.reweight_method",
        "critic.share_base",
    ),
    "max_length": "data.max_response_length or data.max_prompt_length",
    "max_ckpt_to_keep": "trainer.max_actor_ckpt_to_keep",
    "rollout_engine": "actor_rollout_ref.rollout.name",
    "reward_functions": "reward.functions",
    "custom_reward_path": "custom_reward_function.path",
    "custom_reward_name": "custom_reward_function.name",
    "custom_reward_kwargs": "custom_reward_function.reward_kwargs",
    **_by_last_part("actor_rollout_ref.rollout.dtype", owner="rollout"),
    **_by_last_part(
        "actor_rollout_ref.actor.optim.lr", "actor_rollout_ref.model.enable_gradient_checkpointing", owner="actor"
    ),
    **_by_last_part("critic.model.enable_gradient_checkpointing", owner="critic"),
    **_by_last_part(
        "algorithm.kl_ctrl.type", "algorithm.kl_ctrl.target_kl", "algorithm.kl_ctrl.horizon", owner="kl_ctrl"
    ),
    **_by_last_part("reward.num_workers", "reward.timeout_s", "reward.max_error_rate", "reward.mode", owner="reward"),
    **_by_last_part(
        "reward.judge.prompt",
        "reward.judge.cache_file",
        "reward.judge.base_url",
        "reward.judge.model",
        "reward.judge.num_concurrent",
        "reward.judge.timeout_s",
        "reward.judge.max_retries",
        owner="judge",
    ),
    **_passes("actor.update", "actor_rollout_ref.actor", "ppo_"),
    **_passes("actor.log_probs", "actor_rollout_ref.rollout", "log_prob_"),
    **_passes("reference.log_probs", "actor_rollout_ref.ref", "log_prob_"),
    **_passes("critic.update", "critic", "ppo_"),
    **_passes("critic.forward", "critic", "forward_"),
}
"""Setting -> key of the PPO job. Settings of a model are those of the actor's; see `model_keys` for another's."""

SFT_KEYS: Mapping[str, str] = {
    **model_keys("model"),
    **_OF_BOTH_JOBS,
    **_DATA_HUB,
    **_by_last_part("data.max_length", "data.messages_key", "data.response_key", "trainer.max_ckpt_to_keep"),
    **_passes("model.update", "data", ""),
}
"""Setting -> key of the SFT job."""
