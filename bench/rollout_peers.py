"""Compares our engine with vLLM and transformers' generate, in alternation, each run in its own process.

    python -m bench.rollout_peers --model DIR --data DIR          32 GSM8K prompts x 128 tokens; to their natural end
    python -m bench.rollout_peers --tiny --peers hf --rounds 1    shows in seconds that it runs

Figures are response tokens per second of wall time, after a warm-up. vLLM's Python is .venv-vllm/bin/python (`make
bench` creates it), or the one that BENCH_VLLM names; transformers runs in our own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.compare import Comparison, markdown, write_results
from bench.flops import groups_of, rollout_flops
from bench.inputs import ROOT, Inputs, guarded_main, inputs_of, parser
from bench.measure import GIB, BenchError, run_measured
from bench.ours import check
from bench.workload import write_questions

MODES = {"fixed": 128, "natural": 256}
"""Largest number of tokens of a response."""
NAMES = {
    ("fixed", "vllm"): "rollout_vs_vllm",
    ("fixed", "hf"): "rollout_vs_hf",
    ("natural", "vllm"): "rollout_natural_vs_vllm",
}
TITLES = {"builtin": "ours", "vllm": "vLLM", "vllm-compiled": "vLLM, compiled", "hf": "transformers generate"}


@dataclass(frozen=True)
class Rollout:
    """The timed generation of one process."""

    seconds: float
    cpu: float
    prompts: list[int]
    responses: list[int]
    startup: float
    peak: int

    @property
    def tokens(self) -> int:
        return sum(self.responses)

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def python_of(engine: str) -> Path:
    """The interpreter that has the engine. Raises BenchError where vLLM's is missing."""
    if not engine.startswith("vllm"):
        return Path(sys.executable)
    python = Path(os.environ.get("BENCH_VLLM") or ROOT / ".venv-vllm" / "bin" / "python")
    if not python.is_file():
        raise BenchError(
            f"vLLM's environment is missing: {python}. `make bench` makes it; or name its Python in BENCH_VLLM, or "
            "leave vLLM out by --peers hf."
        )
    return python


def generate(inputs: Inputs, data: Path, engine: str, mode: str, args: argparse.Namespace, number: int) -> Rollout:
    """One run of one engine."""
    log = inputs.out / "logs" / f"rollout-{mode}-{engine}-{number}.log"
    command = [
        str(python_of(engine)), "-m", "bench.peers.generate", "--engine", engine.removesuffix("-compiled"),
        "--model", str(inputs.model), "--data", str(data), "--prompts", str(args.prompts), "--dtype", inputs.dtype,
        "--threads", str(inputs.threads), "--response", str(args.response or MODES[mode]),
    ]  # fmt: skip
    command += ["--natural"] if mode == "natural" else []
    command += ["--compile"] if engine.endswith("-compiled") else []
    measured = run_measured(command, log=log, env={**inputs.env, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    check(measured, log)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = json.loads(next(line for line in lines if line.startswith("RESULT ")).removeprefix("RESULT "))
    return Rollout(
        told["seconds"], told["cpu_seconds"], told["prompts"], told["responses"], told["startup_seconds"], measured.peak
    )


def share(inputs: Inputs, runs: list[Rollout]) -> float:
    """The share of this machine's rate of matrix products that generation reaches."""
    return statistics.median(
        rollout_flops(inputs.shape, groups_of(run.prompts, [[size] for size in run.responses]))
        / inputs.rate
        / run.seconds
        for run in runs
    )


def row(inputs: Inputs, mode: str, engine: str, runs: list[Rollout]) -> dict[str, Any]:
    """An engine's line of the table: the median of its rounds, the spread, memory."""
    speeds = [run.speed for run in runs]
    return {
        "responses": mode,
        "engine": TITLES[engine],
        "tokens/s": statistics.median(speeds),
        "spread": f"{min(speeds):.0f} to {max(speeds):.0f}",
        "tokens a CPU second": statistics.median(run.tokens / run.cpu for run in runs),
        "mean response": statistics.fmean(size for run in runs for size in run.responses),
        "peak GiB": max(run.peak for run in runs) / GIB,
        "start-up s": statistics.median(run.startup for run in runs),
        "limit share": share(inputs, runs),
    }


def compare(
    inputs: Inputs, data: Path, mode: str, args: argparse.Namespace
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Rounds of ours and of every peer of this mode."""
    peers = [peer for peer in args.peers if (mode, peer.removesuffix("-compiled")) in NAMES]
    runs: dict[str, list[Rollout]] = {engine: [] for engine in ("builtin", *peers)}
    for number in range(1, inputs.rounds + 1):
        for engine, made in runs.items():
            made.append(generate(inputs, data, engine, mode, args, number))
            print(f"{mode}, round {number}: {TITLES[engine]} {made[-1].speed:.0f} tokens/s", flush=True)
    ours = runs["builtin"]
    lines = [
        Comparison(
            NAMES[mode, peer], "tokens/s", tuple(r.speed for r in ours), tuple(r.speed for r in runs[peer]),
            share(inputs, ours),
        )
        for peer in peers if (mode, peer) in NAMES
    ]  # fmt: skip
    return lines, [row(inputs, mode, engine, made) for engine, made in runs.items()]


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--peers", nargs="+", choices=["vllm", "vllm-compiled", "hf"], default=["vllm", "hf"])
    options.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--response", type=int, help="most tokens of a response; default 128 fixed, 256 natural")
    args = options.parse_args()
    inputs = inputs_of(args)
    for engine in args.peers:
        python_of(engine)  # a missing engine is reported before anything runs
    data = write_questions(inputs.out / "work" / "rollout.jsonl", inputs.questions(args.prompts))
    lines, table = [], []
    for mode in args.modes:
        more, rows = compare(inputs, data, mode, args)
        lines += more
        table += rows
    about = {"prompts": args.prompts, "rounds": inputs.rounds, "dtype": inputs.dtype}
    write_results(
        inputs.out, "rollout", machine=inputs.machine(), about=about, comparisons=lines, tables={"rollout": table}
    )
    print(markdown(table))
    for line in lines:
        print(line.line())


if __name__ == "__main__":
    guarded_main(main)
