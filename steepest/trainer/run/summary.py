"""What a run says at its start and at its end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import steepest
from steepest.assembly.description import Description, Size
from steepest.config.plan import Plan
from steepest.config.schema import Config
from steepest.devices.api import Device
from steepest.trainer.loop import Schedule

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes a run will hold, by what holds them; activations are one micro-batch's and come on top."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def describe(self, available: int) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.parts.items() if size)
        return (
            f"about {self.total / GIB:.2f} GiB without activations ({parts}); "
            f"this machine has {available / GIB:.1f} GiB free"
        )


def estimate_memory(
    *, actor: int, critic: int, reference: int, cast_bytes: int, engine_copy_bytes: int, kv_cache_bytes: int
) -> MemoryEstimate:
    """From the bytes of the models (`sizes`; 0 for one that does not exist) and the engine's own."""
    return MemoryEstimate(
        {
            "actor": actor,
            "critic": critic,
            "reference": reference,
            "bfloat16 copies": cast_bytes,
            "rollout weights": engine_copy_bytes,
            "KV cache": kv_cache_bytes,
        }
    )


def count(number: int) -> str:
    """1234 -> 1.2K, 135_000_000 -> 135M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and aligned `name  text` lines, readable in a terminal and in a log file."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def duration(seconds: float) -> str:
    """45s, 3m 20s, 2h 05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def start_summary(
    config: Config,
    plan: Plan,
    notes: Sequence[str],
    device: Device,
    roles: Description,
    folder: str,
    *,
    schedule: Schedule | None = None,
    machine: Sequence[tuple[str, str]] = (),
) -> str:
    """Model, data, steps, memory, and what is on and off, before the first step. `machine`: more rows after the
    device's, such as its threads and its measured limit. `schedule`: None for a run that only validates."""
    found = roles.sizes
    rollout, algorithm = config.actor_rollout_ref.rollout, config.algorithm
    generation = roles.compute if rollout.dtype == "auto" else rollout.dtype
    memory = estimate_memory(
        actor=found["actor"].bytes,
        critic=found.get("critic", Size()).bytes,
        reference=found.get("reference", Size()).bytes,
        cast_bytes=roles.cast_bytes,
        engine_copy_bytes=roles.engine_copy_bytes,
        kv_cache_bytes=kv_cache_bytes(
            roles.kv_numbers,
            min(rollout.max_num_seqs, plan.rows_per_step),
            config.data.max_prompt_length + config.data.max_response_length,
            width=2 if generation == "bfloat16" else 4,
        ),
    )
    halved = ", frozen ones in bfloat16" if any(size.halved for size in found.values()) else ""
    rows = [
        ("device", device.describe()),
        *machine,
        ("model", config.actor_rollout_ref.model.path),
        ("parameters", "; ".join(f"{role} {size.describe(count)}" for role, size in found.items())),
        ("compute", f"{roles.compute} over float32 weights{halved}"),
        ("attention", roles.attention),
        *([("passes", passes(roles, rollout.n))] if rollout.n > 1 else []),
        *(("data", note) for note in notes),
        ("steps", f"{plan.total_steps} ({plan.steps_per_epoch} an epoch), {config.data.train_batch_size} prompts x "
                  f"{rollout.n} response(s) each, {plan.updates_per_step} update(s) a step"),
        ("rollout", f"{rollout.name}; temperature {rollout.temperature:g}, "
                    f"top_p {rollout.top_p:g}, top_k {rollout.top_k}"),
        ("algorithm", f"{algorithm.adv_estimator}; " + _switches(config)),
        ("memory", memory.describe(device.memory().available)),
        *([("saving", saving(schedule, folder, roles.checkpoint_bytes))] if schedule else []),
        *(("note", note) for note in plan.notes),
        ("run folder", folder),
    ]  # fmt: skip
    return table(f"steepest {steepest.__version__}", rows)


def passes(roles: Description, n: int) -> str:
    """What a pass computes once: tokens without padding, and the prompt that a group's responses share."""
    shared = f"the prompt of {n} responses once" if roles.shares_prompts else "each row by itself"
    return f"packed tokens without padding, {shared}"


def _switches(config: Config) -> str:
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    coef = f"{algorithm.kl_ctrl.kl_coef:g}, {algorithm.kl_penalty}, {algorithm.kl_ctrl.type}"
    on_off = [
        ("KL in the reward", f"on ({coef})" if algorithm.use_kl_in_reward else "off"),
        ("KL loss", f"on ({actor.kl_loss_coef:g}, {actor.kl_loss_type})" if actor.use_kl_loss else "off"),
        ("entropy bonus", f"{actor.entropy_coeff:g}" if actor.entropy_coeff else "off"),
    ]
    return ", ".join(f"{name} {state}" for name, state in on_off)


def kv_cache_bytes(kv_numbers: int, sequences: int, max_model_len: int, *, width: int) -> int:
    """Keys and values of `sequences` decoded at once, at full length, of `width` bytes each."""
    return width * kv_numbers * max_model_len * sequences


def saving(schedule: Schedule, folder: str, checkpoint_bytes: int) -> str:
    """Which steps are saved, what that takes, and a warning where the disk has not even room for one."""
    if not schedule.saves_anything:
        return schedule.describe()
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{schedule.describe()}; {checkpoint_bytes / GIB:.2f} GiB each"
    warning = f". WARNING: the disk has {free / GIB:.2f} GiB free, which is too little"
    return text + (warning if free < checkpoint_bytes else f", {free / GIB:.1f} GiB free on the disk")


def end_summary(history: Mapping[int, float], *, seconds: float, steps: int, folder: str, kept: bool = True) -> str:
    """Steps done in this start, wall time, first, best and last validation, and what lies where."""
    rows = [("steps", f"{steps} in {duration(seconds)}")]
    if history:
        first, last = min(history), max(history)
        best = max(history, key=lambda step: (history[step], -step))
        for name, step in (("first", first), ("best", best), ("last", last)):
            rows.append((f"{name} validation", f"{history[step]:.4f} at step {step}"))
    names = ("report.html", "config.yaml", "metrics.jsonl", "samples.jsonl")
    held = [name for name in names if os.path.exists(path := Path(folder, name)) and os.path.getsize(path)]
    checkpoints = len(list(Path(folder).glob("global_step_*")))
    held += [f"{checkpoints} checkpoint(s)"] if checkpoints else []
    rows.append(("run folder", f"{folder} ({', '.join(held)})" if held else folder))
    if steps and not kept:
        rows.append(("model", "not saved, as trainer.save_freq and trainer.save_last ask"))
    return table("finished", rows)
