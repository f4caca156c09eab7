"""The workload that we share with the peers: GSM8K questions as chat prompts, and the rule reward. It needs no
torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import BenchError

INSTRUCTION = ' Let\'s think step by step and output the final answer after "####".'
_FINAL = re.compile(r"#### (-?[0-9.,]+)")


def read_questions(path: Path, number: int) -> list[dict[str, str]]:
    """The first `number` rows {question, answer} of a GSM8K file or folder: its own jsonl, or the parquet of `prepare`.

    Raises BenchError if there are not enough rows.
    """
    names = ("train.jsonl", "train.parquet")
    files = [path / name for name in names if (path / name).is_file()] if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise BenchError(f"no GSM8K rows at {path}: expected a .jsonl or .parquet file, or a folder with {names[0]}.")
    rows = _parquet(files[0]) if files[0].suffix == ".parquet" else _jsonl(files[0])
    if len(rows) < number:
        raise BenchError(f"{files[0]} has {len(rows)} rows, and this benchmark needs {number}.")
    return [{"question": row["question"], "answer": row["answer"]} for row in rows[:number]]


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _parquet(path: Path) -> list[dict[str, str]]:
    import pyarrow.parquet as parquet

    return [row["extra_info"] for row in parquet.read_table(path, columns=["extra_info"]).to_pylist()]


def write_questions(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    """Write one file in JSON lines for all engines, because the peers' environments have no pyarrow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question + INSTRUCTION}]


def gold(answer: str) -> str:
    """The right number, as GSM8K writes it."""
    return answer.rpartition("####")[2].strip().replace(",", "")


def prompt_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question in the tokenizer's own chat template."""
    text = tokenizer.apply_chat_template(chat(question), add_generation_prompt=True, tokenize=False)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def stretch(tokenizer: Any, question: str, length: int) -> str:
    """The question with words put before it, so that its prompt has exactly `length` tokens.

    Raises BenchError if that is not possible.
    """
    missing = length - len(prompt_ids(tokenizer, question))
    for words in range(max(0, missing - 3), missing + 4):
        longer = "so " * max(0, words) + question
        if len(prompt_ids(tokenizer, longer)) == length:
            return longer
    raise BenchError(f"a prompt of {len(prompt_ids(tokenizer, question))} tokens cannot be made {length} tokens long.")


def rule_reward(text: str, right: str) -> float:
    """1 when the number after the last `####` is the right one, else 0."""
    found = _FINAL.findall(text)
    return 1.0 if found and found[-1].replace(",", "") == right else 0.0
