"""Counts the casts between dtypes in an update in bf16: torch.autocast alone, and with working weights.

    python -m bench.casts                          SmolLM2's shape, two micro-batches and a step: some minutes
    python -m bench.casts --layers 2 --hidden 64   smaller

Each cast is counted where torch executes it, with the bytes that it reads and writes: those of weights, those of
gradients of weights, and the others (activations, logits). Nothing is timed, so the processor needs no bf16.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.compare import markdown

KINDS = ("weights", "gradients", "others")


class Casts(TorchDispatchMode):
    """Counts casts of floating-point numbers in a `with` block."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        weights = list(weights)
        self._memory = {weight.untyped_storage().data_ptr() for weight in weights}
        self._shapes = {weight.shape for weight in weights if weight.ndim > 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name is torch.ops.aten._to_copy:
            self._add(args[0], made)
        elif name is torch.ops.aten.copy_:
            self._add(args[1], args[0])
        elif name is torch.ops.aten._foreach_copy_:
            for target, source in zip(args[0], args[1], strict=True):
                self._add(source, target)
        return made

    def _add(self, source: Tensor, target: Tensor) -> None:
        if source.dtype == target.dtype or not (source.is_floating_point() and target.is_floating_point()):
            return
        kind = "others"
        if source.untyped_storage().data_ptr() in self._memory:
            kind = "weights"
        elif target.dtype == torch.float32 and target.shape in self._shapes:
            kind = "gradients"
        self.count[kind] += 1
        self.bytes[kind] += source.nbytes + target.nbytes


def build(args: argparse.Namespace) -> Any:
    """A random model of Llama's layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from steepest.models.causal_lm import CausalLM

    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64 or 1,
        num_key_value_heads=args.hidden // 192 or 1, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return CausalLM(LlamaForCausalLM(config))


def measure(args: argparse.Namespace, *, lora: bool, copies: bool) -> list[tuple[str, Casts]]:
    """The casts of each of two micro-batches, forward and backward, and of the optimizer step after them. The model has
    been used before, so a copy that is made once is there."""
    from steepest.learner.optim import Optimizer, OptimSettings
    from steepest.models.lora import LoraSettings
    from steepest.models.lora_models import LoraCausalLM
    from steepest.models.packing import pack_sequences
    from steepest.models.working_weights import use_copies

    torch.manual_seed(0)
    model = build(args)
    if lora:
        model = LoraCausalLM(model.hf, LoraSettings(rank=16))
    if copies:
        use_copies(model.hf)
    else:  # autocast alone, on the model's own layers
        for module in model.modules():
            vars(module).pop("forward", None)
    optimizer = Optimizer(model.saved_parameters(), OptimSettings(lr=1e-5))
    rows = torch.randint(args.vocab, (args.rows, args.tokens)).tolist()
    packed = pack_sequences(rows, [[False, *[True] * (args.tokens - 1)]] * args.rows)
    found = []
    for name in ("micro-batch 1", "micro-batch 2"):
        with Casts(model.parameters()) as casts:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                log_probs, _ = model.log_probs(packed)
            log_probs.mean().backward()
        found.append((name, casts))
    with Casts(model.parameters()) as casts:
        optimizer.step()
    return [*found, ("optimizer step", casts)]


def row(way: str, name: str, casts: Casts) -> dict[str, Any]:
    found: dict[str, Any] = {"way": way, "casts in": name}
    for kind in KINDS:
        found |= {kind: casts.count[kind], f"{kind} MB": casts.bytes[kind] / 1e6}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 30, "hidden": 576, "intermediate": 1536, "vocab": 49152, "rows": 2, "tokens": 32}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    ways = (("autocast", False, False), ("working weights", False, True))
    ways += (("LoRA, autocast", True, False), ("LoRA, working weights", True, True))
    print(
        markdown([row(way, *found) for way, lora, copies in ways for found in measure(args, lora=lora, copies=copies)])
    )


if __name__ == "__main__":
    main()
