"""Memory, disk and time of the whole run, from two parts of a step of different size."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from steepest.checks import Check, ok, problem, warning
from steepest.core.batch import Batch
from steepest.learner.micro_batches import MicroBatches
from steepest.trainer.jobs.ppo import Job
from steepest.trainer.jobs.preflight.report import Prediction
from steepest.trainer.jobs.preflight.step import Saved
from steepest.trainer.run.summary import duration

GIB = 2**30
FOLDER = "trainer.default_local_dir"


@dataclass(frozen=True)
class Measured:
    """What a part of a step took."""

    rows: int
    seconds: Mapping[str, float]
    """Part of the step -> seconds; "step" is not among them."""
    peak: int
    """Peak memory of the process or card afterwards, in bytes."""
    tokens: int
    """Tokens of its largest micro-batch with gradient."""


def measure(job: Job, batch: Batch, seconds: Mapping[str, float], micro: MicroBatches) -> Measured:
    """What a part of a step took that is just over."""
    lengths = batch.lengths.tolist()
    tokens = max(sum(lengths[row] for row in rows) for rows in micro.split(lengths))
    parts = {name: value for name, value in seconds.items() if name != "step"}
    return Measured(len(batch), parts, job.device.memory().peak, tokens)


def at(rows: int, small: Measured, large: Measured, name: str) -> float:
    """Seconds of a part for so many rows, on the line through both measurements; no less than that of the larger one
    for more rows."""
    a, b = small.seconds.get(name, 0.0), large.seconds.get(name, 0.0)
    if large.rows == small.rows:
        return b * rows / large.rows
    slope = max(0.0, (b - a) / (large.rows - small.rows))
    return max(0.0, b + slope * (rows - large.rows))


def predict(job: Job, small: Measured, large: Measured, saved: Saved, micro: MicroBatches) -> Prediction:
    """The whole run."""
    config, plan = job.config, job.plan
    step = sum(at(plan.rows_per_step, small, large, name) for name in large.seconds)
    val_rows = len(job.data.val) * config.actor_rollout_ref.rollout.val_kwargs.n
    validation = at(val_rows, small, large, "gen") + at(val_rows, small, large, "reward")
    numbers = range(1, plan.total_steps + 1)
    tests = sum(job.schedule.tests(step) for step in numbers) + config.trainer.val_before_train
    saves = sum(job.schedule.saves(step) for step in numbers)
    keep = config.trainer.max_actor_ckpt_to_keep
    kept = saves if keep is None else min(saves, keep + 1)  # the best is kept too
    longest = config.data.max_prompt_length + config.data.max_response_length
    tokens = longest * micro.rows if micro.rows is not None else max(longest, micro.tokens or 0)
    tokens = min(tokens, longest * plan.mini_batch_rows)
    slope = max(0.0, (large.peak - small.peak) / max(1, large.tokens - small.tokens))
    return Prediction(
        steps=plan.total_steps,
        seconds=plan.total_steps * step + tests * validation + saves * saved.seconds,
        step_seconds=step,
        peak_bytes=int(large.peak + slope * max(0, tokens - large.tokens)),
        checkpoint_bytes=saved.size,
        disk_bytes=saved.size * kept,
    )


def resource_checks(job: Job, found: Prediction) -> list[Check]:
    """Whether time, memory and disk suffice."""
    return [time_line(found), memory_line(job, found), disk_line(job, found)]


def time_line(found: Prediction) -> Check:
    """How long the run takes."""
    text = f"about {duration(found.seconds)}: {found.steps} steps of {found.step_seconds:.2g} s, validations and saving"
    return ok("time", text)


def memory_line(job: Job, found: Prediction) -> Check:
    """The peak against what there is."""
    total = job.device.memory().total
    text = f"about {found.peak_bytes / GIB:.2f} GiB at most, of {total / GIB:.1f} GiB"
    remedy = (
        "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu or "
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu, or set "
        "actor_rollout_ref.model.enable_gradient_checkpointing=True"
    )
    if found.peak_bytes > total:
        return problem("memory", text, remedy)
    return warning("memory", text, remedy) if found.peak_bytes > 0.9 * total else ok("memory", text)


def disk_line(job: Job, found: Prediction) -> Check:
    """The checkpoints that are kept at once against the free disk."""
    folder = job.folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    text = (
        f"{found.disk_bytes / GIB:.2f} GiB of checkpoints of {found.checkpoint_bytes / GIB:.2f} GiB each, "
        f"{free / GIB:.1f} GiB free"
    )
    if found.disk_bytes <= free:
        return ok("disk", text)
    return problem("disk", text, f"lower trainer.max_actor_ckpt_to_keep, or choose another disk with {FOLDER}")


def folder_for_trial(job: Job) -> Path:
    """A folder on the disk of the run folder, and outside of it."""
    parents = job.folder.absolute().parents
    return next(path for path in parents if path.is_dir())
