"""Measures the seconds from the command to the first rollout, part by part.

    python -m bench.startup --model DIR --data FOLDER          FOLDER holds train.parquet and test.parquet
    python -m bench.startup --model DIR --data FOLDER --imports

The run's own start summary has the times of its parts; this adds the time before them (the interpreter) and after them
(the first rollout, of few short answers). The fastest of several starts counts, with warm file caches. `--imports`
lists the modules that take longest to import.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import STARTED_WITH

_START = re.compile(r"^  start-up +[\d.]+ s \((.*)\)$", re.MULTILINE)
TARGET = 10.0
"""The goal, in seconds from the command to the first rollout, for SmolLM2-135M on two cores."""


def command(model: Path, data: Path, folder: Path) -> list[str]:
    """One step of the reference command on two prompts."""
    return [
        sys.executable, "-m", "steepest.trainer.main_ppo", f"data.train_files={data}/train.parquet",
        f"data.val_files={data}/test.parquet", f"actor_rollout_ref.model.path={model}", "data.train_batch_size=2",
        "data.max_prompt_length=512", "data.max_response_length=8", "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "trainer.total_training_steps=1", "trainer.val_before_train=False", "trainer.test_freq=-1",
        "trainer.save_freq=0", "trainer.logger=jsonl", f"trainer.default_local_dir={folder}", "trainer.device=cpu",
    ]  # fmt: skip


def start(words: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """The seconds of each part of one start."""
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if found := _START.match(line.rstrip("\n")):
                seen = time.perf_counter() - began
                laps = {name: float(value) for name, _, value in (x.rpartition(" ") for x in found[1].split(", "))}
        if process.wait() != 0:
            raise SystemExit(f"the run ended with code {process.returncode}; see its message above")
    gen = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["timing_s/gen"]
    return {"interpreter": seen - sum(laps.values()), **laps, "first rollout": gen}


def slowest_imports(number: int = 25) -> str:
    """A list of the modules that take longest to import, with everything that they import."""
    code = "import steepest.trainer.main_ppo, steepest.trainer.jobs.ppo"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    found = sorted(((int(c), name.strip()) for _, c, name in rows if c.strip().isdigit()), reverse=True)
    return "\n".join(f"{microseconds / 1e6:8.2f} s  {name}" for microseconds, name in found[:number])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--imports", action="store_true")
    given = parser.parse_args()
    starts = []
    for _ in range(given.repeats):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "run"
            starts.append(start(command(given.model, given.data, folder), folder, STARTED_WITH))
    best = min(starts, key=lambda laps: sum(laps.values()))
    for name, seconds in best.items():
        print(f"{name:<16}{seconds:7.2f} s")
    if given.imports:
        print(f"\nSlowest imports, each with all that it imports\n{slowest_imports()}")
    spread = [sum(laps.values()) for laps in starts]
    print(
        f"bench: startup seconds={min(spread):.2f} of {given.repeats} starts from {min(spread):.2f} to "
        f"{max(spread):.2f}, target={TARGET:g}"
    )


if __name__ == "__main__":
    main()
