#!/usr/bin/env bash
# PPO of Qwen2.5-0.5B-Instruct on GSM8K on one NVIDIA card, vLLM for the rollouts: the quick start's command.
#   bash examples/ppo_gsm8k_cuda.sh [key=value ...]        what you add wins over what stands here
# Two checkpoints are kept, 12 GB each. Whether this was run on a card: docs/en/quick_start.md, section 9.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} # hub id or folder
DATA=${DATA:-$HOME/data/gsm8k}             # from examples/data_preprocess/gsm8k.py

python3 -m steepest.trainer.main_ppo \
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" \
  data.train_batch_size=256 data.max_prompt_length=512 data.max_response_length=512 \
  actor_rollout_ref.model.path="$MODEL" actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
  actor_rollout_ref.rollout.tensor_model_parallel_size=1 actor_rollout_ref.rollout.gpu_memory_utilization=0.4 \
  actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 \
  critic.model.path="$MODEL" critic.optim.lr=1e-5 critic.ppo_micro_batch_size_per_gpu=4 \
  algorithm.kl_ctrl.kl_coef=0.001 \
  trainer.logger=console trainer.val_before_train=False trainer.experiment_name=ppo_gsm8k_cuda \
  trainer.save_freq=10 trainer.test_freq=10 trainer.max_actor_ckpt_to_keep=2 \
  trainer.total_epochs=15 trainer.device=cuda "$@"
