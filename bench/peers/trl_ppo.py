"""TRL's PPOTrainer on the common workload. TRL 1.12 is the last version with it.

PPOTrainer needs a reward *model*. `RuleReward` is the cheapest possible one: its backbone returns the token ids as
hidden states, and its score decodes them and applies the rule, so the reward costs microseconds and no forward pass.
Every step has the same prompts, padded to the longest of them, as TRL pads.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import ppo_trainer

from bench.peers.clock import Clock
from bench.workload import gold, prompt_ids, read_questions, rule_reward


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with one row a prompt")
    parser.add_argument("--out", type=Path, required=True, help="file for the steps' records")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True, help="of weights and Adam")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--response", type=int, default=128, help="tokens of every response")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a training pass")
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


class RuleReward(nn.Module):
    """The rule, in the form of a reward model that PPOTrainer accepts."""

    base_model_prefix = "model"

    def __init__(self, tokenizer: Any, right: dict[tuple[int, ...], str], key_tokens: int, response: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.forward = lambda input_ids, **_: types.SimpleNamespace(hidden_states=[input_ids])
        self._tokenizer, self._right, self._key_tokens, self._response = tokenizer, right, key_tokens, response

    def score(self, sequences: Tensor) -> Tensor:
        """(rows, tokens) ids -> (rows, tokens, 1): the row's reward at every position; TRL reads the last one."""
        rewards = []
        for row in sequences.tolist():
            prompt, response = row[: -self._response], row[-self._response :]
            right = self._right[tuple(prompt[-self._key_tokens :])]
            rewards.append(rule_reward(self._tokenizer.decode(response, skip_special_tokens=True), right))
        return torch.tensor(rewards)[:, None, None].expand(-1, sequences.shape[1], 1).clone()


class Steps(TrainerCallback):
    """Writes one record per step."""

    def __init__(self, clock: Clock, told: dict[str, Any]) -> None:
        self._clock, self._told = clock, told

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._clock.mark("update")
        self._clock.stop(**self._told)
        self._clock.start()


def settings(args: argparse.Namespace) -> Any:
    """Settings as in our run: one update per step on all prompts, KL in the reward."""
    return ppo_trainer.PPOConfig(
        output_dir=str(args.out.with_suffix(".trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.prompts // args.micro,
        num_mini_batches=1,
        num_ppo_epochs=1,
        total_episodes=args.prompts * args.steps,
        response_length=args.response,
        temperature=1.0,
        local_rollout_forward_batch_size=args.prompts,
        num_sample_generations=0,
        kl_coef=0.001,
        gamma=1.0,
        lam=1.0,
        learning_rate=1e-6,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )


def time_parts(trainer: Any, clock: Clock, width: int, told: dict[str, Any]) -> None:
    """Mark the end of generation and the first micro-batch of the update."""
    generate: Callable[..., Any] = ppo_trainer.batch_generation
    accumulate = trainer.accelerator.accumulate
    updating = False

    def timed_generation(*given: Any, **named: Any) -> Any:
        nonlocal updating
        made = generate(*given, **named)
        if made[0].shape[1] != width:
            raise RuntimeError(f"TRL generated {made[0].shape[1]} columns; expected {width}")
        told["width"] = width
        clock.mark("gen")
        updating = False
        return made

    def timed_accumulate(*given: Any, **named: Any) -> Any:
        nonlocal updating
        if not updating:
            clock.mark("logp")
            updating = True
        return accumulate(*given, **named)

    ppo_trainer.batch_generation, trainer.accelerator.accumulate = timed_generation, timed_accumulate


def main() -> None:
    args = arguments()
    dtype = getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = "<|endoftext|>"  # PPOTrainer masks every pad token, so it must be another than the turn's end
    rows = read_questions(args.data, args.prompts)
    prompts = [prompt_ids(tokenizer, row["question"]) for row in rows]
    key_tokens = min(map(len, prompts))
    right = {tuple(ids[-key_tokens:]): gold(row["answer"]) for ids, row in zip(prompts, rows, strict=True)}
    told: dict[str, Any] = {}
    clock = Clock(args.out, trl=trl.__version__, torch=torch.__version__, dtype=args.dtype)
    data = Dataset.from_dict({"input_ids": prompts})
    trainer = ppo_trainer.PPOTrainer(
        args=settings(args),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype),
        value_model=AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=dtype),
        reward_model=RuleReward(tokenizer, right, key_tokens, args.response),
        train_dataset=data,
        eval_dataset=data.select(range(1)),
        callbacks=[Steps(clock, told)],
    )
    time_parts(trainer, clock, max(map(len, prompts)) + args.response, told)
    trainer.train()


if __name__ == "__main__":
    main()
