"""What verl's example scripts ask of its trainers: their settings, for one card (cards are 1).

`main_ppo` settings of scripts that lie in verl's folder examples/, of different ages. Names of users' files are short.
"""

from __future__ import annotations

from steepest.config.verl_keys import expand

DATA = "data.train_files=a.parquet data.val_files=b.parquet"
ARR = "actor_rollout_ref"
ONE_CARD = "trainer.n_gpus_per_node=1 trainer.nnodes=1"
KL_LOSS = f"{ARR}.actor.use_kl_loss=True {ARR}.actor.kl_loss_coef=0.001 {ARR}.actor.kl_loss_type=low_var_kl"
LENGTHS = "data.filter_overlong_prompts=True data.truncation=error"
NO_OFFLOAD = f"{ARR}.actor.fsdp_config.param_offload=False {ARR}.actor.fsdp_config.optimizer_offload=False"
VLLM = f"{ARR}.rollout.name=vllm {ARR}.rollout.tensor_model_parallel_size=1"
RUN = "trainer.project_name=p trainer.experiment_name=e"
LOG = f"trainer.logger=['console','wandb'] {RUN} {ONE_CARD}"
PRESENT = (
    f"{DATA} {LENGTHS} data.train_batch_size=1024 data.max_prompt_length=1024 data.max_response_length=2048 "
    f"{ARR}.model.path=Qwen/Qwen3-8B {ARR}.model.use_remove_padding=True "
    f"{ARR}.model.enable_gradient_checkpointing=True {ARR}.actor.optim.lr=1e-6 {ARR}.actor.ppo_mini_batch_size=256 "
    f"{ARR}.actor.use_dynamic_bsz=True {ARR}.actor.ppo_max_token_len_per_gpu=24576 {NO_OFFLOAD} {VLLM} "
    f"{ARR}.rollout.gpu_memory_utilization=0.6 {ARR}.rollout.n=5 {ARR}.rollout.log_prob_use_dynamic_bsz=True "
    f"{ARR}.rollout.log_prob_max_token_len_per_gpu=24576 {ARR}.ref.log_prob_use_dynamic_bsz=True "
    f"{ARR}.ref.log_prob_max_token_len_per_gpu=24576 {ARR}.ref.fsdp_config.param_offload=True "
    f"trainer.balance_batch=True trainer.critic_warmup=0 {LOG} trainer.save_freq=20 trainer.test_freq=5 "
    "trainer.total_epochs=15"
)
"""What the present scripts for an 8B model on FSDP have in common."""
OLD_MICRO = (
    f"{ARR}.actor.ppo_micro_batch_size=128 {ARR}.rollout.log_prob_micro_batch_size=128 "
    f"{ARR}.ref.log_prob_micro_batch_size=128"
)
OLD_OFFLOAD = (
    f"{ARR}.actor.fsdp_config.param_offload=False {ARR}.actor.fsdp_config.grad_offload=False "
    f"{ARR}.actor.fsdp_config.optimizer_offload=False {ARR}.ref.fsdp_config.param_offload=True"
)
OLD_CRITIC = (
    "critic.optim.lr=1e-5 critic.model.use_rmpad=True critic.model.path=m "
    "critic.model.enable_gradient_checkpointing=False critic.ppo_micro_batch_size=4 "
    "critic.model.fsdp_config.param_offload=False critic.model.fsdp_config.grad_offload=False "
    "critic.model.fsdp_config.optimizer_offload=False"
)

PPO_COMMANDS: dict[str, str] = {
    "tuning/0.5b/qwen2-0.5b_grpo-lora_1_h100_fsdp_vllm": (
        f"algorithm.adv_estimator=grpo {DATA} data.train_batch_size=116 data.val_batch_size=116 "
        f"data.max_prompt_length=512 data.max_response_length=1024 {LENGTHS} data.shuffle=False "
        f"{ARR}.model.path=Qwen/Qwen2.5-0.5B-Instruct {ARR}.model.use_shm=True "
        f"{ARR}.model.enable_gradient_checkpointing=True {ARR}.model.lora_rank=32 {ARR}.model.lora_alpha=32 "
        f"{ARR}.model.target_modules=all-linear {ARR}.actor.optim.lr=3e-5 {ARR}.model.use_remove_padding=True "
        f"{ARR}.actor.ppo_mini_batch_size=116 {ARR}.actor.ppo_micro_batch_size=116 {KL_LOSS} "
        f"{ARR}.actor.fsdp_config.fsdp_size=-1 {ARR}.actor.fsdp_config.param_offload=True "
        f"{ARR}.actor.fsdp_config.optimizer_offload=True {ARR}.rollout.log_prob_micro_batch_size=116 {VLLM} "
        f"{ARR}.rollout.gpu_memory_utilization=0.1 {ARR}.rollout.n=5 {ARR}.rollout.max_num_seqs=512 "
        f"{ARR}.rollout.max_model_len=1536 {ARR}.rollout.max_num_batched_tokens=1536 "
        f"{ARR}.rollout.enable_chunked_prefill=False {ARR}.rollout.load_format=safetensors "
        f"{ARR}.rollout.layered_summon=True {ARR}.ref.log_prob_micro_batch_size=116 "
        f"{ARR}.ref.fsdp_config.param_offload=True {ARR}.actor.ulysses_sequence_parallel_size=1 "
        f"{ARR}.actor.entropy_coeff=0.001 algorithm.kl_ctrl.kl_coef=0.001 algorithm.use_kl_in_reward=False "
        f"trainer.critic_warmup=0 {LOG} trainer.save_freq=20 trainer.test_freq=5 trainer.total_epochs=1"
    ),
    "tuning/1.5b/qwen2.5math-1.5b_grpo_1_h100_fsdp_vllm": (
        f"algorithm.adv_estimator=grpo {DATA} data.train_batch_size=256 data.max_prompt_length=1024 "
        f"data.max_response_length=3000 {LENGTHS} {ARR}.model.path=Qwen/Qwen2.5-Math-1.5B {ARR}.actor.optim.lr=1e-5 "
        f"{ARR}.actor.loss_agg_mode=seq-mean-token-sum-norm {ARR}.model.use_remove_padding=True "
        f"{ARR}.actor.ppo_mini_batch_size=256 {ARR}.actor.ppo_micro_batch_size_per_gpu=4 "
        f"{ARR}.actor.use_kl_loss=False {ARR}.actor.kl_loss_coef=0.001 {ARR}.actor.kl_loss_type=low_var_kl "
        f"{ARR}.actor.entropy_coeff=0 {ARR}.model.enable_gradient_checkpointing=True {NO_OFFLOAD} "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=4 {VLLM} {ARR}.rollout.gpu_memory_utilization=0.4 "
        f"{ARR}.rollout.n=8 {ARR}.ref.log_prob_micro_batch_size_per_gpu=4 {ARR}.ref.fsdp_config.param_offload=True "
        f"{ARR}.rollout.temperature=1.0 {ARR}.rollout.top_p=1.0 algorithm.use_kl_in_reward=False "
        f"algorithm.norm_adv_by_std_in_grpo=False trainer.critic_warmup=0 {LOG} trainer.log_val_generations=40 "
        "trainer.save_freq=20 trainer.test_freq=1 trainer.total_epochs=2"
    ),
    "ppo_trainer/run_qwen2.5-0.5b": (
        f"algorithm.adv_estimator=gae {DATA} data.train_batch_size=8 data.max_prompt_length=1024 "
        f"data.max_response_length=1024 {LENGTHS} {ARR}.model.path=m {ARR}.model.enable_gradient_checkpointing=False "
        f"{ARR}.actor.optim.lr=1e-6 {ARR}.model.use_remove_padding=True {ARR}.actor.ppo_mini_batch_size=8 "
        f"{ARR}.model.enable_gradient_checkpointing=True {NO_OFFLOAD} {ARR}.actor.use_kl_loss=False "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=16 {VLLM} {ARR}.rollout.gpu_memory_utilization=0.5 "
        "critic.optim.lr=1e-5 critic.model.use_remove_padding=True critic.model.path=m "
        "critic.model.enable_gradient_checkpointing=False critic.model.fsdp_config.param_offload=False "
        "critic.model.fsdp_config.optimizer_offload=False algorithm.use_kl_in_reward=False trainer.critic_warmup=0 "
        f"{LOG} trainer.save_freq=-1 trainer.test_freq=10 trainer.total_epochs=1"
    ),
    "grpo_trainer/run_qwen2_5-3b_gsm8k_grpo_lora": (
        f"algorithm.adv_estimator=grpo {DATA} data.train_batch_size=1024 data.max_prompt_length=512 "
        f"data.max_response_length=1024 {LENGTHS} data.prompt_key=messages data.shuffle=False {ARR}.model.path=m "
        f"{ARR}.model.use_shm=True {ARR}.model.lora_rank=64 {ARR}.model.lora_alpha=32 {ARR}.actor.optim.lr=3e-6 "
        f"{ARR}.model.use_remove_padding=True {ARR}.actor.ppo_mini_batch_size=256 "
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu=40 {KL_LOSS} {ARR}.actor.entropy_coeff=0 "
        f"{ARR}.model.enable_gradient_checkpointing=True {NO_OFFLOAD} "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=40 {VLLM} {ARR}.rollout.gpu_memory_utilization=0.6 "
        f"{ARR}.rollout.n=5 {ARR}.rollout.load_format=safetensors {ARR}.rollout.layered_summon=True "
        f"{ARR}.ref.log_prob_micro_batch_size_per_gpu=40 {ARR}.ref.fsdp_config.param_offload=True "
        f"algorithm.use_kl_in_reward=False trainer.critic_warmup=0 {LOG} trainer.save_freq=20 trainer.test_freq=5 "
        "trainer.total_epochs=15"
    ),
    "grpo_trainer/run_qwen2-7b (2025-02)": (
        f"{DATA} data.train_batch_size=1024 data.val_batch_size=1312 data.max_prompt_length=512 "
        f"data.max_response_length=512 {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.actor.ppo_mini_batch_size=256 {ARR}.actor.use_kl_loss=True "
        f"{ARR}.model.enable_gradient_checkpointing=True {OLD_OFFLOAD} {OLD_MICRO} {VLLM} "
        f"{ARR}.rollout.gpu_memory_utilization=0.6 {ARR}.rollout.n=5 algorithm.kl_ctrl.kl_coef=0.001 "
        f"trainer.critic_warmup=0 {LOG} trainer.save_freq=-1 trainer.total_epochs=15"
    ),
    "ppo_trainer/run_deepseek7b_llm": (
        f"algorithm.adv_estimator=gae {DATA} data.train_batch_size=1024 data.max_prompt_length=512 "
        f"data.max_response_length=512 {LENGTHS} {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.model.use_remove_padding=True {ARR}.actor.ppo_mini_batch_size=256 "
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu=16 {NO_OFFLOAD} {ARR}.actor.use_kl_loss=False "
        f"{ARR}.model.enable_gradient_checkpointing=True {ARR}.rollout.log_prob_micro_batch_size_per_gpu=32 {VLLM} "
        f"{ARR}.rollout.gpu_memory_utilization=0.4 critic.optim.lr=1e-5 critic.model.use_remove_padding=False "
        "critic.model.path=m critic.model.enable_gradient_checkpointing=True critic.ppo_micro_batch_size_per_gpu=32 "
        "critic.model.fsdp_config.param_offload=False critic.model.fsdp_config.optimizer_offload=False "
        f"algorithm.use_kl_in_reward=False trainer.critic_warmup=0 trainer.logger=['console'] {RUN} {ONE_CARD} "
        "trainer.total_training_steps=2 trainer.use_legacy_worker_impl=False trainer.total_epochs=15"
    ),
    "ppo_trainer/run_gemma (2025-02)": (
        f"{DATA} data.train_batch_size=512 data.val_batch_size=1312 data.max_prompt_length=1024 "
        f"data.max_response_length=512 {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 {ARR}.model.use_rmpad=True "
        f"{ARR}.actor.ppo_mini_batch_size=128 {OLD_OFFLOAD} {OLD_MICRO} {VLLM} "
        f"{ARR}.rollout.gpu_memory_utilization=0.4 {OLD_CRITIC} algorithm.kl_ctrl.kl_coef=0.001 "
        f"trainer.critic_warmup=0 {LOG} trainer.save_freq=-1 trainer.test_freq=10 trainer.total_epochs=15"
    ),
    "ppo_trainer/run_qwen2-7b_rm (2025-02)": (
        "data.train_files=['a.parquet','c.parquet'] data.val_files=['b.parquet','d.parquet'] "
        "data.train_batch_size=1024 data.val_batch_size=6312 data.max_prompt_length=1024 "
        f"data.max_response_length=512 data.return_raw_chat=True {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.model.use_rmpad=True {ARR}.actor.optim.lr_warmup_steps_ratio=0.1 {ARR}.actor.ppo_mini_batch_size=256 "
        f"{OLD_OFFLOAD} {OLD_MICRO} {VLLM} {ARR}.rollout.gpu_memory_utilization=0.6 {OLD_CRITIC} "
        "critic.optim.lr_warmup_steps_ratio=0.05 reward_model.enable=True reward_model.model.path=/ "
        "reward_model.model.use_rmpad=True reward_model.model.fsdp_config.param_offload=True "
        f"reward_model.micro_batch_size=16 algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0 {LOG} "
        "trainer.save_freq=-1 trainer.test_freq=5 trainer.total_epochs=15"
    ),
    "ppo_trainer/run_ppo": (
        f"{DATA} data.train_batch_size=256 data.val_batch_size=1024 data.max_prompt_length=512 "
        f"data.max_response_length=256 {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.actor.ppo_mini_batch_size=64 {ARR}.actor.ppo_micro_batch_size_per_gpu=4 "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=8 {ARR}.rollout.tensor_model_parallel_size=1 "
        f"{ARR}.rollout.gpu_memory_utilization=0.4 {ARR}.ref.log_prob_micro_batch_size_per_gpu=4 "
        "critic.optim.lr=1e-5 critic.model.path=m critic.ppo_micro_batch_size_per_gpu=4 "
        "algorithm.kl_ctrl.kl_coef=0.001 +trainer.val_before_train=False reward_model.reward_manager=generative "
        f"trainer.default_hdfs_dir=null {LOG} trainer.save_freq=10 trainer.test_freq=10 trainer.total_epochs=15"
    ),
    "ppo_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=gae {PRESENT} {ARR}.rollout.n=1 {ARR}.actor.entropy_coeff=0 critic.model.path=m "
        "critic.model.use_remove_padding=True critic.model.enable_gradient_checkpointing=True critic.optim.lr=1e-5 "
        "critic.use_dynamic_bsz=True critic.ppo_max_token_len_per_gpu=24576 critic.fsdp.param_offload=False "
        "critic.fsdp.optimizer_offload=False"
    ),
    "rloo_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=rloo algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl "
        f"algorithm.kl_ctrl.kl_coef=0.001 {PRESENT} {ARR}.actor.use_kl_loss=False {ARR}.actor.entropy_coeff=0"
    ),
    "reinforce_plus_plus_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=reinforce_plus_plus algorithm.use_kl_in_reward=True {PRESENT} "
        f"{ARR}.actor.ppo_mini_batch_size=1024 {ARR}.rollout.n=8 {ARR}.actor.optim.lr=3e-6 "
        f"{ARR}.actor.use_kl_loss=False"
    ),
    "tuning/lora/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False {PRESENT} data.train_batch_size=64 "
        f"{ARR}.model.lora_rank=64 {ARR}.model.lora_alpha=32 {ARR}.actor.optim.lr=3e-6 "
        f"{ARR}.actor.ppo_mini_batch_size=32 {KL_LOSS} {ARR}.rollout.load_format=safetensors "
        f"{ARR}.rollout.layered_summon=True trainer.val_before_train=False"
    ),
    "gmpo_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False {PRESENT} "
        f"{ARR}.actor.policy_loss.loss_mode=geo_mean {ARR}.actor.clip_ratio_low=0.4 {ARR}.actor.clip_ratio_high=0.4 "
        f"{KL_LOSS}"
    ),
    "cispo_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False {PRESENT} "
        f"{ARR}.actor.policy_loss.loss_mode=cispo {ARR}.actor.clip_ratio_low=10 {ARR}.actor.clip_ratio_high=0.2 "
        f"{KL_LOSS}"
    ),
    "gdpo_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=gdpo {PRESENT} +algorithm.gdpo_reward_keys=['accuracy_reward','format_reward'] "
        "algorithm.kl_ctrl.kl_coef=0.001 data.train_batch_size=128 data.max_prompt_length=2048 "
        f"{ARR}.actor.ppo_mini_batch_size=32 {ARR}.actor.use_kl_loss=False {ARR}.actor.kl_loss_coef=0.001 "
        f"{ARR}.actor.kl_loss_type=low_var_kl {ARR}.rollout.n=4 reward.custom_reward_function.path=rlla.py "
        "reward.custom_reward_function.name=compute_score reward.reward_manager.name=gdpo "
        "trainer.val_before_train=False"
    ),
    "gpg_trainer/run_qwen3_8b_fsdp": (
        f"algorithm.adv_estimator=gpg algorithm.use_kl_in_reward=False {PRESENT} "
        f"{ARR}.actor.policy_loss.loss_mode=gpg {ARR}.actor.use_kl_loss=False"
    ),
    "grpo_trainer/run_qwen3_8b_fsdp (gb200)": (
        f"algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False {PRESENT} {KL_LOSS} "
        f"{ARR}.rollout.enforce_eager=True {ARR}.rollout.free_cache_engine=True "
        f"{ARR}.actor.fsdp_config.model_dtype=bfloat16 +ray_kwargs.ray_init.num_gpus=1"
    ),
    "grpo_trainer/run_qwen3_8b_fsdp (npu)": (
        f"algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False {PRESENT} {KL_LOSS} data.train_batch_size=16 "
        f"{ARR}.actor.ppo_mini_batch_size=16 {ARR}.actor.fsdp_config.param_offload=True "
        f"{ARR}.actor.fsdp_config.optimizer_offload=True {ARR}.actor.use_torch_compile=False "
        f"{ARR}.actor.fsdp_config.ulysses_sequence_parallel_size=4 "
        f"{ARR}.ref.fsdp_config.ulysses_sequence_parallel_size=4 "
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu=1 {ARR}.rollout.log_prob_micro_batch_size_per_gpu=1 "
        f"{ARR}.rollout.checkpoint_engine.update_weights_bucket_megabytes=4096"
    ),
    "grpo_trainer/run_qwen3-1.7b": (
        f"algorithm.adv_estimator=grpo {DATA} data.train_batch_size=1024 data.max_prompt_length=512 "
        f"data.max_response_length=1024 {LENGTHS} {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.model.use_remove_padding=True {ARR}.model.use_liger=True {ARR}.model.use_fused_kernels=True "
        f"{ARR}.model.fused_kernel_options.impl_backend=triton {ARR}.actor.ppo_mini_batch_size=80 "
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu=10 {KL_LOSS} {ARR}.actor.entropy_coeff=0 "
        f"{ARR}.model.enable_gradient_checkpointing=True {NO_OFFLOAD} "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=20 {VLLM} {ARR}.rollout.gpu_memory_utilization=0.6 "
        f"{ARR}.rollout.n=3 {ARR}.ref.log_prob_micro_batch_size_per_gpu=20 {ARR}.ref.fsdp_config.param_offload=True "
        f"algorithm.use_kl_in_reward=False trainer.critic_warmup=0 {LOG} trainer.save_freq=-1 trainer.test_freq=5 "
        "trainer.total_epochs=15"
    ),
    "remax_trainer/run_qwen2.5-3b_seq_balance": (
        f"algorithm.adv_estimator=remax {DATA} data.train_batch_size=512 data.max_prompt_length=512 "
        f"data.max_response_length=1024 {LENGTHS} {ARR}.model.path=m {ARR}.actor.optim.lr=1e-6 "
        f"{ARR}.model.use_remove_padding=True {ARR}.actor.ppo_mini_batch_size=128 {ARR}.actor.use_dynamic_bsz=True "
        f"{ARR}.actor.ppo_max_token_len_per_gpu=30000 {ARR}.actor.use_kl_loss=False "
        f"{ARR}.model.enable_gradient_checkpointing=True {NO_OFFLOAD} {VLLM} "
        f"{ARR}.rollout.gpu_memory_utilization=0.8 {ARR}.rollout.n=4 {ARR}.ref.fsdp_config.param_offload=True "
        "algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl algorithm.kl_ctrl.kl_coef=0.001 "
        f"trainer.critic_warmup=0 {LOG} trainer.val_before_train=False trainer.save_freq=-1 trainer.test_freq=5 "
        "trainer.total_epochs=5"
    ),
    "ppo_trainer/run_qwen3-0.6b_ds_gsm8k": (
        f"actor@{ARR}.actor=ds_actor critic=ds_critic {ARR}.actor.strategy=deepspeed "
        f"trainer.use_legacy_worker_impl=enable {ARR}.rollout.mode=async {ARR}.rollout.load_format=auto {VLLM} "
        f"{ARR}.rollout.max_model_len=1024 {ARR}.rollout.max_num_seqs=8 {ARR}.rollout.max_num_batched_tokens=1024 "
        f"{ARR}.rollout.log_prob_micro_batch_size_per_gpu=1 {ARR}.rollout.gpu_memory_utilization=0.2 "
        f"{ARR}.model.path=m critic.model.path=m {ARR}.model.trust_remote_code=True "
        "critic.model.trust_remote_code=True data.trust_remote_code=True "
        f"+{ARR}.model.override_config.attn_implementation=flash_attention_2 "
        "+critic.model.override_config.attn_implementation=flash_attention_2 "
        f"{ARR}.model.use_remove_padding=True {ARR}.actor.ppo_mini_batch_size=32 critic.ppo_mini_batch_size=32 "
        f"{ARR}.actor.ppo_micro_batch_size_per_gpu=2 critic.ppo_micro_batch_size_per_gpu=2 "
        f"{ARR}.actor.ppo_max_token_len_per_gpu=2048 critic.ppo_max_token_len_per_gpu=2048 "
        f"{ARR}.actor.use_kl_loss=False algorithm.use_kl_in_reward=False {DATA} data.train_batch_size=64 "
        f"data.max_prompt_length=512 data.max_response_length=512 {RUN} {ONE_CARD} trainer.resume_mode=disable "
        "trainer.total_training_steps=60 trainer.test_freq=-1 trainer.val_before_train=False "
        f"trainer.logger=[console] {ARR}.actor.deepspeed.zero_stage=2 critic.deepspeed_config.zero_stage=2 "
        f"{ARR}.actor.deepspeed.offload=none critic.deepspeed_config.offload=none"
    ),
    "arena_grpo/run_qwen2_5_0_5b_fsdp": (
        f"algorithm.adv_estimator=grpo {DATA} data.train_batch_size=8 data.max_prompt_length=256 "
        f"data.max_response_length=512 data.filter_overlong_prompts=True {ARR}.model.path=m "
        f"{ARR}.actor.optim.lr=1e-6 {ARR}.actor.ppo_mini_batch_size=8 {ARR}.actor.ppo_micro_batch_size_per_gpu=1 "
        f"{KL_LOSS} {ARR}.model.enable_gradient_checkpointing=True {ARR}.rollout.log_prob_micro_batch_size_per_gpu=1 "
        f"{VLLM} {ARR}.rollout.gpu_memory_utilization=0.7 {ARR}.rollout.max_model_len=2048 {ARR}.rollout.n=4 "
        f"{ARR}.rollout.agent.default_agent_loop=arena_agent {ARR}.rollout.agent.agent_loop_config_path=a.yaml "
        f"{ARR}.ref.log_prob_micro_batch_size_per_gpu=1 algorithm.use_kl_in_reward=False trainer.critic_warmup=0 "
        f"trainer.logger=['console'] {RUN} {ONE_CARD} trainer.save_freq=5 trainer.test_freq=1 trainer.total_epochs=10"
    ),
}
SFT_COMMANDS: dict[str, str] = {
    "sft/gsm8k/run_qwen3_8b_fsdp": (
        f"{DATA} data.micro_batch_size_per_gpu=64 data.messages_key=messages optim.lr=1e-4 engine=fsdp "
        "engine.ulysses_sequence_parallel_size=1 model.path=m model.use_remove_padding=true model.lora_rank=32 "
        "model.lora_alpha=16 model.target_modules=all-linear trainer.default_local_dir=d "
        f"trainer.logger=['console','wandb'] {RUN} trainer.total_epochs=2"
    ),
    "sft/gsm8k/run_qwen_05_peft": (
        f"{DATA} data.prompt_key=extra_info data.response_key=extra_info optim.lr=1e-4 "
        "data.prompt_dict_keys=['question'] +data.response_dict_keys=['answer'] data.micro_batch_size_per_gpu=4 "
        f"model.partial_pretrain=m trainer.default_local_dir=d {RUN} trainer.logger=['console'] "
        "trainer.total_epochs=1 trainer.default_hdfs_dir=null model.lora_rank=32 model.lora_alpha=16 "
        "model.target_modules=all-linear"
    ),
}


def words(command: str) -> list[str]:
    """The settings of a command."""
    return command.split()


def keys(command: str) -> list[str]:
    """Their keys, each once."""
    return list(dict.fromkeys(key for word in command.split() for key in expand(word.split("=")[0].lstrip("+"))))
