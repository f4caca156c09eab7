"""Makes what `scripts/card_check` runs on, and prints facts about the device as the last line, in JSON.

    python -m bench.card_inputs --device cuda --out FOLDER [--data train.jsonl] [--tiny]

FOLDER gets `model`, random weights of Qwen2.5-0.5B's shape with a tokenizer of the rows' words, and `rows.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from bench.workload import INSTRUCTION, gold, read_questions
from steepest.data.prepare.arithmetic import make_problems
from steepest.data.prepare.gsm8k import math_row
from steepest.devices import Device, select_device
from steepest.devices.gemm_rate import gemm_rate
from steepest.models.tiny import build_tokenizer
from steepest.process.threads import set_threads
from steepest.versions import installed

QWEN = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
"""config.json of Qwen2.5-0.5B."""
SMALL = {
    **QWEN, "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
ROWS = 1024


def questions(data: Path | None, number: int) -> list[dict[str, str]]:
    """GSM8K's rows where a file is given, else made-up problems."""
    if data is not None:
        return read_questions(data, number)
    problems = make_problems(number, "train", seed="card")
    return [{"question": problem.question, "answer": problem.answer} for problem in problems]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines, since a bare machine has no pyarrow."""
    made = [
        math_row("openai/gsm8k", row["question"] + INSTRUCTION, row["answer"], gold(row["answer"]), index=i)
        for i, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")


def write_model(folder: Path, rows: list[dict[str, str]], shape: dict[str, Any], device: Device) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    tokenizer = build_tokenizer([INSTRUCTION, *(row["question"] + row["answer"] for row in rows)])
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = AutoConfig.for_model("qwen2", **shape, bos_token_id=None, eos_token_id=end, pad_token_id=pad)
    device.seed(0)
    with device.torch_device():  # half a billion normal numbers take a card no time
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def facts(device: Device) -> dict[str, Any]:
    rates = {dtype: gemm_rate(device, getattr(torch, dtype)) / 1e12 for dtype in ("float32", "bfloat16")}
    return {
        "device": f"{device.name}: {device.hardware()}",
        "memory GiB": device.memory().total / 2**30,
        "torch": str(installed("torch")),
        "transformers": str(installed("transformers")),
        **{f"limit {dtype} TFLOP/s": rate for dtype, rate in rates.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = select_device(args.device)
    set_threads()
    rows = questions(args.data, 32 if args.tiny else ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "rows.jsonl", rows)
    write_model(args.out / "model", rows, SMALL if args.tiny else QWEN, device)
    print(json.dumps(facts(device)))


if __name__ == "__main__":
    main()
