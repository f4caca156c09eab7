"""Runs one engine (ours, vLLM, or transformers' generate) on the workload and prints one RESULT line.

    python -m bench.peers.generate --engine builtin --model DIR --data rows.jsonl
    python -m bench.peers.generate --engine vllm --model DIR --data rows.jsonl --natural --response 256

Each engine runs in its own environment. All sample at temperature 1 from every token; they get prompt ids and return
token ids. Ours and vLLM also compute the log-prob of every token, which training needs; transformers does not.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.workload import prompt_ids, read_questions

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, largest number of tokens of a response) -> responses."""
KV_GIB = 1
"""Size of vLLM's cache, a whole number of GiB; 32 sequences of 512 tokens need less than one."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["builtin", "vllm", "hf"], required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="jsonl with one row a prompt")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--response", type=int, default=128, help="most tokens of a response")
    parser.add_argument("--natural", action="store_true", help="stop at an end token; else every response is full")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--compile", action="store_true", help="vLLM: compile the model instead of running it eagerly")
    return parser.parse_args()


def builtin(args: argparse.Namespace, ends: list[int], length: int) -> Generate:
    import torch

    from steepest.models.load import load_causal_lm
    from steepest.rollout import ROLLOUT_ENGINES
    from steepest.rollout.api import GenerationRequest, SamplingParams
    from steepest.rollout.weights import LocalWeights, ModelDescription

    model = load_causal_lm(args.model)
    engine = ROLLOUT_ENGINES.get("builtin").value(
        ModelDescription.of(model), end_token_ids=ends, pad_token_id=ends[0], dtype=getattr(torch, args.dtype),
        max_num_seqs=args.prompts, max_model_len=length,
    )  # fmt: skip
    engine.load_weights(LocalWeights(model), 0)

    def generate(prompts: list[list[int]], response: int) -> list[list[int]]:
        sampling = SamplingParams(response, ignore_eos=not args.natural, seed=response)
        requests = [GenerationRequest(prompt, sampling, str(place)) for place, prompt in enumerate(prompts)]
        return [group[0].token_ids for group in engine.generate(requests)]

    return generate


def hf(args: argparse.Namespace, ends: list[int], length: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    model.generation_config = GenerationConfig()
    stop = ends if args.natural else None

    def generate(prompts: list[list[int]], response: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[ends[0]] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(
            do_sample=True, top_k=0, top_p=1.0, max_new_tokens=response, eos_token_id=stop, pad_token_id=ends[0]
        )
        torch.manual_seed(response)
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
        if not args.natural:
            return [list(row) for row in made]
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in made]

    return generate


def vllm(args: argparse.Namespace, ends: list[int], length: int) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{args.threads - 1}" if args.threads > 1 else "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(args.model), dtype=args.dtype, enforce_eager=not args.compile, max_model_len=length,
        max_num_seqs=args.prompts, max_num_batched_tokens=max(2048, length), seed=0, disable_log_stats=True,
        enable_prefix_caching=False,  # the warm-up has the same prompts
    )  # fmt: skip

    def generate(prompts: list[list[int]], response: int) -> list[list[int]]:
        sampling = SamplingParams(
            temperature=1.0, top_p=1.0, top_k=0, max_tokens=response, ignore_eos=not args.natural,
            stop_token_ids=ends if args.natural else None, logprobs=0, detokenize=False,
        )  # fmt: skip
        made = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in made]

    return generate


def end_ids(model: Path, tokenizer: Any) -> list[int]:
    """Every end token of the model: the tokenizer's and those of the generation config."""
    file = model / "generation_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    more = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *more] if token is not None))


def main() -> None:
    began = time.perf_counter()
    args = arguments()
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [prompt_ids(tokenizer, row["question"]) for row in read_questions(args.data, args.prompts)]
    make = {"builtin": builtin, "hf": hf, "vllm": vllm}[args.engine]
    generate = make(args, end_ids(args.model, tokenizer), max(map(len, prompts)) + args.response)
    generate(prompts, min(8, args.response))
    ready = time.perf_counter()
    used = cpu_seconds()
    responses = generate(prompts, args.response)
    seconds, cpu = time.perf_counter() - ready, cpu_seconds() - used
    result = {
        "engine": args.engine, "seconds": seconds, "cpu_seconds": cpu, "startup_seconds": ready - began,
        "prompts": list(map(len, prompts)), "responses": list(map(len, responses)), "torch": torch.__version__,
    }  # fmt: skip
    print("RESULT " + json.dumps(result), flush=True)


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
