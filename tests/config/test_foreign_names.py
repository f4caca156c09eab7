"""Settings of TRL, transformers, OpenRLHF and Unsloth are answered with the key that they are called here."""

from __future__ import annotations

import pytest

from steepest.config import verl_keys
from steepest.config.foreign_names import FOREIGN
from steepest.config.load import PPO_JOB, SFT_JOB, load_config, load_sft_config
from steepest.errors import ConfigError
from tests.support.commands import REQUIRED

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"
NEEDED = {
    "trl": "beta cliprange epsilon epsilon_high gradient_accumulation_steps gradient_checkpointing kl_coeff lam lambd "
    "learning_rate logging_steps loss_type lr_scheduler_type mask_truncated_completions max_completion_length "
    "max_grad_norm max_prompt_length max_steps num_generations num_iterations num_ppo_epochs num_train_epochs "
    "output_dir per_device_train_batch_size report_to reward_funcs reward_weights run_name save_steps scale_rewards "
    "seed sync_ref_model temperature use_vllm vllm_gpu_memory_utilization warmup_ratio warmup_steps vllm_mode",
    "transformers": "adam_beta1 adam_beta2 adam_epsilon bf16 fp16 dataloader_num_workers deepspeed eval_steps "
    "eval_strategy fsdp model_name_or_path optim_args per_device_eval_batch_size push_to_hub resume_from_checkpoint "
    "save_total_limit torch_compile torch_dtype use_cpu weight_decay",
    "openrlhf": "actor_learning_rate advantage_estimator ckpt_path colocate_all_models critic_learning_rate "
    "critic_pretrain eps_clip flash_attn freezing_actor_steps generate_max_len init_kl_coef input_key kl_target "
    "lora_alpha lora_rank max_epochs max_len max_samples micro_rollout_batch_size micro_train_batch_size "
    "n_samples_per_prompt num_episodes packing_samples pretrain prompt_data prompt_max_len reward_pretrain "
    "rollout_batch_size save_path use_wandb value_clip vllm_num_engines zero_stage",
    "unsloth": "fast_inference load_in_4bit load_in_8bit lora_dropout lora_r max_seq_length model_name r random_state "
    "target_modules use_gradient_checkpointing use_rslora quantization_config load_in_fp8 bnb_4bit_compute_dtype",
}
"""What people bring along, by library; those that Steepest calls the same are keys."""


def test_each_answer_is_a_key_that_exists_or_a_sentence() -> None:
    assert len(FOREIGN) >= 80
    for name, entry in FOREIGN.items():
        for text, book in ((entry.ppo, PPO_JOB.book), (entry.sft, SFT_JOB.book)):
            assert text == "" or text in book.leaves or (" " in text and text.endswith(".")), (name, text)
        assert entry.ppo or entry.sft, name


def test_two_names_mean_another_thing_here_and_are_answered_by_where_they_stand() -> None:
    ours = {key.rpartition(".")[2] for book in (PPO_JOB.book, SFT_JOB.book) for key in book.leaves}
    assert ours & set(FOREIGN) == {"loss_type", "max_tokens"}
    assert not set(FOREIGN) & {*verl_keys.REFUSED, *verl_keys.NO_EFFECT}
    suggest = PPO_JOB.book.suggest
    assert suggest("loss_type") == f"{ACTOR}.loss_agg_mode"
    assert suggest("algorithm.rollout_corection.loss_type") == "algorithm.rollout_correction.loss_type"
    assert (
        suggest("max_tokens") == "data.max_response_length" and suggest("judge.max_tokens") == "reward.judge.max_tokens"
    )


@pytest.mark.parametrize("library", NEEDED)
def test_what_people_bring_along_is_answered(library: str) -> None:
    ours = {key.rpartition(".")[2] for book in (PPO_JOB.book, SFT_JOB.book) for key in book.leaves}
    assert [name for name in NEEDED[library].split() if name not in FOREIGN and name not in ours] == []


def problem(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, *words])
    (text,) = caught.value.problems
    return text


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("optim.learning_rate=1e-6", f"optim.learning_rate: no such key. Here it is {ACTOR}.optim.lr."),
        ("critic.optim.learning_rate=1e-6", "critic.optim.learning_rate: no such key. Here it is critic.optim.lr."),
        ("critic.gradient_checkpointing=True",
         "critic.gradient_checkpointing: no such key. Here it is critic.model.enable_gradient_checkpointing."),
        ("training_args.num_generations=8", f"training_args.num_generations: no such key. Here it is {ROLLOUT}.n."),
        ("epsilon=0.2", f"epsilon: no such key. Here it is {ACTOR}.clip_ratio."),
        ("bf16=True", f"bf16: no such key. Here it is {ACTOR}.fsdp_config.dtype (bfloat16 or float32)."),
        ("vf_coef=0.1", "vf_coef: no such key. The critic is a model of its own with its own optimizer: "
         "critic.optim.lr."),
        ("lora_rank=8", f"lora_rank: no such key. Did you mean {MODEL}.lora_rank?"),
        ("--learning_rate=1e-6", f"learning_rate: no such key. Here it is {ACTOR}.optim.lr. Settings are written "
         "key=value, without dashes."),
    ],
)  # fmt: skip
def test_answers(word: str, text: str) -> None:
    assert problem(word) == text


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--label_key", "answer"), "label_key: no such key. Here it is data.answer_key."),
        (("--gamma", "1"), "gamma: no such key. Did you mean algorithm.gamma?"),
        (("--apply_chat_template",), "apply_chat_template: no such key. Prompts always go through the chat template of "
         "the model; leave it out."),
    ],
)  # fmt: skip
def test_options_of_openrlhf(words: tuple[str, ...], text: str) -> None:
    assert problem(*words) == f"{text} Settings are written key=value, without dashes."


def test_the_value_of_an_option_of_another_library_is_no_second_problem() -> None:
    assert problem("--max-epochs", "3") == (
        "max_epochs: no such key. Here it is trainer.total_epochs. Settings are written key=value, without dashes."
    )


def test_each_job_answers_with_its_own_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        load_sft_config(["data.train_files=a", "model.path=m", "learning_rate=1", "max_seq_length=9", "beta=1"])
    assert caught.value.problems == [
        "learning_rate: no such key. Here it is optim.lr.",
        "max_seq_length: no such key. Here it is data.max_length (and data.max_response_length).",
        "beta: no such key. --help-all lists all keys.",
    ]


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit", "quantization_config", "bnb_4bit_quant_type"])
def test_quantised_bases_are_answered_with_the_reason_and_what_to_take(name: str) -> None:
    text = (
        "no such key. Weights are not quantised: a rollout engine would have to round a merged adapter again, and "
        "would sample from another policy than the one that is trained. Use LoRA (lora_rank=16 in that "
        "section): a frozen matrix takes 2 bytes a weight where its file is in bfloat16. docs/lora.md has a table of "
        "the memory."
    )
    assert problem(f"{MODEL}.{name}=True") == f"{MODEL}.{name}: {text}"
    with pytest.raises(ConfigError) as caught:
        load_sft_config(["data.train_files=x", "model.path=y", f"model.{name}=True"])
    assert caught.value.problems == [f"model.{name}: {text}"]
