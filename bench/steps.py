"""Compares one training step of ours with TRL's, in alternation, on the same prompts and lengths.

    python -m bench.steps ppo  --model DIR --data DIR      W1: 16 prompts x 1 response, actor, critic, reference
    python -m bench.steps grpo --model DIR --data DIR      W2: 4 prompts x 4 responses, actor, reference
    python -m bench.steps ppo --tiny --rounds 1            shows in a minute that everything runs

Every response has exactly --response tokens, every step has the same prompts and one update. Ours keeps weights and
Adam in float32; TRL holds both in --dtype. TRL 1.12.0 (the last with PPO) and 1.16.0 run in an environment of their
own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.compare import Comparison, markdown, write_results
from bench.flops import Critic, Group
from bench.inputs import ROOT, Inputs, guarded_main, inputs_of, parser, write_prompts
from bench.measure import run_measured
from bench.ours import GRPO, MICRO_TOKENS, Kind, Run, check, make_run, operations, overrides, ppo, run_ours
from bench.peers.clock import read_records
from bench.peers.environment import TRL, TRL_PPO, peers
from bench.workload import prompt_ids, write_questions


@dataclass(frozen=True)
class Workload:
    """Prompts and lengths of a step."""

    algo: str
    prompts: int
    group: int
    response: int
    kinds: tuple[Kind, ...] = ("full",)
    lengths: tuple[int, ...] = ()
    """The number of tokens of each prompt."""
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    @property
    def groups(self) -> list[Group]:
        return [Group(length, (self.response,) * self.group) for length in self.lengths]


NAMES = {
    ("ppo", "full"): "ppo_w1_vs_trl",
    ("ppo", "adapter"): "ppo_w1_lora_vs_trl",
    ("ppo", "head"): "ppo_w1_head_vs_trl",
    ("grpo", "full"): "grpo_w2_vs_trl",
}
TITLES = {
    "full": "ours", "adapter": "ours, LoRA, critic an adapter", "head": "ours, LoRA, critic a value head",
}  # fmt: skip


def prepare(inputs: Inputs, args: argparse.Namespace) -> Workload:
    """The prompts as files for both sides, and their lengths."""
    from steepest.models.load import load_tokenizer

    prompts, group = (16, 1) if args.algo == "ppo" else (4, 4)
    rows = inputs.questions(args.prompts or prompts)
    tokenizer = load_tokenizer(inputs.model)
    folder = inputs.out / "work"
    return Workload(
        algo=args.algo,
        prompts=len(rows),
        group=group,
        response=args.response,
        kinds=tuple(args.kinds) if args.algo == "ppo" else ("full",),
        lengths=tuple(len(prompt_ids(tokenizer, row["question"])) for row in rows),
        files={
            "ours": write_prompts(folder / f"{args.algo}.parquet", rows),
            "peer": write_questions(folder / f"{args.algo}.jsonl", rows),
        },
    )


def run_kind(inputs: Inputs, work: Workload, kind: Kind, name: str) -> Run:
    folder, prompt_limit = inputs.out / "work" / name, max(work.lengths)
    keys = overrides(
        inputs, work.files["ours"], folder, prompts=work.prompts, group=work.group, response=work.response,
        prompt_limit=prompt_limit, steps=inputs.steps + 1,
        budget=max(MICRO_TOKENS[kind], prompt_limit + work.response),
    )  # fmt: skip
    keys += ppo(kind) if work.algo == "ppo" else GRPO
    return run_ours(inputs, keys, folder, inputs.out / "logs" / f"{name}.log")


def run_trl(inputs: Inputs, work: Workload, name: str) -> Run:
    made = peers()
    out, log = inputs.out / "work" / f"{name}.jsonl", inputs.out / "logs" / f"{name}.log"
    command = [
        str(made.python), "-m", f"bench.peers.trl_{work.algo}", "--model", str(inputs.model),
        "--data", str(work.files["peer"]), "--out", str(out), "--dtype", inputs.dtype, "--prompts", str(work.prompts),
        "--response", str(work.response), "--steps", str(inputs.steps + 1),
    ]  # fmt: skip
    command += ["--group", str(work.group)] if work.algo == "grpo" else []
    env = {**inputs.env, "PYTHONPATH": made.path(ppo=work.algo == "ppo")}
    measured = run_measured(command, log=log, env=env, cwd=ROOT)
    check(measured, log)
    return make_run(read_records(out)[1], measured, log)


Ours = dict[tuple[Kind, Inputs], list[Run]]
"""The runs of each kind in each dtype."""


def compare(inputs: Inputs, work: Workload) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """Run rounds of every kind and dtype of ours and of the peer; returns the comparisons and the table."""
    ours: Ours = {(kind, one): [] for kind in work.kinds for one in inputs.variants}
    theirs: list[Run] = []
    for number in range(1, inputs.rounds + 1):
        for (kind, one), runs in ours.items():
            runs.append(run_kind(one, work, kind, f"{work.algo}-{kind}-{one.dtype}-{number}"))
            title = inputs.title(TITLES[kind], one)
            print(f"round {number}: {title} {runs[-1].seconds:.2f} s a step", flush=True)
        theirs.append(run_trl(inputs, work, f"{work.algo}-trl-{number}"))
        print(f"round {number}: TRL {theirs[-1].seconds:.2f} s a step", flush=True)
    return results(inputs, work, ours, theirs)


def results(
    inputs: Inputs, work: Workload, ours: Ours, theirs: Sequence[Run]
) -> tuple[list[Comparison], list[dict[str, Any]]]:
    """The comparisons with the peer and with ours in float32, and the table."""
    version = TRL_PPO if work.algo == "ppo" else TRL
    tokens = work.rows * work.response
    table = [{**joined(runs).row(inputs.title(TITLES[kind], one), tokens), "limit share": share(one, work, kind, runs)}
             for (kind, one), runs in ours.items()]  # fmt: skip
    table.append({**joined(theirs).row(f"TRL {version}", tokens), "limit share": None})
    lines = []
    for kind in work.kinds:
        name, runs = NAMES[work.algo, kind], ours[kind, inputs]
        spent, part = seconds(runs), share(inputs, work, kind, runs)
        lines.append(Comparison(name, "s", spent, seconds(theirs), part))
        lines += [
            Comparison(name.replace("_vs_trl", "_bf16_vs_float32"), "s", spent, seconds(ours[kind, one]), part)
            for one in inputs.variants[1:]
        ]
    return lines, table


def joined(runs: Sequence[Run]) -> Run:
    """All measured steps as one run, with the highest peak."""
    return Run(tuple(step for run in runs for step in run.steps), max(run.peak for run in runs), runs[-1].log)


def seconds(runs: Sequence[Run]) -> tuple[float, ...]:
    return tuple(step.seconds for run in runs for step in run.steps)


def share(inputs: Inputs, work: Workload, kind: Kind, runs: Sequence[Run]) -> float:
    """The share of this machine's rate of matrix products that the step reaches."""
    critic: Critic = "none" if work.algo == "grpo" else kind
    run = joined(runs)
    needed = operations(inputs, run, work.groups, critic=critic, lora=kind != "full")
    return sum(needed.values()) / inputs.rate / run.seconds


def main() -> None:
    options = parser(__doc__)
    options.add_argument("algo", choices=["ppo", "grpo"])
    options.add_argument("--response", type=int, default=128, help="tokens of every response")
    options.add_argument("--prompts", type=int, help="prompts a step; default 16 (ppo), 4 (grpo)")
    options.add_argument("--kinds", nargs="+", choices=["full", "adapter", "head"], default=["full", "adapter", "head"])
    args = options.parse_args()
    inputs = inputs_of(args)
    print(f"dtype: {inputs.why}", flush=True)
    work = prepare(inputs, args)
    lines, table = compare(inputs, work)
    about = {
        "prompts": work.prompts, "responses a prompt": work.group, "response tokens": work.response,
        "prompt tokens": f"{statistics.mean(work.lengths):.0f} mean, {max(work.lengths)} longest",
        "rounds": inputs.rounds, "steps a round": inputs.steps,
        "dtype": f"{inputs.dtype}; ours over float32 weights and Adam, TRL's weights and Adam in {inputs.dtype}; "
        f"{inputs.why}",
    }  # fmt: skip
    write_results(
        inputs.out, args.algo, machine=inputs.machine(), about=about, comparisons=lines, tables={args.algo: table}
    )
    print(markdown(table))
    for line in lines:
        print(line.line())


if __name__ == "__main__":
    guarded_main(main)
