"""Peak memory of the log-prob and entropy head as vocabulary and tokens grow, and of a PPO step of a 0.5B shape.

    python -m bench.memory                          both, about ten minutes
    python -m bench.memory --only head
    python -m bench.memory --tiny                   small sizes: shows in a minute that it runs

The head runs forward and backward, each size in a new process; the result is the memory that it needs in addition to
its inputs and their gradients. The step has 8 prompts of 100 tokens with 64 response tokens each, on random weights of
Qwen2.5-0.5B's shape, trained in full and by LoRA; the table also shows the trainer's own estimate from its summary.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import limits
from bench.compare import markdown, write_results
from bench.inputs import ROOT, Inputs, guarded_main, parser, tiny_inputs, write_prompts
from bench.measure import GIB, BenchError
from bench.ours import MICRO_TOKENS, Kind, overrides, ppo, run_ours
from bench.workload import INSTRUCTION, stretch

HIDDEN = 896
VOCABULARIES, TOKENS = (32_000, 152_000, 262_000), (512, 1024, 4096)
QWEN = {
    "hidden_size": HIDDEN, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "rope_theta": 1e6,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 128, "vocab_size": 2000, "rope_theta": 1e6,
}  # fmt: skip
MIB = 2**20
_KINDS: dict[str, Kind] = {"full": "full", "LoRA, critic an adapter": "adapter", "LoRA, critic a value head": "head"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of the step."""

    model: dict[str, Any]
    prompts: int = 8
    prompt: int = 100
    response: int = 64


def head(vocabulary: int, tokens: int, hidden: int = HIDDEN) -> dict[str, float]:
    """Forward and backward of the head in this process: MiB before, at the peak, and the size of the full logits."""
    import torch

    from steepest.core.log_probs import token_log_probs

    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    states.grad, weight.grad = torch.zeros_like(states), torch.zeros_like(weight)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak: making the inputs took more memory than the inputs
    before = _peak()
    log_probs, entropies = token_log_probs(states, weight, None, targets, with_entropy=True)
    assert entropies is not None
    (log_probs.sum() + entropies.sum()).backward()
    return {"before": before / MIB, "peak": _peak() / MIB, "logits": tokens * vocabulary * 4 / MIB}


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM:"))


def head_rows(threads: int, vocabularies: tuple[int, ...], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per size, each measured in a new process."""
    rows = []
    for vocabulary in vocabularies:
        for number in tokens:
            command = [sys.executable, "-m", "bench.memory", "--one-head", str(vocabulary), str(number)]
            env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
            if done.returncode:
                raise BenchError(f"the head with V={vocabulary}, T={number} failed:\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            rows.append({
                "V": vocabulary, "T": number, "inputs and gradients MiB": found["before"],
                "added at most MiB": found["peak"] - found["before"],
                "of which the weight's gradient MiB": vocabulary * HIDDEN * 4 / MIB,
                "full logits would be MiB": found["logits"],
            })  # fmt: skip
            print(f"head: V={vocabulary}, T={number}: {rows[-1]['added at most MiB']:.0f} MiB added", flush=True)
    return rows


def random_model(folder: Path, config: dict[str, Any]) -> Path:
    """A Qwen2 of that shape with random weights and the tokenizer of generated problems, whose ids are below V."""
    if (folder / "model.safetensors").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from steepest.data.prepare.arithmetic import arithmetic_corpus
    from steepest.models.tiny import build_tokenizer

    tokenizer = build_tokenizer([*arithmetic_corpus(), INSTRUCTION])
    made = AutoConfig.for_model(
        "qwen2", **config, max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def step_row(inputs: Inputs, sizes: Sizes, title: str, kind: Kind) -> dict[str, Any]:
    """The memory of one PPO step, with the trainer's own estimate."""
    from steepest.models.load import load_tokenizer

    tokenizer = load_tokenizer(inputs.model)
    words = random.Random(0)
    questions = [f"How many apples does Tom have now, {words.randrange(99)} or {i}?" for i in range(sizes.prompts)]
    rows = [{"question": stretch(tokenizer, question, sizes.prompt), "answer": "#### 1"} for question in questions]
    data = write_prompts(inputs.out / "work" / "memory.parquet", rows)
    folder, log = inputs.out / "work" / f"memory-{kind}", inputs.out / "logs" / f"memory-{kind}.log"
    keys = overrides(
        inputs, data, folder, prompts=sizes.prompts, group=1, response=sizes.response, prompt_limit=sizes.prompt,
        steps=inputs.steps + 1, budget=MICRO_TOKENS[kind],
    )  # fmt: skip
    run = run_ours(inputs, [*keys, *ppo(kind)], folder, log)
    return {
        "training": title,
        "peak GiB": run.peak / GIB,
        "estimate of the start summary": estimate(log.read_text(encoding="utf-8")),
        "s a step": run.seconds,
    }


def estimate(log: str) -> str:
    """The estimate in the memory line of a start summary, without the machine's memory."""
    found = re.search(r"^\s*memory\s+(.+?)(?:;|$)", log, flags=re.MULTILINE)
    return found[1] if found else "-"


def main() -> None:
    options = parser(__doc__, steps=1)
    options.add_argument("--only", nargs="+", choices=["head", "step"], default=["head", "step"])
    options.add_argument("--kinds", nargs="+", choices=list(_KINDS.values()), default=list(_KINDS.values()))
    options.add_argument("--one-head", nargs=2, type=int, metavar=("V", "T"), help="one size, in this process")
    args = options.parse_args()
    if args.one_head:
        print(json.dumps(head(*args.one_head)))
        return
    out = args.out.resolve()
    tables = measure(args, out)
    about = {"step": "8 prompts x (100 + 64) tokens, one update; the first step is left out of the seconds"}
    write_results(out, "memory", machine=limits.machine(args.threads), about=about, tables=tables)
    for rows in tables.values():
        print(markdown(rows) + "\n")


def measure(args: argparse.Namespace, out: Path) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    if "head" in args.only:
        sizes = ((1000, 3000), (64, 256)) if args.tiny else (VOCABULARIES, TOKENS)
        tables["memory_head"] = head_rows(args.threads, *sizes)
    if "step" in args.only:
        sizes_of_step = Sizes(SMALL, response=16) if args.tiny else Sizes(QWEN)
        model = random_model(out / "work" / ("memory-small" if args.tiny else "memory-qwen"), sizes_of_step.model)
        _, data = tiny_inputs(out / "tiny")
        dtype = "float32" if args.dtype == "auto" else args.dtype
        inputs = Inputs(model, data, out, args.threads, dtype, args.tiny, args.rounds, args.steps)
        chosen = {title: kind for title, kind in _KINDS.items() if kind in args.kinds}
        tables["memory_step"] = [step_row(inputs, sizes_of_step, title, kind) for title, kind in chosen.items()]
    return tables


if __name__ == "__main__":
    guarded_main(main)
