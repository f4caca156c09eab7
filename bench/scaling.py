"""Measures whether the time of a step is linear in its tokens and its memory constant.

    python -m bench.scaling --model DIR --data DIR      batch x1 x2 x4 x8, then prompt and response lengths
    python -m bench.scaling --tiny                      shows in a minute that it runs

It runs PPO steps of the real trainer with micro-batches of at most --budget tokens, each in its own process; all
prompts of a run have exactly the same length. Memory is models, Adam and one micro-batch: it should not grow with the
batch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from bench.compare import markdown, write_results
from bench.flops import Group
from bench.inputs import Inputs, guarded_main, inputs_of, parser, write_prompts
from bench.measure import GIB
from bench.ours import Run, operations, overrides, ppo, run_ours
from bench.workload import prompt_ids, stretch

FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Point:
    """The size of one run."""

    what: str
    prompts: int
    prompt: int
    """Tokens of every prompt."""
    response: int

    @property
    def tokens(self) -> int:
        return self.prompts * (self.prompt + self.response)


def points(args: argparse.Namespace) -> list[Point]:
    """Batches first, then responses, then prompts; the middle one of each is the same run."""
    base, prompt, response = args.base, args.prompt, args.response
    found = [Point("batch", base * factor, prompt, response) for factor in FACTORS]
    found += [Point("response", 2 * base, prompt, response * factor // 2) for factor in (1, 2, 4)]
    found += [Point("prompt", 2 * base, prompt * factor // 2, response) for factor in (2, 3, 4)]
    return [point for point in found if point.what in args.grow]


def run_point(inputs: Inputs, args: argparse.Namespace, point: Point, tokenizer: Any) -> Run:
    questions = sorted(inputs.questions(64), key=lambda row: len(prompt_ids(tokenizer, row["question"])))
    rows = [
        {**row, "question": stretch(tokenizer, row["question"], point.prompt)}
        for row in (questions[i % 8] for i in range(point.prompts))
    ]
    name = f"scaling-{point.prompts}x{point.prompt}+{point.response}"
    folder = inputs.out / "work" / name
    data = write_prompts(inputs.out / "work" / f"{name}.parquet", rows)
    keys = overrides(
        inputs, data, folder, prompts=point.prompts, group=1, response=point.response, prompt_limit=point.prompt,
        steps=inputs.steps + 1, budget=args.budget,
    )  # fmt: skip
    return run_ours(inputs, [*keys, *ppo("full")], folder, inputs.out / "logs" / f"{name}.log")


def row(inputs: Inputs, point: Point, run: Run) -> dict[str, Any]:
    groups = [Group(point.prompt, (point.response,))] * point.prompts
    needed = sum(operations(inputs, run, groups, critic="full", lora=False).values())
    cpu = sorted(step.cpu for step in run.steps)[len(run.steps) // 2]
    return {
        "grows": point.what,
        "prompts": point.prompts,
        "prompt + response": f"{point.prompt} + {point.response}",
        "tokens": point.tokens,
        "s a step": run.seconds,
        "CPU s a step": cpu,
        "ms a token": 1e3 * run.seconds / point.tokens,
        "limit share": needed / inputs.rate / run.seconds,
        "peak GiB": run.peak / GIB,
    }


def verdict(rows: list[dict[str, Any]]) -> str:
    """How far the times of the batches are from linear, and how much memory grew."""
    batches = [row for row in rows if row["grows"] == "batch"]
    costs = [row["ms a token"] for row in batches]
    peaks = [row["peak GiB"] for row in batches]
    return (
        f"scaling: batch x{FACTORS[-1]} costs {costs[-1] / costs[0] - 1:+.1%} a token against x1, the slowest batch "
        f"{max(costs) / min(costs) - 1:.1%} more than the fastest; peak memory {peaks[-1] / peaks[1] - 1:+.1%} "
        f"from x2 to x{FACTORS[-1]}"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--base", type=int, default=2, help="prompts of the smallest batch")
    options.add_argument("--prompt", type=int, default=128, help="tokens")
    options.add_argument("--response", type=int, default=128, help="tokens")
    options.add_argument("--budget", type=int, default=1024, help="tokens of a micro-batch at most")
    options.add_argument("--grow", nargs="+", choices=["batch", "response", "prompt"],
                         default=["batch", "response", "prompt"])  # fmt: skip
    args = options.parse_args()
    inputs = inputs_of(args)
    from steepest.models.load import load_tokenizer

    tokenizer = load_tokenizer(inputs.model)
    runs: dict[tuple[int, int, int], Run] = {}
    rows = []
    for point in points(args):
        size = (point.prompts, point.prompt, point.response)
        if size not in runs:
            runs[size] = run_point(inputs, args, point, tokenizer)
        rows.append(row(inputs, point, runs[size]))
        print(f"{point.what}: {point.tokens} tokens, {runs[size].seconds:.2f} s a step", flush=True)
    about = {"micro-batch": f"{args.budget} tokens", "steps": inputs.steps, "dtype": inputs.dtype}
    said = verdict(rows) if "batch" in args.grow else "-"
    write_results(
        inputs.out, "scaling", machine=inputs.machine(), about={**about, "result": said}, tables={"scaling": rows}
    )
    print(markdown(rows))
    print(said)


if __name__ == "__main__":
    guarded_main(main)
