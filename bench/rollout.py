"""Tokens a second of the rollout engines.

    python bench/rollout.py --tiny --rows 256 --max-tokens 64
    python bench/rollout.py --model DIR --rows 16 --max-tokens 64 --engines builtin hf

Prompts are random ids of --prompt-length tokens (half to full length); responses run to --max-tokens unless
--stop-at-end is given.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path

import torch

import steepest.rollout
from steepest.models.load import end_token_ids, load_causal_lm, load_tokenizer
from steepest.models.tiny import build_tiny_model
from steepest.rollout.api import SamplingParams


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="Hugging Face model folder")
    where.add_argument("--tiny", action="store_true", help="a random model of 0.2M parameters")
    parser.add_argument("--engines", nargs="+", default=["builtin"], choices=steepest.rollout.ROLLOUT_ENGINES.names())
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--n", type=int, default=1, help="samples a prompt; --rows counts samples")
    parser.add_argument("--prompt-length", type=int, default=48)
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
    rng = random.Random(0)
    prompts = [
        [rng.randrange(10, model.vocab_size) for _ in range(rng.randint(args.prompt_length // 2, args.prompt_length))]
        for _ in range(args.rows // args.n)
    ]
    sampling = SamplingParams(args.max_tokens, n=args.n, ignore_eos=not args.stop_at_end)
    for name in args.engines:
        factory = steepest.rollout.ROLLOUT_ENGINES.get(name).value
        engine = factory(
            model,
            end_token_ids=ends,
            pad_token_id=tokenizer.pad_token_id,
            dtype=getattr(torch, args.dtype),
            max_num_seqs=args.max_num_seqs,
            max_model_len=args.prompt_length + args.max_tokens,
        )
        engine.load_weights(0)
        for _ in range(args.repeats):
            report(name, engine, prompts, sampling)
        if args.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                engine.generate(prompts, sampling)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


def report(
    name: str, engine: steepest.rollout.RolloutEngine, prompts: list[list[int]], sampling: SamplingParams
) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    result = engine.generate(prompts, sampling)
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
