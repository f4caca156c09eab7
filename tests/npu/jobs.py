"""What the NPU's tests share: whether the device is the stand-in, and jobs that run on either device."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from steepest.config.load import load_config, load_sft_config
from steepest.loggers.rows import read_rows
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.jobs.sft import run_sft
from tests.support.toy_run import make_toy, toy_overrides

Row = Mapping[str, float]

REWARD = '''
def near(data_source, solution_str, ground_truth, extra_info):
    """Digits of the answer, each worth the more the nearer it is to the one asked for: no two answers are alike."""
    digits = [int(word) for word in solution_str.split() if word.isdigit()]
    return sum(1 - abs(digit - int(ground_truth)) / 10 for digit in digits) / 4
'''

_SPEC = importlib.util.find_spec("torch_npu")
ON_STAND_IN = _SPEC is not None and _SPEC.origin is not None and "fakes" in Path(_SPEC.origin).parts
"""False on a real card. Known without importing anything."""
needs_stand_in = pytest.mark.skipif(not ON_STAND_IN, reason="asks for what only the stand-in has")
RELATIVE = 1e-5 if ON_STAND_IN else 1e-2
"""How near the CPU's numbers a device's come: rounding of float32 sums here, a card's own kernels there."""

FLOAT32 = (
    "actor_rollout_ref.actor.fsdp_config.dtype=float32",
    "actor_rollout_ref.rollout.dtype=float32",
    "critic.fsdp.dtype=float32",
)
"""A device with bf16 computes in it by default, and a CPU without it does not."""
GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "data.train_batch_size=16")
SMALL = (
    "data.train_batch_size=32",
    "data.max_response_length=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    # Adam's first steps have the size of the rate whatever the gradient's, also where that is all rounding. A small
    # rate keeps such steps from growing into other tokens.
    "actor_rollout_ref.actor.optim.lr=1e-5",
    "critic.optim.lr=1e-4",
)


def make_task(folder: Path) -> dict[str, Path]:
    """The toy, with a reward that a random model's answers differ in."""
    toy = make_toy(folder)
    toy["reward"].write_text(REWARD)
    return toy


def ppo(toy: dict[str, Path], folder: Path, device: str, *more: str) -> list[Row]:
    """Run the PPO job on the toy; what it logged, step for step."""
    words = (*FLOAT32, *SMALL, f"trainer.device={device}", *more)
    run_ppo(load_config(toy_overrides(toy, folder, *words, reward="near")))
    return logged(folder)


def sft(toy: dict[str, Path], rows: Path, folder: Path, device: str, *more: str) -> list[Row]:
    """Run the SFT job on the toy's model; what it logged, step for step."""
    overrides = [
        f"data.train_files={rows}",
        f"data.val_files={rows}",
        "data.train_batch_size=16",
        "data.max_length=32",
        f"model.path={toy['model']}",
        "engine.dtype=float32",
        "optim.lr=1e-3",
        "trainer.logger=jsonl",
        "trainer.test_freq=2",
        "trainer.save_freq=2",
        f"trainer.device={device}",
        f"trainer.default_local_dir={folder}",
    ]
    run_sft(load_sft_config([*overrides, *more]))
    return logged(folder)


def logged(folder: Path) -> list[Row]:
    """The rows of metrics.jsonl, without what the clock and the memory say."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf/", "time"))} for row in rows]


# In float32 these are rounding and nothing else: equal in size, not in digits.
_ROUNDING = dict.fromkeys(
    ["actor/ratio_max_dev_first", "mismatch/max_abs_diff"]
    + [f"rollout_corr/{name}" for name in ("chi2_seq", "chi2_token", "log_ppl_diff_max", "log_ppl_diff_min")],
    1e-5,
)


def differences(found: Sequence[Row], want: Sequence[Row]) -> dict[str, float]:
    """`step/metric` -> |found - want|, in units of the tolerance: RELATIVE of the number, or 1e-6 where that is more.

    Raises AssertionError when the rows do not hold the same metrics. On a card only the first step is compared:
    after it, rounding has chosen other tokens.
    """
    if not ON_STAND_IN:
        found, want = ([row for row in rows if row["step"] <= 1] for rows in (found, want))
    assert [set(row) for row in found] == [set(row) for row in want]
    return {
        f"{row['step']}/{name}": abs(row[name] - value) / max(RELATIVE * abs(value), _ROUNDING.get(name, 1e-6))
        for row, other in zip(found, want, strict=True)
        for name, value in other.items()
    }
