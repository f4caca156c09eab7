"""Runs the named benchmarks one after the other; `make bench` calls it.

    python -m bench.run rollout ppo grpo --model DIR --data DIR
    python -m bench.run limits memory overhead threads               these need no model and no data
    python -m bench.run --tiny --peers hf                            small sizes: shows that everything runs

Results are written to --out, one JSON file each; `python -m bench.table OUT docs/performance.md` puts them into the
page. A benchmark that fails does not stop the others; the exit code is then 1. The comparisons' lines are repeated at
the end.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from bench import STARTED_WITH, limits
from bench.compare import write_results
from bench.inputs import ROOT, Inputs, guarded_main, inputs_of, parser, write_prompts
from bench.measure import BenchError
from bench.rollout_peers import python_of

MODULES = {
    "limits": ["bench.limits"],
    "rollout": ["bench.rollout_peers"],
    "ppo": ["bench.steps", "ppo"],
    "grpo": ["bench.steps", "grpo"],
    "scaling": ["bench.scaling"],
    "memory": ["bench.memory"],
    "startup": ["bench.startup"],
    "overhead": ["bench.overhead"],
    "threads": ["bench.threads"],
    "long_tail": ["bench.long_tail"],
}
DEFAULT = ("rollout", "ppo", "grpo", "memory", "startup")
"""About an hour on two cores with SmolLM2-135M, estimated from its parts."""
_PRINT_ONLY = ("startup", "overhead", "threads")
"""Benchmarks whose output is stored as it is."""
_NEED_MODEL = ("rollout", "ppo", "grpo", "scaling", "startup", "long_tail")
_TINY = {
    "limits": ["--seconds", "0.02"],
    "rollout": ["--rounds", "1", "--response", "16", "--modes", "fixed"],
    "ppo": ["--steps", "1", "--response", "16", "--prompts", "4", "--kinds", "full"],
    "grpo": ["--steps", "1", "--response", "16"],
    "scaling": ["--steps", "1", "--response", "16", "--prompt", "64", "--budget", "256", "--grow", "batch"],
    "memory": ["--kinds", "full"],
    "startup": ["--repeats", "1"],
    "overhead": ["--steps", "1"],
    "threads": ["--steps", "1", "--busy", "0"],
}
"""The sizes of --tiny."""


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    known = f"of {', '.join(MODULES)}; default: {' '.join(DEFAULT)}"
    options.add_argument("names", nargs="*", metavar="NAME", help=known)
    options.add_argument("--peers", nargs="+", default=["vllm", "hf"], help="rollout: vllm, vllm-compiled, hf")
    options.add_argument("--check", action="store_true", help="only say what is missing")
    options.set_defaults(rounds=None, steps=None)
    args = options.parse_args()
    args.names = args.names or list(DEFAULT)
    unknown = [name for name in args.names if name not in MODULES]
    if unknown:
        raise BenchError(f"no benchmark {', '.join(map(repr, unknown))}; there are {', '.join(MODULES)}.")
    return args


def checked(args: argparse.Namespace) -> Inputs | None:
    """Report everything that is missing before anything runs. Raises BenchError. None: no model is needed."""
    if "rollout" in args.names and not args.check:
        for peer in args.peers:
            python_of(peer)
    if any(name in _NEED_MODEL for name in args.names):
        return inputs_of(argparse.Namespace(**{**vars(args), "rounds": 1, "steps": 1}))
    return None


def command(name: str, args: argparse.Namespace, inputs: Inputs | None) -> list[str]:
    """The command of one benchmark. Rounds and steps have its own defaults unless they are given."""
    made = [sys.executable, "-m", *MODULES[name], *(_TINY.get(name, []) if args.tiny else [])]
    if name == "startup":
        assert inputs is not None
        folder = inputs.out / "work" / "startup"
        for split in ("train", "test"):
            write_prompts(folder / f"{split}.parquet", inputs.questions(8))
        return [*made, "--model", str(inputs.model), "--data", str(folder)]
    if name in _PRINT_ONLY:
        return [*made, "--folder", str(args.out.resolve() / "work" / "overhead")]
    made += ["--threads", str(args.threads), "--out", str(args.out)]
    if name == "limits":
        return [*made, *(["--model", args.model] if args.model else [])]
    made += ["--dtype", args.dtype, *(["--tiny"] if args.tiny else [])]
    if name in _NEED_MODEL and not args.tiny:
        made += ["--model", args.model, "--data", args.data]
    for option in ("rounds", "steps"):
        if (value := getattr(args, option)) is not None:
            made += [f"--{option}", str(value)]
    return made + (["--peers", *args.peers] if name == "rollout" else [])


def run(name: str, args: argparse.Namespace, inputs: Inputs | None) -> tuple[int, list[str]]:
    """Run one benchmark and print its output; returns its exit code and its lines."""
    said: list[str] = []
    words = command(name, args, inputs)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=STARTED_WITH) as child:
        assert child.stdout is not None
        for text in child.stdout:
            print(text, end="", flush=True)
            said.append(text.rstrip())
    if name in _PRINT_ONLY and not child.returncode:
        write_results(args.out, name, machine=limits.machine(args.threads), about={}, text=kept(name, said))
    return child.returncode, [line for line in said if line.startswith("bench: ")]


def kept(name: str, said: list[str]) -> str:
    """The part of the output for the page: a table as it is; for `overhead` the part after the trainer's own lines."""
    start = next((i for i, line in enumerate(said) if line.startswith("Mean of ")), 0) if name == "overhead" else 0
    return "\n".join(said[start:]).strip()


def main() -> None:
    args = arguments()
    inputs = checked(args)
    if args.check:
        return
    failed, lines = [], []
    for name in args.names:
        began = time.perf_counter()
        print(f"== {name}", flush=True)
        code, more = run(name, args, inputs)
        lines += more
        if code:
            failed.append(name)
        print(f"== {name}: {time.perf_counter() - began:.0f} s", flush=True)
    print("\n".join(lines))
    if failed:
        print(f"bench: failed: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    guarded_main(main)
