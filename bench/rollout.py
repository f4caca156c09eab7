"""Measures tokens per second of the rollout engines.

    python -m bench.rollout --tiny --rows 256 --max-tokens 64
    python -m bench.rollout --model DIR --rows 16 --max-tokens 64 --engines builtin hf

    python -m bench.rollout --model DIR --data gsm8k/test.jsonl --rows 32 --max-tokens 256 --stop-at-end --threads 2

Prompts are questions of --data (JSON lines or Parquet, column `question` or `prompt`) through the model's chat
template, or random ids of --prompt-length tokens (half to full length). Responses run to --max-tokens unless
--stop-at-end is given. On a machine that others use, compare tokens a CPU second of one thread.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import bench  # noqa: F401 - sets waiting threads up, and refuses to be run as a file
import steepest.rollout
from steepest.models.load import end_token_ids, load_causal_lm, load_tokenizer
from steepest.models.tiny import build_tiny_model
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.weights import LocalWeights, ModelDescription


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="Hugging Face model folder")
    where.add_argument("--tiny", action="store_true", help="a random model of 0.2M parameters")
    parser.add_argument("--engines", nargs="+", default=["builtin"], choices=steepest.rollout.ROLLOUT_ENGINES.names())
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--n", type=int, default=1, help="samples a prompt; --rows counts samples")
    parser.add_argument("--data", type=Path, help="GSM8K's rows: a .jsonl or .parquet file")
    parser.add_argument("--prompt-length", type=int, default=48, help="of random prompts")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stop-at-end", action="store_true")
    parser.add_argument("--profile", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"word {i} is{i % 300}" for i in range(900)]
        folder = args.model or build_tiny_model(Path(scratch), words, max_length=4096)
        model = load_causal_lm(folder)
        tokenizer = load_tokenizer(folder)
        ends = end_token_ids(folder, tokenizer)
    count = args.rows // args.n
    if args.data is None:
        prompts = random_prompts(count, args.prompt_length, model.vocab_size)
    else:
        prompts = real_prompts(args.data, count, tokenizer)
    longest = max(len(p) for p in prompts)
    print(f"{count} prompts of {sum(len(p) for p in prompts) / count:.0f} tokens on average, at most {longest}")
    sampling = SamplingParams(args.max_tokens, n=args.n, ignore_eos=not args.stop_at_end)
    requests = [GenerationRequest(prompt, sampling, str(place)) for place, prompt in enumerate(prompts)]
    for name in args.engines:
        factory = steepest.rollout.ROLLOUT_ENGINES.get(name).value
        engine = factory(
            ModelDescription.of(model),
            end_token_ids=ends,
            pad_token_id=tokenizer.pad_token_id,
            dtype=getattr(torch, args.dtype),
            max_num_seqs=args.max_num_seqs,
            max_model_len=longest + args.max_tokens,
        )
        engine.load_weights(LocalWeights(model), 0)
        for _ in range(args.repeats):
            report(name, engine, requests)
        if args.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                engine.generate(requests)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def random_prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(10, vocab_size) for _ in range(rng.randint(length // 2, length))] for _ in range(count)]


def real_prompts(file: Path, count: int, tokenizer: Any) -> list[list[int]]:
    """The first `count` questions, as a chat."""
    if file.suffix == ".parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_table(file).slice(0, count).to_pylist()
    else:
        with file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    if len(rows) < count:
        raise SystemExit(f"{file} has {len(rows)} rows, fewer than --rows / --n = {count}")
    chats = [row["prompt"] if "prompt" in row else [{"role": "user", "content": row["question"]}] for row in rows]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return [list(tokenizer.apply_chat_template(chat, **template)) for chat in chats]


def report(name: str, engine: steepest.rollout.RolloutEngine, requests: list[GenerationRequest]) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    result = engine.generate(requests)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    tokens = sum(len(c.token_ids) for group in result for c in group)
    line = f"{name}: {tokens} tokens in {seconds:.3f} s = {tokens / seconds:.0f} tokens/s"
    line += f" ({tokens / cpu:.0f} a CPU second)"
    if (stats := getattr(engine, "stats", None)) is not None:
        share = stats.decode_s / max(1e-9, stats.decode_s + stats.prefill_s)
        step_ms = 1e3 * stats.decode_s / max(1, stats.decode_steps)
        cpu_ms = 1e3 * share * cpu / max(1, stats.decode_steps)
        line += (
            f"; prefill {stats.prefill_s:.3f} s, {stats.decode_steps} steps of {step_ms:.2f} ms ({cpu_ms:.2f} of CPU)"
        )
    print(line)


if __name__ == "__main__":
    main()
