"""TRL's GRPOTrainer, which generates with transformers on a CPU, on the common workload.

Every step has the same prompts, padded to the longest of them, as TRL pads.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.peers.clock import Clock
from bench.workload import chat, gold, read_questions, rule_reward


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with one row a prompt")
    parser.add_argument("--out", type=Path, required=True, help="file for the steps' records")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True, help="of weights and Adam")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group", type=int, default=4, help="samples a prompt")
    parser.add_argument("--response", type=int, default=128, help="tokens of every response")
    parser.add_argument("--micro", type=int, default=4, help="sequences of a training pass")
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


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
    """Settings as in our run: one update per step on all samples, KL loss to the reference, no gradient
    checkpointing."""
    rows = args.prompts * args.group
    return GRPOConfig(
        output_dir=str(args.out.with_suffix(".trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=rows // args.micro,
        num_generations=args.group,
        max_completion_length=args.response,
        temperature=1.0,
        beta=0.001,
        generation_kwargs={"min_new_tokens": args.response, "max_new_tokens": args.response},
        max_steps=args.steps,
        learning_rate=1e-6,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        optim="adamw_torch_fused",
    )


def time_parts(trainer: Any, clock: Clock, told: dict[str, Any]) -> None:
    """Mark the end of generation and of scoring."""
    generate, score = trainer._generate, trainer._generate_and_score_completions

    def timed_generation(*given: Any, **named: Any) -> Any:
        made = generate(*given, **named)
        clock.mark("gen")
        return made

    def timed_score(*given: Any, **named: Any) -> Any:
        made = score(*given, **named)
        told["width"] = made["prompt_ids"].shape[1] + made["completion_ids"].shape[1]
        clock.mark("logp")
        return made

    trainer._generate, trainer._generate_and_score_completions = timed_generation, timed_score


def reward(completions: list[Any], gold: list[str], **_: Any) -> list[float]:
    return [rule_reward(answer[0]["content"], right) for answer, right in zip(completions, gold, strict=True)]


def main() -> None:
    args = arguments()
    rows = read_questions(args.data, args.prompts)
    columns = {"prompt": [chat(row["question"]) for row in rows], "gold": [gold(row["answer"]) for row in rows]}
    told: dict[str, Any] = {}
    clock = Clock(args.out, trl=trl.__version__, torch=torch.__version__, dtype=args.dtype)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)),
        args=settings(args),
        processing_class=AutoTokenizer.from_pretrained(args.model, padding_side="left"),
        train_dataset=Dataset.from_dict(columns),
        reward_funcs=reward,
        callbacks=[Steps(clock, told)],
    )
    time_parts(trainer, clock, told)
    trainer.train()


if __name__ == "__main__":
    main()
