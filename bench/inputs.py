"""The inputs of every benchmark: a model, GSM8K rows, threads, a dtype, a folder for results."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench import SPINNING, limits
from bench.compare import write_results
from bench.flops import Shape
from bench.measure import BenchError
from bench.workload import INSTRUCTION, gold, read_questions, write_questions

ROOT = Path(__file__).parents[1]
_QUIET = 0.05
"""Share of the cores that others may use while limits are measured."""
REMEDY = (
    "make bench MODEL=DIR DATA=DIR. A model: hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir DIR; "
    "GSM8K: steepest prepare gsm8k --local-save-dir DIR (or its own train.jsonl)."
)


@dataclass(frozen=True)
class Inputs:
    """The checked inputs of a benchmark."""

    model: Path
    data: Path
    out: Path
    threads: int
    dtype: str
    """float32 or bfloat16, never auto: that of ours and of the peer."""
    tiny: bool
    rounds: int
    steps: int
    both: bool = False
    """Whether ours is measured in float32 too, next to bfloat16."""
    why: str = ""
    """The dtypes that are measured, and why no others."""

    @property
    def variants(self) -> tuple[Inputs, ...]:
        """Those of each of our runs: first the one that the peer is compared with."""
        return (self, replace(self, dtype="float32", both=False)) if self.both else (self,)

    def title(self, name: str, one: Inputs) -> str:
        """The name of a run of ours in a table, with its dtype where there are two."""
        return f"{name}, {one.dtype}" if self.both else name

    @property
    def env(self) -> dict[str, str]:
        """The environment of a peer, and of our rollout engine without the trainer."""
        threads = str(self.threads)
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **SPINNING, **quiet}

    @property
    def own_env(self) -> dict[str, str | None]:
        """The environment of our trainer: as `env`, but it sets waiting threads up itself. None: the variable is
        unset."""
        return {**self.env, **dict.fromkeys(SPINNING)}

    @cached_property
    def shape(self) -> Shape:
        return Shape.of(self.model)

    @cached_property
    def limits(self) -> dict[str, float]:
        """This machine's rates at the model's shapes, stored in the results folder.

        Rates measured while others used the cores are measured again by the next benchmark; the higher rates are kept.
        """
        rates = _kept(self.out / "limits.json", self)
        if rates is None or rates["others_share"] > _QUIET:
            dtypes = ("float32", "bfloat16")
            new = limits.measure(self.shape, self.threads, seconds=0.02 if self.tiny else 0.25, dtypes=dtypes)
            rates = merged(rates, new) if rates else new
            about = {**limits.machine(self.threads), "model": self.model.name, "limits": rates}
            write_results(self.out, "limits", machine=about, about={}, tables={"limits": limits.rows_of(rates)})
        return rates

    @property
    def rate(self) -> float:
        """FLOP/s of products with many rows in the run's dtype. Shares in the results are shares of this limit."""
        return self.limits[f"training_{self.dtype}"] * 1e9

    def machine(self) -> dict[str, Any]:
        return {**limits.machine(self.threads), "model": self.model.name, "dtype": self.dtype, "limits": self.limits}

    def questions(self, number: int) -> list[dict[str, str]]:
        return read_questions(self.data, number)


def merged(old: dict[str, float], new: dict[str, float]) -> dict[str, float]:
    """The higher value of each rate, and the lower value of the disturbance."""
    return {name: (min if name == "others_share" else max)(value, old[name]) for name, value in new.items()}


def _kept(file: Path, inputs: Inputs) -> dict[str, float] | None:
    """The rates in `file`, if they are those of this model and number of threads, measured today."""
    if not file.is_file():
        return None
    about = json.loads(file.read_text(encoding="utf-8"))["machine"]
    now = {**limits.machine(inputs.threads), "model": inputs.model.name}
    rates: dict[str, float] = about["limits"]
    return rates if all(about.get(key) == value for key, value in now.items()) else None


def parser(about: str | None, *, rounds: int = 1, steps: int = 2) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="", help="Hugging Face model folder with a chat template")
    made.add_argument("--data", default="", help="GSM8K: train.jsonl, train.parquet, or a folder with one of them")
    made.add_argument("--tiny", action="store_true", help="a random model and made-up problems: shows that it runs")
    made.add_argument("--threads", type=int, default=os.cpu_count())
    made.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 for "
                      "ours and the peer, and float32 for ours too, where there is bf16; else float32")  # fmt: skip
    made.add_argument("--rounds", type=int, default=rounds, help="ours and the peer in alternation, this often")
    made.add_argument("--steps", type=int, default=steps, help="measured steps of a training run; one more goes before")
    made.add_argument("--out", type=Path, default=Path("outputs/bench"), help="folder for results and logs")
    return made


def inputs_of(args: argparse.Namespace) -> Inputs:
    """Check the arguments; raises BenchError with the remedy."""
    out = args.out.resolve()
    if args.tiny:
        model, data = tiny_inputs(out / "tiny")
    else:
        missing = [name.upper() for name in ("model", "data") if not getattr(args, name)]
        if missing:
            raise BenchError(
                f"{' and '.join(missing)} not given: a benchmark needs a real model and real problems. {REMEDY}"
            )
        model, data = Path(args.model).expanduser().resolve(), Path(args.data).expanduser().resolve()
        if not (model / "config.json").is_file():
            raise BenchError(f"no model at {model}: config.json is missing. {REMEDY}")
    dtype, both, why = dtypes(args.dtype)
    return Inputs(model, data, out, args.threads, dtype, args.tiny, args.rounds, args.steps, both, why)


def dtypes(asked: str, root: Path = Path("/")) -> tuple[str, bool, str]:
    """(dtype of the comparison, whether float32 is measured too, the sentence that says so). `root` has proc/."""
    if asked != "auto":
        return asked, False, f"{asked} alone is measured, as --dtype={asked} asks"
    from steepest.devices.backends.cpu import CPUDevice

    can, why = CPUDevice(root).supports_bf16()
    if can:
        return "bfloat16", True, f"ours is measured in bfloat16 and in float32, the peer in bfloat16: {why}"
    return "float32", False, f"only float32 is measured: {why}"


def tiny_inputs(folder: Path) -> tuple[Path, Path]:
    """A random model of 0.1M parameters and made-up problems in GSM8K's format, made once."""
    model, data = folder / "model", folder / "train.jsonl"
    if not data.is_file():
        from steepest.data.prepare.arithmetic import arithmetic_corpus, make_problems
        from steepest.models.tiny import build_tiny_model

        build_tiny_model(model, [*arithmetic_corpus(), INSTRUCTION], model_type="llama", num_layers=2, max_length=1024)
        problems = make_problems(64, "train", seed="bench")
        rows = [{"question": problem.question, "answer": problem.answer} for problem in problems]
        write_questions(data, rows)
    return model, data


def write_prompts(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """The rows as the parquet file that the trainer reads, with the prompts that the peers get."""
    from steepest.data.files import write_parquet
    from steepest.data.prepare.gsm8k import math_row, row_schema

    made = [
        math_row(
            "openai/gsm8k",
            row["question"] + INSTRUCTION,
            row["answer"],
            gold(row["answer"]),
            index=i,
            split="train",
            question=row["question"],
        )
        for i, row in enumerate(rows)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_parquet(path, made, row_schema())
    return path


def guarded_main(main: Any) -> None:
    """Run `main()`. A BenchError becomes one message and exit code 2. On SIGTERM it ends its child process first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(2)
