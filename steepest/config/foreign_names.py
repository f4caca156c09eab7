"""Settings of other libraries (TRL, transformers, OpenRLHF, Unsloth) and what they are called here.

A key that Steepest does not have is looked up by its last part, before the most similar key is guessed: `learning_rate`
and `min_lr_ratio` are alike in letters alone.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"


@dataclass(frozen=True)
class Foreign:
    """What a foreign setting corresponds to in each job: a key, a sentence, or nothing (empty)."""

    ppo: str
    sft: str
    note: str = ""
    """What differs, where the answer is a key."""

    def key(self, known: Container[str]) -> str | None:
        """The key among those of a job."""
        return next((text for text in (self.ppo, self.sft) if text in known), None)

    def sentence(self) -> str | None:
        """Why no key corresponds."""
        return next((text for text in (self.ppo, self.sft) if " " in text), None)


_ONE_PROCESS = "This version runs in one process, and nothing is sharded; leave it out."
_FLASH = "Attention is chosen by the device; override_config.attn_implementation of the model asks for another."
_PADDING = "Sequences are packed without padding; leave it out."
_COLUMNS = "Rows carry all their columns to the reward; leave it out."
_QUANTISED = (
    "Weights are not quantised: a rollout engine would have to round a merged adapter again, and would sample from "
    "another policy than the one that is trained. Use LoRA (lora_rank=16 in that section): a frozen matrix takes "
    "2 bytes a weight where its file is in bfloat16. docs/lora.md has a table of the memory."
)
_PER_STEP = "There is no accumulation to set: a mini-batch is cut into micro-batches, and each update sees it whole."
_LOGGED = "Metrics of each step are in metrics.jsonl; leave it out."

_TABLE: list[tuple[str, str, str, str]] = [
    # model
    ("model_name_or_path model_name pretrain pretrained_model_name_or_path base_model actor_model policy_model",
     f"{MODEL}.path", "model.path", ""),
    ("sft_model_path", f"{MODEL}.path", "model.path", "the policy's start"),
    ("critic_pretrain value_model_path value_model", "critic.model.path", "", ""),
    ("reward_pretrain reward_model_path remote_rm_url", "reward.reward_model.model_path", "", ""),
    ("model_revision", f"{MODEL}.revision", "model.revision", ""),
    ("tokenizer_name_or_path tokenizer_name", f"{MODEL}.tokenizer_path", "model.tokenizer_path", ""),
    ("model_init_kwargs config_overrides", f"{MODEL}.override_config", "model.override_config", ""),
    ("chat_template_path chat_template input_template", f"{MODEL}.custom_chat_template",
     "model.custom_chat_template", "the Jinja text, not its file"),
    ("chat_template_kwargs", "data.apply_chat_template_kwargs", "data.apply_chat_template_kwargs", ""),
    ("attn_implementation flash_attn use_flash_attention_2", _FLASH, "", ""),
    ("bf16 fp16 torch_dtype mixed_precision half_precision", f"{ACTOR}.fsdp_config.dtype", "engine.dtype",
     "bfloat16 or float32"),
    # adapter
    ("lora_r r", f"{MODEL}.lora_rank", "model.lora_rank", ""),
    ("use_peft peft_config use_lora", f"{MODEL}.lora_rank", "model.lora_rank", "above 0 trains an adapter"),
    ("lora_target_modules", f"{MODEL}.target_modules", "model.target_modules", ""),
    ("lora_dropout", "An adapter has no dropout: log-probs of two passes would differ. Leave it out.", "", ""),
    ("use_rslora use_dora", "Adapters are plain LoRA; leave it out.", "", ""),
    ("load_in_4bit load_in_8bit load_in_fp8 quantization_config bnb_4bit_quant_type bnb_4bit_compute_dtype "
     "bnb_4bit_use_double_quant bnb_4bit_quant_storage",
     _QUANTISED, "", ""),
    ("gradient_checkpointing use_gradient_checkpointing", f"{MODEL}.enable_gradient_checkpointing",
     "model.enable_gradient_checkpointing", ""),
    # optimizer
    ("learning_rate actor_learning_rate", f"{ACTOR}.optim.lr", "optim.lr", ""),
    ("critic_learning_rate value_learning_rate", "critic.optim.lr", "", ""),
    ("warmup_ratio lr_warmup_ratio", f"{ACTOR}.optim.lr_warmup_steps_ratio", "optim.lr_warmup_steps_ratio", ""),
    ("warmup_steps", f"{ACTOR}.optim.lr_warmup_steps", "optim.lr_warmup_steps", ""),
    ("lr_scheduler lr_schedule", f"{ACTOR}.optim.lr_scheduler_type", "optim.lr_scheduler_type", ""),
    ("max_grad_norm max_norm gradient_clipping", f"{ACTOR}.optim.clip_grad", "optim.clip_grad", ""),
    ("adam_beta1 adam_beta2 adam_betas", f"{ACTOR}.optim.betas", "optim.betas", "[0.9,0.999]"),
    ("l2", f"{ACTOR}.optim.weight_decay", "optim.weight_decay", ""),
    ("optim optim_args adam_offload", "The optimizer is torch's AdamW, on the device; leave it out.", "", ""),
    ("adam_epsilon", "AdamW's epsilon is torch's 1e-8; leave it out.", "", ""),
    # batches and lengths
    ("rollout_batch_size generation_batch_size", "data.train_batch_size", "", "prompts a step"),
    ("per_device_train_batch_size micro_train_batch_size mini_batch_size", f"{ACTOR}.ppo_micro_batch_size_per_gpu",
     "data.micro_batch_size_per_gpu", "sequences of one pass"),
    ("per_device_eval_batch_size eval_batch_size", "data.val_batch_size", "", ""),
    ("micro_rollout_batch_size local_rollout_forward_batch_size",
     f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", "", ""),
    ("gradient_accumulation_steps steps_per_generation num_mini_batches", f"{ACTOR}.ppo_mini_batch_size", _PER_STEP,
     "prompts of an update"),
    ("max_tokens_per_gpu train_max_tokens_per_gpu", f"{ACTOR}.ppo_max_token_len_per_gpu", "data.max_token_len_per_gpu",
     ""),
    ("prompt_max_len", "data.max_prompt_length", "", ""),
    ("max_completion_length max_new_tokens generate_max_len response_length max_tokens", "data.max_response_length",
     "", ""),
    ("max_seq_length max_len max_seq_len cutoff_len", "data.max_prompt_length", "data.max_length",
     "and data.max_response_length"),
    ("dataloader_num_workers dataset_num_proc preprocessing_num_workers",
     "Rows are read once, before the first step; leave it out.", "", ""),
    ("packing packing_samples padding_free pad_to_multiple_of", _PADDING, "", ""),
    # data
    ("dataset dataset_name prompt_data dataset_path train_dataset", "data.train_files", "data.train_files", ""),
    ("eval_dataset", "data.val_files", "data.val_files", ""),
    ("input_key dataset_text_field", "data.prompt_key", "data.prompt_key", ""),
    ("label_key answer_column", "data.answer_key", "data.response_key", ""),
    ("apply_chat_template", "Prompts always go through the chat template of the model; leave it out.", "", ""),
    ("output_key", "data.prompt_key", "data.response_key", ""),
    ("max_samples max_train_samples", "data.train_max_samples", "data.train_max_samples", ""),
    ("remove_unused_columns", _COLUMNS, "", ""),
    ("shuffle_dataset", "data.shuffle", "data.shuffle", ""),
    # generation
    ("num_generations n_samples_per_prompt num_return_sequences rloo_k", f"{ROLLOUT}.n", "", ""),
    ("num_generations_eval n_samples_per_eval", f"{ROLLOUT}.val_kwargs.n", "", ""),
    ("use_vllm", f"{ROLLOUT}.name", "", "vllm"),
    ("vllm_gpu_memory_utilization vllm_gpu_memory_util", f"{ROLLOUT}.gpu_memory_utilization", "", ""),
    ("vllm_tensor_parallel_size", f"{ROLLOUT}.tensor_model_parallel_size", "", ""),
    ("vllm_enable_sleep enable_sleep_mode", f"{ROLLOUT}.free_cache_engine", "", ""),
    ("vllm_mode vllm_num_engines vllm_server_host vllm_sync_backend fast_inference",
     f"The engine runs in the trainer's process: {ROLLOUT}.name is builtin, vllm or hf.", "", ""),
    ("enforce_eager_vllm", f"{ROLLOUT}.enforce_eager", "", ""),
    ("min_p repetition_penalty",
     "Training samples from the policy's own distribution; temperature, top_p and top_k are all there is.", "", ""),
    # algorithm
    ("beta init_kl_coef kl_coef_init kl_coeff", f"{ACTOR}.kl_loss_coef", "",
     "in the loss, with use_kl_loss=True; in the reward it is algorithm.kl_ctrl.kl_coef"),
    ("kl_estimator", f"{ACTOR}.kl_loss_type", "", ""),
    ("kl_target", "algorithm.kl_ctrl.target_kl", "", ""),
    ("kl_horizon", "algorithm.kl_ctrl.horizon", "", ""),
    ("epsilon cliprange eps_clip clip_eps clip_range", f"{ACTOR}.clip_ratio", "", ""),
    ("epsilon_high", f"{ACTOR}.clip_ratio_high", "", ""),
    ("epsilon_low eps_clip_low_high", f"{ACTOR}.clip_ratio_low", "", ""),
    ("delta dual_clip", f"{ACTOR}.clip_ratio_c", "", ""),
    ("value_clip", "critic.cliprange_value", "", ""),
    ("vf_coef", "The critic is a model of its own with its own optimizer: critic.optim.lr.", "", ""),
    ("num_ppo_epochs num_iterations ppo_inner_epochs", f"{ACTOR}.ppo_epochs", "", ""),
    ("advantage_estimator estimator algo", "algorithm.adv_estimator", "", ""),
    ("lambd gae_lambda", "algorithm.lam", "", ""),
    ("discount", "algorithm.gamma", "", ""),
    ("scale_rewards", "algorithm.norm_adv_by_std_in_grpo", "", "true or false"),
    ("loss_type policy_loss_type", f"{ACTOR}.loss_agg_mode", "",
     "how tokens are averaged; policy_loss.loss_mode is the loss"),
    ("importance_sampling_level", f"{ACTOR}.policy_loss.loss_mode", "", "gspo for whole sequences"),
    ("mask_truncated_completions", "algorithm.mask_truncated", "", ""),
    ("dynamic_filtering", "algorithm.filter_groups.enable", "", ""),
    ("entropy_coef entropy_loss_coef ent_coef", f"{ACTOR}.entropy_coeff", "", ""),
    ("whiten_rewards normalize_reward", "Advantages are normalised by algorithm.adv_estimator; leave it out.", "", ""),
    ("sync_ref_model ref_model_mixup_alpha", "The reference is the model as it was at the start; leave it out.", "",
     ""),
    ("freezing_actor_steps", "trainer.critic_warmup", "", ""),
    # reward
    ("reward_funcs reward_func", "reward.functions", "", ""),
    ("reward_weights", "reward.functions", "", "a weight each: {gsm8k: 1.0}"),
    ("stop_token missing_eos_penalty", "A response ends at the model's end tokens; leave it out.", "", ""),
    # run
    ("num_train_epochs max_epochs num_episodes", "trainer.total_epochs", "trainer.total_epochs", ""),
    ("max_steps total_steps", "trainer.total_training_steps", "trainer.total_training_steps", ""),
    ("output_dir save_path ckpt_path checkpoint_dir", "trainer.default_local_dir", "trainer.default_local_dir", ""),
    ("save_steps save_interval checkpoint_freq", "trainer.save_freq", "trainer.save_freq", ""),
    ("eval_steps eval_freq eval_interval", "trainer.test_freq", "trainer.test_freq", ""),
    ("save_total_limit max_ckpt_num", "trainer.max_actor_ckpt_to_keep", "trainer.max_ckpt_to_keep", ""),
    ("save_strategy evaluation_strategy eval_strategy do_train do_eval",
     "trainer.save_freq and trainer.test_freq say when: a number of steps, or -1.", "", ""),
    ("logging_steps log_interval", "trainer.log_freq", "trainer.log_freq", "lines of the console"),
    ("report_to use_wandb use_tensorboard log_with", "trainer.logger", "trainer.logger", "[console,wandb]"),
    ("logging_dir", "trainer.default_local_dir", "trainer.default_local_dir", ""),
    ("run_name wandb_run_name exp_name", "trainer.experiment_name", "trainer.experiment_name", ""),
    ("wandb_project", "trainer.project_name", "trainer.project_name", ""),
    ("log_completions num_completions_to_print", "trainer.log_val_generations", "", ""),
    ("resume_from_checkpoint load_checkpoint", "trainer.resume_mode", "trainer.resume_mode", "auto is the default"),
    ("data_seed random_state random_seed", "data.seed", "data.seed", ""),
    ("use_cpu no_cuda", "trainer.device", "trainer.device", "cpu"),
    ("actor_num_gpus_per_node num_gpus num_processes", "trainer.n_gpus_per_node", "trainer.n_gpus_per_node", ""),
    ("actor_num_nodes num_machines", "trainer.nnodes", "trainer.nnodes", ""),
    ("deepspeed zero_stage ds_config fsdp fsdp_config ds3_gather_for_generation", _ONE_PROCESS, "", ""),
    ("ddp_find_unused_parameters local_rank colocate_all_models", _ONE_PROCESS, "", ""),
    ("torch_compile", "Nothing is compiled: docs/passes.md has the measurement.", "", ""),
    ("logging_first_step disable_tqdm logging_strategy", _LOGGED, "", ""),
    ("push_to_hub hub_model_id", "A run uploads nothing: steepest export writes a folder to upload.", "", ""),
]  # fmt: skip
FOREIGN: dict[str, Foreign] = {
    name: Foreign(ppo, sft, note) for names, ppo, sft, note in _TABLE for name in names.split()
}


def foreign(key: str) -> Foreign | None:
    """The entry of a key's last part: of `optim.learning_rate`, `--learning-rate`."""
    return FOREIGN.get(key.lstrip("-").rpartition(".")[2].replace("-", "_").lower())
