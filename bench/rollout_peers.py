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
    log = inputs.out / "logs" / f"rollout-{mode}-{engine}-{inputs.dtype}-{number}.log"
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


def row(inputs: Inputs, mode: str, title: str, runs: list[Rollout]) -> dict[str, Any]:
    """An engine's line of the table: the median of its rounds, the spread, memory."""
    found = speeds(runs)
    return {
        "responses": mode,
        "engine": title,
        "tokens/s": statistics.median(found),
        "spread": f"{min(found):.0f} to {max(found):.0f}",
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
    sides = [*(("builtin", one) for one in inputs.variants), *((peer, inputs) for peer in peers)]
    runs: dict[tuple[str, Inputs], list[Rollout]] = {side: [] for side in sides}
    for number in range(1, inputs.rounds + 1):
        for (engine, one), made in runs.items():
            made.append(generate(one, data, engine, mode, args, number))
            title = inputs.title(TITLES[engine], one)
            print(f"{mode}, round {number}: {title} {made[-1].speed:.0f} tokens/s", flush=True)
    others = {NAMES[mode, peer]: (peer, inputs) for peer in peers if (mode, peer) in NAMES}
    others |= {f"rollout_{mode}_bf16_vs_float32": ("builtin", one) for one in inputs.variants[1:]}
    ours = runs["builtin", inputs]
    lines = [
        Comparison(name, "tokens/s", speeds(ours), speeds(runs[side]), share(inputs, ours))
        for name, side in others.items()
    ]
    titles = [inputs.title(TITLES[engine], one) for engine, one in runs]
    made_rows = zip(titles, runs.items(), strict=True)
    return lines, [row(one, mode, title, made) for title, ((_, one), made) in made_rows]


def speeds(runs: list[Rollout]) -> tuple[float, ...]:
    return tuple(run.speed for run in runs)


def main() -> None:
    options = parser(__doc__, rounds=3)
    options.add_argument("--peers", nargs="+", choices=["vllm", "vllm-compiled", "hf"], default=["vllm", "hf"])
    options.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    options.add_argument("--prompts", type=int, default=32)
    options.add_argument("--response", type=int, help="most tokens of a response; default 128 fixed, 256 natural")
    args = options.parse_args()
    inputs = inputs_of(args)
    print(f"dtype: {inputs.why}", flush=True)
    for engine in args.peers:
        python_of(engine)  # a missing engine is reported before anything runs
    data = write_questions(inputs.out / "work" / "rollout.jsonl", inputs.questions(args.prompts))
    lines, table = [], []
    for mode in args.modes:
        more, rows = compare(inputs, data, mode, args)
        lines += more
        table += rows
    about = {"prompts": args.prompts, "rounds": inputs.rounds, "dtype": f"{inputs.dtype}; {inputs.why}"}
    write_results(
        inputs.out, "rollout", machine=inputs.machine(), about=about, comparisons=lines, tables={"rollout": table}
    )
    print(markdown(table))
    for line in lines:
        print(line.line())


if __name__ == "__main__":
    guarded_main(main)
