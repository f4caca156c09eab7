#!/usr/bin/env bash
# GRPO of Qwen2.5-0.5B-Instruct on GSM8K on the CPU, at a laptop's sizes: to see it work, not to reach a score.
#   bash examples/grpo_gsm8k_cpu.sh [key=value ...]       what you add wins over what stands here
# No critic: the actor with Adam and the reference, in float32, take 10 GB before activations. With less memory:
#   MODEL=HuggingFaceTB/SmolLM2-135M-Instruct bash examples/grpo_gsm8k_cpu.sh
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct} # hub id or folder
DATA=${DATA:-$HOME/data/gsm8k}             # from examples/data_preprocess/gsm8k.py

# the preset grpo: answers are compared within their group, no critic, KL to the reference in the loss
python3 -m steepest.trainer.main_ppo --config-name grpo \
  data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" data.val_max_samples=64 \
  data.train_batch_size=4 data.max_prompt_length=512 data.max_response_length=256 \
  actor_rollout_ref.model.path="$MODEL" actor_rollout_ref.actor.optim.lr=1e-6 \
  actor_rollout_ref.actor.ppo_mini_batch_size=2 actor_rollout_ref.rollout.name=builtin \
  actor_rollout_ref.rollout.n=4 \
  trainer.logger=console trainer.val_before_train=False trainer.experiment_name=grpo_gsm8k_cpu \
  trainer.save_freq=10 trainer.test_freq=10 trainer.max_actor_ckpt_to_keep=1 \
  trainer.total_training_steps=50 trainer.device=cpu "$@"
