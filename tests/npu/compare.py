"""The reference command on the CPU and on the NPU, number for number.

    python -m tests.npu.compare [--steps 3] [--folder DIR] [--tolerance 1e-4]

Both runs are processes of their own, with every key of the reference command (tests/support/commands.py) but with the
builtin rollout engine, the quickstart's model and problems, small sizes and float32 on both devices. A short supervised
warm-up on the CPU comes first, so that there are rewards to learn from. The table gives step, metric, both numbers and
their difference; the exit code is 1 when a difference exceeds the tolerance: relative, and absolute below 1.

With torch-npu installed the second run is on its card, where the kernels' own rounding makes a larger difference; else
on the stand-in (docs/npu_simulation.md).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from steepest.loggers.rows import read_rows
from tests.npu.__main__ import ROOT, environment
from tests.support.commands import REFERENCE

SHOWN = (
    "actor/pg_loss", "actor/grad_norm", "actor/entropy", "actor/ppo_kl", "actor/pg_clipfrac", "actor/reward_kl_penalty",
    "critic/vf_loss", "critic/grad_norm", "critic/vpred_mean", "critic/vf_explained_var", "critic/score/mean",
    "critic/rewards/mean", "critic/advantages/max", "critic/returns/mean", "critic/values/mean", "response_length/mean",
    "mismatch/mean_abs_diff", "val/accuracy",
)  # fmt: skip
SMALL = {
    "data.train_batch_size": "64",
    "data.max_prompt_length": "64",
    "data.max_response_length": "32",
    "actor_rollout_ref.actor.ppo_mini_batch_size": "16",
    "actor_rollout_ref.rollout.name": "builtin",
    "trainer.logger": "[console,jsonl]",
    "trainer.test_freq": "1",
}
"""What the small run changes of the reference command, beside models, data and device."""
ADDED = ("actor_rollout_ref.actor.fsdp_config.dtype", "critic.fsdp.dtype", "actor_rollout_ref.rollout.dtype")
"""A device with bf16 takes it by default; float32 on both, so that their numbers can be compared."""

Row = Mapping[str, float]


def command(device: str, folder: Path, model: Path, data: Path, steps: int) -> list[str]:
    """The reference command, made small."""
    words = dict(word.split("=", 1) for word in REFERENCE)
    words |= {
        **SMALL,
        "data.train_files": f"{data}/train.parquet",
        "data.val_files": f"{data}/test.parquet",
        "actor_rollout_ref.model.path": str(model),
        "critic.model.path": str(model),
        "trainer.device": device,
        "trainer.default_local_dir": str(folder / device),
        "trainer.total_training_steps": str(steps),
        "trainer.save_freq": str(steps),
        **dict.fromkeys(ADDED, "float32"),
    }
    return [f"{key}={value}" for key, value in words.items()]


def make_inputs(folder: Path, sft_steps: int) -> tuple[Path, Path]:
    """(model folder, data folder): the quickstart's, smaller."""
    import steepest.process.entry  # noqa: F401  (sets how threads wait, before torch is loaded)
    from steepest.trainer.jobs.quickstart import Settings, make_inputs, sft

    sizes = {"num_train": 2048, "num_test": 64, "num_sft": 4096}
    settings = Settings(folder=str(folder / "inputs"), sft_steps=sft_steps, **sizes)
    make_inputs(settings)
    return sft(settings), settings.data


def run(device: str, words: Sequence[str]) -> None:
    """One run, told as it goes; its exit code counts."""
    print(f"\n== on {device}: python -m steepest.trainer.main_ppo {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "steepest.trainer.main_ppo", *words], env=environment(), check=True)


def compared(cpu: Sequence[Row], npu: Sequence[Row]) -> Iterator[tuple[int, str, float, float, float]]:
    """(step, metric, cpu, npu, difference) of the metrics that are shown; a difference is relative above 1."""
    for mine, theirs in zip(cpu, npu, strict=True):
        for name in SHOWN:
            if name in mine:
                a, b = mine[name], theirs[name]
                yield int(mine["step"]), name, a, b, abs(a - b) / max(1.0, abs(a))


def table(rows: Sequence[tuple[int, str, float, float, float]]) -> str:
    """A line a metric."""
    lines = [f"{'step':>4}  {'metric':<26}{'cpu':>16}{'npu':>16}{'difference':>13}"]
    lines += [f"{step:>4}  {name:<26}{a:>16.8f}{b:>16.8f}{d:>13.1e}" for step, name, a, b, d in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sft-steps", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the runs are written; a temporary folder without it")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # another number of threads rounds in another order
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        model, data = make_inputs(folder, options.sft_steps)
        for device in ("cpu", "npu"):
            run(device, command(device, folder, model, data, options.steps))
        cpu, npu = (list(read_rows(folder / device / "metrics.jsonl")) for device in ("cpu", "npu"))
    rows = list(compared(cpu, npu))
    worst = max(rows, key=lambda row: row[-1])
    print(f"\n{table(rows)}\n\nlargest difference: {worst[-1]:.1e} ({worst[1]}, step {worst[0]})")
    return int(not worst[-1] <= options.tolerance)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
