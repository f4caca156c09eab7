"""Measures Steepest's own step: runs the real trainer and reads its metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.flops import Critic, Group, step_flops
from bench.inputs import ROOT, Inputs
from bench.measure import GIB, BenchError, Measured, run_measured

Kind = Literal["full", "adapter", "head"]
"""full: every weight is trained. adapter, head: a LoRA actor, and the critic on its base (`critic.share_base`)."""
MICRO_TOKENS: dict[Kind, int] = {"full": 960, "adapter": 576, "head": 576}
"""Largest number of tokens in a micro-batch. Small micro-batches cost at least 7 % of an update's time (the gradients
of weights are added more often, products have fewer rows); activations are most of a run's memory next to the
weights."""
LORA_RANK = 16
FREES_ENGINE = "actor_rollout_ref.rollout.free_cache_engine=True"
"""With this key the engine frees its packed weights while models train; they are as large as a model."""
_A_PASS = 0.5
"""If old log-probs took less than this share of the reference's time, they had no pass over all rows."""


@dataclass(frozen=True)
class Step:
    """One training step."""

    seconds: float
    cpu: float
    """Processor seconds of the process tree."""
    others: float
    """Processor seconds that all other processes used meanwhile."""
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Run:
    """The measured steps of one process, without its first step."""

    steps: tuple[Step, ...]
    peak: int
    """Peak memory of the process tree, in bytes."""
    log: Path

    @property
    def seconds(self) -> float:
        return statistics.median(step.seconds for step in self.steps)

    @property
    def parts(self) -> dict[str, float]:
        """The median of each part."""
        names = dict.fromkeys(name for step in self.steps for name in step.parts)
        return {name: statistics.median(step.parts.get(name, 0.0) for step in self.steps) for name in names}

    @property
    def reads_values(self) -> bool:
        """True if the values have their own pass. Otherwise the critic's update computes them, and `update_critic`
        holds only its optimizer step."""
        return self.parts.get("update_critic", 0.0) > self.parts.get("values", 0.0)

    def row(self, who: str, tokens: int) -> dict[str, Any]:
        """A row of a table: times, response tokens per processor second, memory, and the use of the cores by others."""
        cpu = statistics.median(step.cpu for step in self.steps)
        others = sum(step.others for step in self.steps) / max(1e-9, sum(s.cpu + s.others for s in self.steps))
        parts = self.parts
        generation = parts.get("gen", 0.0)
        update = sum(seconds for name, seconds in parts.items() if name.startswith("update"))
        if not self.reads_values:
            update += parts.get("values", 0.0)
        return {
            "run": who,
            "s a step": self.seconds,
            "generation": generation,
            "log-probs, values, reference": max(0.0, self.seconds - generation - update),
            "update": update,
            "response tokens a CPU second": tokens / cpu if cpu else None,
            "peak GiB": self.peak / GIB,
            "others' share of the CPU": others,
            "steps": len(self.steps),
        }


def overrides(
    inputs: Inputs,
    data: Path,
    folder: Path,
    *,
    prompts: int,
    group: int,
    response: int,
    prompt_limit: int,
    steps: int,
    budget: int = MICRO_TOKENS["full"],
) -> list[str]:
    """The trainer's keys of a run on `prompts` rows, which are the same in every step: responses of `response` tokens,
    one update a step, micro-batches of at most `budget` tokens."""
    model = inputs.model
    return [
        f"data.train_files={data}", f"data.val_files={data}", "data.shuffle=False",
        f"data.train_batch_size={prompts}", f"data.max_prompt_length={prompt_limit}",
        f"data.max_response_length={response}",
        f"actor_rollout_ref.model.path={model}", f"actor_rollout_ref.rollout.n={group}",
        "actor_rollout_ref.rollout.ignore_eos=True",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts}",
        f"actor_rollout_ref.actor.fsdp_config.dtype={inputs.dtype}",
        f"actor_rollout_ref.actor.ppo_max_token_len_per_gpu={budget}",
        f"custom_reward_function.path={ROOT / 'bench' / 'reward.py'}", "custom_reward_function.name=digits",
        "trainer.device=cpu", "trainer.logger=console", "trainer.val_before_train=False", "trainer.resume_mode=disable",
        f"trainer.total_training_steps={steps}", f"trainer.default_local_dir={folder}",
    ]  # fmt: skip


def ppo(kind: Kind) -> list[str]:
    """Keys for GAE with a critic, and the KL to the reference in the reward."""
    kl = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.001"]
    keys = ["algorithm.adv_estimator=gae", *kl, FREES_ENGINE]
    if kind != "full":
        keys += [f"actor_rollout_ref.model.lora_rank={LORA_RANK}", f"critic.share_base={kind}"]
    return keys


GRPO = [
    "algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=True", "algorithm.use_kl_in_reward=False",
]  # fmt: skip
"""Keys for groups instead of a critic, and the KL to the reference in the loss."""


def run_ours(inputs: Inputs, keys: Sequence[str], folder: Path, log: Path) -> Run:
    """Train by the command that a user would type. Raises BenchError with the end of its output if it fails."""
    if folder.exists():
        shutil.rmtree(folder)
    command = [sys.executable, "-m", "steepest.trainer.main_ppo", *keys]
    measured = run_measured(command, log=log, env={**inputs.own_env, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    check(measured, log)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [
        {
            "end": row["time"],
            "step": row["timing_s/step"],
            "parts": {
                name.removeprefix("timing_s/"): value for name, value in row.items()
                if name.startswith("timing_s/") and name != "timing_s/step"
            },
        }
        for row in rows if "timing_s/step" in row
    ]  # fmt: skip
    return make_run(records, measured, log)


def make_run(records: Sequence[Mapping[str, Any]], measured: Measured, log: Path) -> Run:
    """Join the trainer's records of the steps with the measurements from outside, without the first step."""
    if len(records) < 2:
        raise BenchError(f"{log}: {len(records)} step(s) recorded; the first is left out, so two are needed.")
    steps = []
    for record in records[1:]:
        cpu, others = measured.cpu_between(record["end"] - record["step"], record["end"])
        steps.append(Step(record["step"], cpu, others, record["parts"]))
    return Run(tuple(steps), measured.peak, log)


def check(measured: Measured, log: Path) -> None:
    """Raises BenchError when the command failed or was ended."""
    if measured.timed_out or measured.returncode:
        why = "took too long" if measured.timed_out else f"failed with code {measured.returncode}"
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise BenchError(f"a run {why}; the end of {log}:\n{tail}")


def operations(inputs: Inputs, run: Run, groups: Sequence[Group], *, critic: Critic, lora: bool) -> dict[str, int]:
    """The arithmetic of this run's passes. Passes for old log-probs or values count if their time shows that they
    exist.

    A group's prompt counts once where it has several responses: training shares it on the CPU, as generation does.
    """
    return step_flops(
        inputs.shape,
        groups,
        critic=critic,
        reference=True,
        old_log_probs=run.parts.get("old_log_prob", 0.0) > _A_PASS * run.parts.get("ref", 0.0),
        values=run.reads_values,
        lora_rank=LORA_RANK if lora else 0,
        share_prompts=True,
    )
