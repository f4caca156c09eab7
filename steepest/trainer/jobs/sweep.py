"""`steepest sweep`: the same job by several seeds, and for each of several values of some keys.

Each run is the command `steepest ppo` in a process of its own, one after the other, in a folder of its own. What has
ended well is not run again, so the same command goes on after a stop; a run that was cut continues from its checkpoint.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steepest.config.arguments import is_sweep, sweep_values
from steepest.config.load import load_config
from steepest.console import say
from steepest.errors import ConfigError
from steepest.loggers.jsonl import read_metrics
from steepest.process.files import replace_text
from steepest.trainer.run.hooks import ACCURACY

RECORD = "sweep.json"
SEED_KEYS = ("data.seed", "actor_rollout_ref.rollout.seed")
FOLDER_KEY = "trainer.default_local_dir"
_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
              2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip
"""Quantiles of Student's t for 95 %, by degrees of freedom from 1; beyond them 2.0 is near enough."""
Execute = Callable[[list[str], Path], int]
"""Runs a job by its words, its output into a file; returns the exit code."""


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    setting: str
    """The values that this run's group has in place of others, such as `lr=1e-6`; empty where nothing varies."""
    seed: int
    name: str
    """The name of its folder."""
    words: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    setting: str
    seed: int
    words: list[str]
    exit_code: int
    first: float | None = None
    best: float | None = None
    last: float | None = None
    """Accuracy of the validations."""


def seeds_of(text: str) -> list[int]:
    """The seeds of `0,1,2`. Raises ConfigError for anything else."""
    try:
        return [int(one) for one in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: expected whole numbers with commas between them, such as 0,1,2.") from error


def plan(words: Sequence[str], seeds: Sequence[int], folder: Path) -> list[Planned]:
    """The runs of a sweep, setting after setting, each by every seed.

    `words`: those of `steepest ppo`; a key with several values (`lr=1e-6,3e-6`, Hydra's grammar) varies. Raises
    ConfigError for seeds that are given twice, and for keys that the sweep sets itself.
    """
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {','.join(map(str, seeds))}: a seed is given twice.")
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        if key in (*SEED_KEYS, FOLDER_KEY):
            raise ConfigError(f"{key}: the sweep sets it for each run. Use --seeds, or --folder, and remove the key.")
    choices = [sweep_values(word) if is_sweep(word) else [word] for word in words]
    found = []
    for chosen in itertools.product(*choices):
        varied = [one for one, values in zip(chosen, choices, strict=True) if len(values) > 1]
        setting = " ".join(
            f"{key.rpartition('.')[2]}={value}" for key, _, value in (one.partition("=") for one in varied)
        )
        for seed in seeds:
            name = re.sub(r"[^\w.=+-]+", "_", f"{setting} seed={seed}".strip())
            own = [*(f"{key}={seed}" for key in SEED_KEYS), f"{FOLDER_KEY}={folder / name}"]
            found.append(Planned(setting, seed, name, (*chosen, *own)))
    if len({one.name for one in found}) < len(found):
        raise ConfigError("two of the varied keys have the same last part and values. Vary one of them at a time.")
    return found


def check(runs: Sequence[Planned]) -> None:
    """Raises ConfigError for a setting that `steepest ppo` would refuse, before the first run."""
    for run in {run.setting: run for run in runs}.values():
        load_config(list(run.words))


def run_sweep(runs: Sequence[Planned], folder: Path, execute: Execute | None = None) -> list[Outcome]:
    """Run what is planned and has not ended well yet; the record in `folder` is written after each run."""
    execute = execute or run_command
    folder.mkdir(parents=True, exist_ok=True)
    done = {(one.setting, one.seed): one for one in read_record(folder)}
    for number, run in enumerate(runs, 1):
        before = done.get((run.setting, run.seed))
        where = f"{number} of {len(runs)}: {run.name}"
        if before is not None and before.exit_code == 0 and before.words == list(run.words):
            say(f"{where}: has ended, {_short(before.last)} at its end")
            continue
        say(f"{where} ...")
        code = execute(list(run.words), folder / f"{run.name}.log")
        outcome = Outcome(run.setting, run.seed, list(run.words), code, *_validations(folder / run.name))
        done[run.setting, run.seed] = outcome
        say(f"{where}: exit code {code}, {_short(outcome.last)} at its end")
        kept = [done[key] for key in ((one.setting, one.seed) for one in runs) if key in done]
        replace_text(folder / RECORD, json.dumps([asdict(one) for one in kept], indent=1) + "\n")
    return [done[run.setting, run.seed] for run in runs]


def run_command(words: list[str], log: Path) -> int:
    """Run `steepest ppo` in a process of its own, its output into `log`, after that of an earlier start."""
    with log.open("ab") as output:
        command = [sys.executable, "-m", "steepest", "ppo", *words]
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def read_record(folder: Path) -> list[Outcome]:
    """The outcomes so far. Raises ConfigError for a record that cannot be read."""
    file = folder / RECORD
    if not file.exists():
        return []
    try:
        return [Outcome(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}). Remove it: runs that have ended say so at once."
        ) from error


def _validations(folder: Path) -> tuple[float | None, float | None, float | None]:
    file = folder / "metrics.jsonl"
    found = [row[ACCURACY] for row in read_metrics(file).values() if ACCURACY in row] if file.exists() else []
    return (found[0], max(found), found[-1]) if found else (None, None, None)


# -- what it says at the end -----------------------------------------------------------------------------------------


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a setting: mean over its seeds and interval of 95 % (Student's t) of first, best and last validation."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.setting, []).append(one)
    width = max(len(setting) for setting in (*groups, "setting"))
    lines = [f"{'setting':<{width}}  seeds  {'first':<24}{'best':<24}last"]
    for setting, found in groups.items():
        cells = [_mean([getattr(one, name) for one in found]) for name in ("first", "best", "last")]
        lines.append(f"{setting or '-':<{width}}  {len(found):>5}  {cells[0]:<24}{cells[1]:<24}{cells[2]}")
    return "\n".join([*lines, *failures(outcomes)])


def failures(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each run that has not ended well."""
    for one in outcomes:
        if one.exit_code:
            name = f"{one.setting} seed={one.seed}".strip()
            yield f"failed: {name}, exit code {one.exit_code}; its .log file says why. The same command tries again."


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = statistics.fmean(known)
    if len(known) == 1:
        return _short(mean)
    freedom = len(known) - 1
    quantile = _QUANTILES[freedom - 1] if freedom <= len(_QUANTILES) else 2.0
    return f"{mean:.4f} ± {quantile * statistics.stdev(known) / math.sqrt(len(known)):.4f}"


def _short(value: float | None) -> str:
    return "not validated" if value is None else f"{value:.4f}"
