"""One command that shows on a card what runs, how fast, and in how much memory: `scripts/card_check`.

    scripts/card_check --pack                      where there is a network: fetch what a bare machine lacks
    scripts/card_check --data train.jsonl          on the card, without a network, in less than six minutes
    scripts/card_check --device cpu --tiny         a dry run on the CPU

A bare machine has torch, transformers, peft, typer and rich. The wheels of --pack lie in `card_wheels` and travel with
the working tree. Model and tokenizer are made on the machine (Qwen2.5-0.5B's shape, random weights); the rows are
GSM8K's, or made up without --data. A part that takes too long is ended, and its finished steps count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import SPINNING
from bench.compare import markdown
from bench.measure import BenchError, Measured, run_measured

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "card_wheels"
NEEDED = ("hydra", "omegaconf", "antlr4", "pytest", "pluggy", "iniconfig")
"""Modules that a bare machine lacks. All are pure Python, so they run where they are unpacked."""
PACKED = ("hydra-core>=1.3.2", "pytest>=8")
"""The packages that have them, or need them: pip chooses versions that go together."""
SECONDS = 340.0
"""Seconds of the whole check."""
TESTS_AT_LEAST = 100.0
"""Seconds that are left to the tests."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the steps. The reference command has 256 prompts a step in mini-batches of 64."""

    prompts: int = 256
    group: int = 4
    mini: int = 64
    response: int = 256
    steps: int = 3


TINY = Sizes(prompts=8, group=2, mini=4, response=6, steps=3)


@dataclass
class Check:
    """Where the check runs and writes, and when it has to end."""

    device: str
    out: Path
    sizes: Sizes
    environment: dict[str, str | None]
    deadline: float

    def run(self, name: str, command: Sequence[str], *, reserve: float = 0.0) -> Measured:
        """A command in the time that is left, less `reserve`."""
        left = max(1.0, self.deadline - time.monotonic() - reserve)
        log = self.out / "logs" / f"{name}.log"
        return run_measured([sys.executable, *command], log=log, env=self.environment, cwd=ROOT, timeout=left)

    def log(self, name: str) -> str:
        return (self.out / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")


def pack(folder: Path) -> None:
    """Fetch the wheels into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder), *PACKED]
    if subprocess.run(pip).returncode:
        raise BenchError("pip could not fetch the wheels; its message is above.")
    for wheel in folder.glob("*.whl"):
        if not wheel.name.endswith("-none-any.whl"):  # compiled for this Python; transformers brings it along
            wheel.unlink()
    size = sum(path.stat().st_size for path in folder.glob("*.whl")) / 2**20
    print(f"{len(list(folder.glob('*.whl')))} wheels, {size:.1f} MiB, in {folder}: take them along with the tree.")


def unpacked(wheels: Path, target: Path, missing: Sequence[str]) -> Path:
    """`target` with the content of the wheels. Raises BenchError where one of the `missing` modules has none."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(target)
    absent = [name for name in missing if not any((target / name).with_suffix(end).exists() for end in ("", ".py"))]
    if absent:
        raise BenchError(
            f"not installed here: {', '.join(absent)}, and {wheels} has no wheel of it. Run scripts/card_check --pack "
            "on a machine with a network, and bring that folder along."
        )
    return target


def environment_for(wheels: Path, target: Path) -> dict[str, str | None]:
    """The variables of the commands: modules that this Python lacks come from the wheels, and no hub is asked."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    found = [str(ROOT), *([str(unpacked(wheels, target, missing))] if missing else [])]
    return {**dict.fromkeys(SPINNING), "PYTHONPATH": os.pathsep.join(found), "HF_HUB_OFFLINE": "1"}


def keys(check: Check, name: str, *more: str) -> list[str]:
    """The trainer's command with what all runs have in common."""
    model, rows, sizes = check.out / "inputs" / "model", check.out / "inputs" / "rows.jsonl", check.sizes
    roles = "actor_rollout_ref"
    return [
        "-m", "steepest.trainer.main_ppo", f"data.train_files={rows}", f"data.val_files={rows}",
        "data.max_prompt_length=512", "data.filter_overlong_prompts=True", f"data.max_response_length={sizes.response}",
        f"{roles}.model.path={model}", f"{roles}.rollout.name=builtin", f"{roles}.rollout.ignore_eos=True",
        f"{roles}.actor.fsdp_config.dtype=bfloat16", f"{roles}.actor.ppo_max_token_len_per_gpu=16384",
        f"custom_reward_function.path={ROOT / 'bench' / 'reward.py'}", "custom_reward_function.name=digits",
        f"trainer.device={check.device}", "trainer.logger=jsonl", "trainer.val_before_train=False",
        "trainer.test_freq=-1", f"trainer.default_local_dir={check.out / name}", *more,
    ]  # fmt: skip


def ppo(check: Check) -> list[str]:
    """The reference command's step, with shorter responses."""
    sizes = check.sizes
    return keys(
        check, "ppo", f"data.train_batch_size={sizes.prompts}", "algorithm.use_kl_in_reward=True",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={sizes.mini}", f"trainer.total_training_steps={sizes.steps}",
        "trainer.save_freq=0",
    )  # fmt: skip


def grpo(check: Check, steps: int) -> list[str]:
    """As many rows a step, in groups. The last step is saved, so that a longer run resumes."""
    sizes = check.sizes
    return keys(
        check, "grpo", "algorithm.adv_estimator=grpo", f"actor_rollout_ref.rollout.n={sizes.group}",
        f"data.train_batch_size={sizes.prompts // sizes.group}", "actor_rollout_ref.actor.use_kl_loss=True",
        "algorithm.use_kl_in_reward=False", f"actor_rollout_ref.actor.ppo_mini_batch_size={sizes.mini // sizes.group}",
        f"trainer.total_training_steps={steps}",
    )  # fmt: skip


def steps_row(check: Check, part: str, run: Measured, folder: str, *, after: int = 0) -> dict[str, Any]:
    """What a run has logged after step `after`. Its first step, which compiles and allocates, counts only where it is
    the only one."""
    file = check.out / folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    rows = [row for row in map(json.loads, lines) if row.get("training/global_step", 0) > after]
    row: dict[str, Any] = {"part": part, "result": _result(run, f"{len(rows)} step(s)", check.log(part))}
    row["s in all"] = run.seconds
    measured = rows[1:] or rows
    for title, name in (
        ("s a step", "perf/time_per_step"), ("generated tokens/s", "perf/throughput/gen"),
        ("trained tokens/s", "perf/throughput/update"), ("share of the limit", "perf/mfu"),
    ):  # fmt: skip
        found = [values[name] for values in measured if name in values]
        row[title] = statistics.median(found) if found else None
    row["peak GiB"] = max((values["perf/max_memory_gb"] for values in rows), default=None)
    return row


def _result(run: Measured, good: str, log: str) -> str:
    if run.timed_out:
        return f"out of time; {good}"
    if run.returncode:
        said = [line for line in log.splitlines() if line.strip()]
        return f"FAILED: {said[-1][:200] if said else f'code {run.returncode}'}"
    return f"ok; {good}"


def tests_row(check: Check) -> dict[str, Any]:
    """`tests/gpu` in a process of its own."""
    run = check.run("tests", ["-m", "pytest", "tests/gpu", "-v", "--tb=short", "-p", "no:cacheprovider"])
    log = check.log("tests")
    counts = {word: len(re.findall(rf"^tests/.* {word}\b", log, re.MULTILINE)) for word in ("PASSED", "SKIPPED")}
    failed = sorted(set(re.findall(r"^FAILED \S+::(\S+)", log, re.MULTILINE)))
    said = f"{counts['PASSED']} passed, {counts['SKIPPED']} skipped"
    if not failed and not counts["PASSED"] and check.device == "cuda":
        failed = ["none of them ran"]
    result = f"FAILED: {', '.join(failed)}; {said}" if failed else _result(run, said, log)
    return {"part": "tests/gpu", "result": result, "s in all": run.seconds}


def checks(check: Check, data: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything in turn: facts about the device, and the rows of the table."""
    words = ["-m", "bench.card_inputs", "--device", check.device, "--out", str(check.out / "inputs")]
    words += ["--data", str(data)] if data is not None else []
    words += ["--tiny"] if check.sizes is TINY else []
    made = check.run("inputs", words)
    if made.returncode or made.timed_out:
        raise BenchError(f"the inputs could not be made:\n{check.log('inputs')[-2000:]}")
    facts = json.loads(check.log("inputs").splitlines()[-1])
    rows = [{"part": "inputs", "result": "ok; model, tokenizer, rows", "s in all": made.seconds}]
    last = check.sizes.steps
    for part, command, folder, after in (
        ("ppo", ppo(check), "ppo", 0),
        ("grpo", grpo(check, last - 1), "grpo", 0),
        ("resume", grpo(check, last), "grpo", last - 1),
    ):
        run = check.run(part, command, reserve=TESTS_AT_LEAST)
        row = steps_row(check, part, run, folder, after=after)
        if part == "resume" and f"resuming from step {after}" not in check.log(part):
            row["result"] = f"FAILED: it did not resume; {row['result']}"
        rows.append(row)
        print(f"{part}: {row['result']}", flush=True)
    rows.append(tests_row(check))
    return facts, rows


def told(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], sizes: Sizes) -> str:
    """The table, for a reader and for docs/performance.md."""
    about = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                      for name, value in facts.items())  # fmt: skip
    return (
        f"{about}\n\n{markdown(rows)}\n\n{sizes.prompts} responses of {sizes.response} tokens a step, bfloat16, the "
        "built-in engine; the first step of a run is not in the figures of its steps, unless it is the only one."
    )


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part that runs is ended too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", action="store_true", help="fetch the wheels and end")
    parser.add_argument("--wheels", type=Path, default=WHEELS)
    parser.add_argument("--device", default="cuda", help="trainer.device")
    parser.add_argument("--data", type=Path, help="GSM8K: train.jsonl, or a folder with it; default: made-up problems")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "card_check", help="logs and run folders")
    parser.add_argument("--json", type=Path, help="also write facts and rows into this file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which what still runs is ended")
    parser.add_argument("--tiny", action="store_true", help="small sizes: shows that it runs")
    args = parser.parse_args()
    if args.pack:
        pack(args.wheels)
        return 0
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    check = Check(
        args.device, out, TINY if args.tiny else Sizes(), environment_for(args.wheels, out / "packages"),
        time.monotonic() + args.seconds,
    )  # fmt: skip
    facts, rows = checks(check, args.data)
    print(told(facts, rows, check.sizes))
    if args.json is not None:
        args.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["result"].startswith("ok;") for row in rows) else 1
