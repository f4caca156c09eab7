"""Profiles one micro-batch in bf16, forward and backward, by operations and bytes: what a pass does besides products.

    python -m bench.pass_profile                     2 layers of SmolLM2's shape, 4 rows of 236 tokens, a minute
    python -m bench.pass_profile --layers 30         the whole of it
    python -m bench.pass_profile --warm --top 15     also the operations that take most of the time

`operations` are those that torch.profiler sees running, without views and allocations; `casts` the copies between
dtypes that torch executes by itself (an addition of two dtypes makes one more inside of it), with the bytes that they
read and write; `saved` what is held between forward and backward, without weights and their copies. Only --top times
anything, so the processor needs no bf16 instructions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.casts import Casts, build

_NO_WORK = (
    "view", "_unsafe_view", "as_strided", "reshape", "transpose", "t", "permute", "expand", "expand_as", "unsqueeze",
    "squeeze", "select", "slice", "split", "split_with_sizes", "narrow", "detach", "alias", "unfold", "numpy_T",
    "empty", "empty_like", "empty_strided", "new_empty", "resize_", "lift_fresh", "to", "result_type", "item",
    "_local_scalar_dense", "set_", "is_nonzero", "set_data",
)  # fmt: skip


@dataclass
class Found:
    """Figures of one way to compute the micro-batch."""

    operations: tuple[int, int]
    """Forward; forward and backward."""
    casts: Casts
    saved: int
    """Bytes."""
    top: str


def own_layers(model: Any) -> None:
    """The layers of transformers, under autocast."""
    for module in model.modules():
        vars(module).pop("forward", None)


def fused(model: Any) -> None:
    """What a model is loaded with."""


def with_copies(model: Any) -> None:
    from steepest.models.working_weights import use_copies

    use_copies(model.hf)


def with_products(model: Any) -> None:
    from steepest.models.varlen import PRODUCTS, Attention

    with_copies(model)
    model.attention = Attention(PRODUCTS)


WAYS: dict[str, Callable[[Any], None]] = {
    "own layers, autocast": own_layers,
    "fused layers": fused,
    "and working copies": with_copies,
    "and attention by products": with_products,
}


def measure(args: argparse.Namespace, prepare: Callable[[Any], None], *, dtype: torch.dtype = torch.bfloat16) -> Found:
    from steepest.models.packing import pack_sequences

    torch.manual_seed(0)
    model = build(args)
    prepare(model)
    rows = torch.randint(args.vocab, (args.rows, args.tokens)).tolist()
    scored = [False] * (args.tokens - args.scored) + [True] * args.scored
    packed = pack_sequences(rows, [scored] * args.rows)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            log_probs, entropies = model.log_probs(packed, with_entropy=True)
        total: Tensor = log_probs.sum() + entropies.sum()
        return total

    with torch.no_grad():
        if args.warm:
            forward()
        with profile(activities=[ProfilerActivity.CPU]) as ahead:
            forward()
    saved = Saved(model)
    with profile(activities=[ProfilerActivity.CPU]) as both, Casts(model.parameters()) as casts:
        with torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor):
            total = forward()
        total.backward()
    table = both.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.top) if args.top else ""
    return Found((operations(ahead), operations(both)), casts, sum(saved.sizes.values()), table)


def operations(found: profile) -> int:
    """Operations without others inside of them."""
    names = {f"aten::{name}" for name in _NO_WORK}
    leaves = [event for event in found.events() or [] if not event.cpu_children and event.name.startswith("aten::")]
    return sum(event.name not in names for event in leaves)


class Saved:
    """Memory that the graph holds, each storage once: without weights and their copies."""

    def __init__(self, model: Any) -> None:
        from steepest.models.working_weights import copied_bytes, half

        weights = [t for p in model.parameters() for t in ((p, half(p)) if copied_bytes([p]) else (p,))]
        self._known = {weight.untyped_storage().data_ptr() for weight in weights}
        self.sizes: dict[int, int] = {}
        """Bytes by address."""

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"layers": 2, "hidden": 576, "intermediate": 1536, "vocab": 49152, "rows": 4, "tokens": 236, "scored": 128}
    for name, value in shape.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--top", type=int, default=0, help="rows of the profiler's table to print; 0: none")
    parser.add_argument("--warm", action="store_true", help="one pass first: what is made once does not count")
    args = parser.parse_args()
    print("| | operations forward | and backward | casts | of weights | MB cast | of weights | MB saved |")
    print("|---" * 8 + "|", flush=True)
    for name, prepare in WAYS.items():
        found = measure(args, prepare)
        casts = found.casts
        cells = [
            *found.operations, sum(casts.count.values()), casts.count["weights"],
            f"{sum(casts.bytes.values()) / 1e6:.0f}", f"{casts.bytes['weights'] / 1e6:.0f}", f"{found.saved / 1e6:.1f}",
        ]  # fmt: skip
        print(f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |", flush=True)
        if found.top:
            print(found.top, flush=True)


if __name__ == "__main__":
    main()
