"""What verl's example commands get: each setting is accepted, warned about, or refused with a reason and a remedy."""

from __future__ import annotations

import pytest

from steepest.config import tree
from steepest.config.load import PPO_JOB, SFT_JOB, Job, load_config, load_sft_config
from steepest.errors import ConfigError
from tests.config.verl_commands import ARR, PPO_COMMANDS, SFT_COMMANDS, keys, words
from tests.support.commands import REQUIRED

OFFLOAD = f"{ARR}.ref.fsdp_config.param_offload"
BALANCE = "trainer.balance_batch"
STAY = "this version runs in one process, and models stay where they compute"
NO_REFERENCE = f"{ARR}.ref.log_prob_use_dynamic_bsz {ARR}.ref.log_prob_max_token_len_per_gpu"
KL_LOSS_OFF = f"{ARR}.actor.kl_loss_coef {ARR}.actor.kl_loss_type"
WARNED: dict[str, str] = {
    "tuning/0.5b/qwen2-0.5b_grpo-lora_1_h100_fsdp_vllm": (
        f"algorithm.kl_ctrl.kl_coef {ARR}.model.use_shm {ARR}.actor.fsdp_config.param_offload "
        f"{ARR}.actor.fsdp_config.optimizer_offload {OFFLOAD}"
    ),
    "ppo_trainer/run_qwen2.5-0.5b": "",
    "grpo_trainer/run_qwen2_5-3b_gsm8k_grpo_lora": f"{ARR}.model.use_shm {OFFLOAD}",
    "grpo_trainer/run_qwen2-7b (2025-02)": OFFLOAD,
    "ppo_trainer/run_deepseek7b_llm": "critic.model.use_remove_padding",
    "ppo_trainer/run_gemma (2025-02)": OFFLOAD,
    "ppo_trainer/run_qwen2-7b_rm (2025-02)": (
        f"{OFFLOAD} reward_model.model.use_rmpad reward_model.model.fsdp_config.param_offload"
    ),
    "ppo_trainer/run_qwen3_8b_fsdp": f"{OFFLOAD} {BALANCE}",
    "rloo_trainer/run_qwen3_8b_fsdp": f"{OFFLOAD} {BALANCE}",
    "reinforce_plus_plus_trainer/run_qwen3_8b_fsdp": f"{OFFLOAD} {BALANCE}",
    "tuning/lora/run_qwen3_8b_fsdp": f"{OFFLOAD} {BALANCE}",
    "gmpo_trainer/run_qwen3_8b_fsdp": f"{OFFLOAD} {BALANCE}",
    "gdpo_trainer/run_qwen3_8b_fsdp": f"{NO_REFERENCE} algorithm.kl_ctrl.kl_coef {KL_LOSS_OFF} {OFFLOAD} {BALANCE}",
    "gpg_trainer/run_qwen3_8b_fsdp": f"{NO_REFERENCE} {ARR}.actor.policy_loss.loss_mode {OFFLOAD} {BALANCE}",
    "remax_trainer/run_qwen2.5-3b_seq_balance": OFFLOAD,
    "sft/gsm8k/run_qwen3_8b_fsdp": "",
}
"""Command -> keys of its warnings, of those that run."""
REFUSED: dict[str, str] = {
    "tuning/1.5b/qwen2.5math-1.5b_grpo_1_h100_fsdp_vllm": f"{ARR}.actor.loss_agg_mode",
    "ppo_trainer/run_ppo": "reward_model.reward_manager",
    "cispo_trainer/run_qwen3_8b_fsdp": f"{ARR}.actor.clip_ratio_low",
    "grpo_trainer/run_qwen3_8b_fsdp (gb200)": f"{ARR}.actor.fsdp_config.model_dtype",
    "grpo_trainer/run_qwen3_8b_fsdp (npu)": (
        f"{ARR}.actor.fsdp_config.ulysses_sequence_parallel_size {ARR}.ref.fsdp_config.ulysses_sequence_parallel_size"
    ),
    "grpo_trainer/run_qwen3-1.7b": f"{ARR}.actor.ppo_mini_batch_size",
    "ppo_trainer/run_qwen3-0.6b_ds_gsm8k": (
        f"actor@{ARR}.actor critic {ARR}.actor.strategy {ARR}.actor.deepspeed.zero_stage "
        f"critic.deepspeed_config.zero_stage {ARR}.actor.deepspeed.offload critic.deepspeed_config.offload"
    ),
    "arena_grpo/run_qwen2_5_0_5b_fsdp": (
        f"{ARR}.rollout.agent.default_agent_loop {ARR}.rollout.agent.agent_loop_config_path"
    ),
    "sft/gsm8k/run_qwen_05_peft": "data.prompt_dict_keys data.response_dict_keys",
}
"""Command -> keys that it is refused for."""
COMMANDS = {name: (load_config, words(text)) for name, text in PPO_COMMANDS.items()} | {
    name: (load_sft_config, words(text)) for name, text in SFT_COMMANDS.items()
}


def test_there_are_twenty_commands_and_each_has_its_answer() -> None:
    assert len(COMMANDS) >= 20
    assert sorted(COMMANDS) == sorted([*WARNED, *REFUSED])


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_gets_its_answer(name: str) -> None:
    load, command = COMMANDS[name]
    if name in WARNED:
        found = [_keys_of(text) for text in load(command).provenance.warnings]
        assert " ".join(key for keys in found for key in keys).split() == WARNED[name].split()
        return
    with pytest.raises(ConfigError) as caught:
        load(command)
    assert [_keys_of(text)[0] for text in caught.value.problems] == REFUSED[name].split()


def _keys_of(text: str) -> list[str]:
    """The keys that a problem or a warning begins with."""
    begin = text.partition(" ha")[0] if " no effect: " in text else text.partition(": ")[0].partition("=")[0]
    return begin.split(", ")


@pytest.mark.parametrize("job", [PPO_JOB, SFT_JOB])
def test_every_key_of_the_commands_is_ours_or_answered_by_name(job: Job) -> None:
    commands = PPO_COMMANDS if job is PPO_JOB else SFT_COMMANDS
    book, strangers = job.book, []
    for key in {key for text in commands.values() for key in keys(text)}:
        if key in tree.sections(job.schema):  # critic=ds_critic: the loader answers
            continue
        answer = book.problem_of(key, "x")
        if book.leaf_of(book.aliases.get(key, key))[0] is None and answer is not None and "no such key" in answer:
            strangers.append(key)
    assert strangers == []


@pytest.mark.parametrize(
    ("word", "warning"),
    [
        (f"{ARR}.ref.fsdp_config.param_offload=True", STAY),
        ("critic.model.fsdp_config.optimizer_offload=True", STAY),
        ("critic.model.fsdp_config.fsdp_size=8", "this version runs in one process, and nothing is sharded"),
        ("ray_init.num_cpus=16", "this version runs in one process, without Ray"),
        ("ray_kwargs.ray_init.num_cpus=16", "this version runs in one process, without Ray"),
        (f"{ARR}.model.use_liger=True", "Liger kernels are not used"),
        (f"{ARR}.model.use_rmpad=False", "sequences are always packed without padding"),
    ],
)  # fmt: skip
def test_a_key_about_place_or_speed_is_a_warning(word: str, warning: str) -> None:
    key = word.partition("=")[0]
    assert load_config([*REQUIRED, word]).provenance.warnings == (f"{key} has no effect: {warning}.",)


def test_keys_without_effect_for_one_reason_share_a_warning_and_the_last_value_counts() -> None:
    words = [f"{ARR}.ref.fsdp_config.param_offload=True", f"{ARR}.actor.fsdp_config.param_offload=True"]
    assert load_config([*REQUIRED, *words]).provenance.warnings == (
        f"{ARR}.ref.fsdp_config.param_offload, {ARR}.actor.fsdp_config.param_offload have no effect: "
        "this version runs in one process, and models stay where they compute.",
    )
    later = [f"{ARR}.ref.fsdp_config.param_offload=False", f"{ARR}.actor.fsdp_config.param_offload=False"]
    assert load_config([*REQUIRED, *words, *later]).provenance.warnings == ()


def test_the_older_form_of_a_micro_batch_is_its_second_name() -> None:
    config = load_config(
        [*REQUIRED, f"{ARR}.actor.ppo_micro_batch_size=6", f"{ARR}.rollout.log_prob_micro_batch_size=7"]
    )
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (actor.ppo_micro_batch_size_per_gpu, rollout.log_prob_micro_batch_size_per_gpu) == (6, 7)
    both = [f"{ARR}.actor.ppo_micro_batch_size_per_gpu=6", f"{ARR}.actor.ppo_micro_batch_size=null"]
    assert load_config([*REQUIRED, *both]).actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 6


def test_a_coefficient_of_the_kl_switches_nothing_on_where_the_estimator_cannot_see_it() -> None:
    """verl's command for gdpo gives the coefficient and leaves the KL off."""
    config = load_config([*REQUIRED, "algorithm.adv_estimator=gdpo", f"{ARR}.rollout.n=4",
                          "algorithm.gdpo_reward_keys=[a,b]", "algorithm.kl_ctrl.kl_coef=0.01"])  # fmt: skip
    assert config.algorithm.use_kl_in_reward is False
    assert config.provenance.warnings == (
        "algorithm.kl_ctrl.kl_coef has no effect: algorithm.use_kl_in_reward is off.",
    )
