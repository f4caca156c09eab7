"""Counts what the built-in engine executes for a prefill and for one decoding step, in float32 and in bf16.

    python -m bench.decode_step --tiny                  random weights, in seconds
    python -m bench.decode_step --model DIR --rows 32   a model's folder; --time adds seconds
    python -m bench.decode_step --model DIR --working   over working weights, as a run that trains in bf16 has them

Each operation is counted where torch is asked for it, without views: how many, the bytes that they read and write, and
of these the casts between floating-point numbers. Counts need no processor with bf16. `--attention sdpa` attends as on
a processor without it. With `--time` the table has the shortest decoding step of a few, of one core (`--threads`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bench  # noqa: F401 - sets waiting threads up, and refuses to be run as a file
from steepest.models.causal_lm import CausalLM
from steepest.models.load import load_causal_lm
from steepest.models.tiny import build_tiny_model
from steepest.models.working_weights import use_copies
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.builtin.choose_network import choose_network
from steepest.rollout.builtin.generation import Generation
from steepest.rollout.builtin.kv_cache import KVCache
from steepest.rollout.builtin.network import FusedNetwork
from steepest.rollout.requests import group_by_sampling

_REPEATS = 5
_READS_PLACES = ("aten::index_select", "aten::gather")
_WRITES_PLACES = ("aten::index_copy_", "aten::put_", "aten::scatter_")
"""They touch some places of a large tensor: what they move is counted, not the whole tensor."""


class Counts(TorchDispatchMode):
    """Counts operations in a `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = self.casts = self.cast_bytes = 0
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        read, written = list(_tensors((args, kwargs))), list(_tensors(made))
        memory = {_place(x) for x in read}
        in_place = func._schema.is_mutable
        if not in_place and all(_place(x) in memory for x in written):
            return made  # a view, or nothing to do
        name = func.overloadpacket._qualified_op_name
        moved = (
            [read[-1]] * 2 if name in _WRITES_PLACES else [*written] * 2 if name in _READS_PLACES else read + written
        )
        size = sum(_bytes(x) for x in moved)
        self.operations += 1
        self.bytes += size
        self.by_name[str(func.overloadpacket)] += 1
        if name in ("aten::to", "aten::_to_copy", "aten::float", "aten::copy_"):
            source, target = (args[1], args[0]) if in_place else (args[0], made)
            if source.dtype != target.dtype and source.is_floating_point() and target.is_floating_point():
                self.casts += 1
                self.cast_bytes += _bytes(source) + _bytes(target)
        return made


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)
    elif isinstance(found, dict):
        yield from _tensors(list(found.values()))


def _place(x: Tensor) -> int:
    return id(x) if x.layout is not torch.strided else x.untyped_storage().data_ptr()


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def started(model: CausalLM, dtype: torch.dtype, *, rows: int, prompt: int, products: bool) -> Callable[[], Generation]:
    """A function that starts a generation of random prompts of `prompt` tokens."""
    network, notes = choose_network(model, dtype, prompt + 8, 1 << 40)
    if not isinstance(network, FusedNetwork):
        raise SystemExit("\n".join(notes))
    cache = KVCache(network.shapes(), dtype, torch.device("cpu"), bf16_products=products)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (rows, prompt), generator=generator).tolist()
    sampling = SamplingParams(6, ignore_eos=True)
    (group,) = group_by_sampling([GenerationRequest(row, sampling, str(i)) for i, row in enumerate(ids)])

    def start() -> Generation:
        cache.lay_out(rows, prompt + 8)
        return Generation(network, cache, group, [], rows, prompt + 8, model.vocab_size)

    return start


@torch.inference_mode()
def measure(start: Callable[[], Generation], *, timed: bool) -> tuple[Counts, Counts, float]:
    """Counts of a prefill and of a decoding step, and processor seconds of the shortest step (0 without `timed`)."""
    run = start()
    with Counts() as prefill:
        while groups := run._scheduler.admit(run._n, 1 << 30):
            run._prefill(groups)
    run._decode()  # makes the step's context
    with Counts() as step:
        run._decode()
    seconds = []
    for _ in range(_REPEATS if timed else 0):
        run = start()
        while groups := run._scheduler.admit(run._n, 1 << 30):
            run._prefill(groups)
        for _ in range(4):
            before = time.process_time()
            run._decode()
            seconds.append(time.process_time() - before)
    return prefill, step, min(seconds, default=0.0)


def table(found: dict[str, tuple[Counts, Counts, float]]) -> str:
    """Markdown."""
    lines = ["| | operations | MB read and written | casts | MB cast | CPU ms |", "|---" * 6 + "|"]
    for way, (prefill, step, seconds) in found.items():
        for name, counts in (("prefill", prefill), ("decoding step", step)):
            time_of = f"{1e3 * seconds:.1f}" if seconds and name != "prefill" else "-"
            numbers = f"{counts.operations} | {counts.bytes / 1e6:.1f} | {counts.casts} | {counts.cast_bytes / 1e6:.2f}"
            lines.append(f"| {way}, {name} | {numbers} | {time_of} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="Hugging Face model folder")
    where.add_argument("--tiny", action="store_true", help="a random model of 0.2M parameters")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of each prompt")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--attention", choices=["products", "sdpa"], default="products", help="in bf16")
    parser.add_argument("--working", action="store_true")
    parser.add_argument("--operations", action="store_true", help="list the step's operations by name")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        words = [f"word {i}" for i in range(300)]
        model = load_causal_lm(args.model or build_tiny_model(Path(scratch), words, max_length=4096))
    if args.working:
        use_copies(model.hf)
    found = {}
    for name in args.dtypes:
        products = args.attention == "products"
        start = started(model, getattr(torch, name), rows=args.rows, prompt=args.prompt, products=products)
        found[name] = measure(start, timed=args.time)
        if args.operations:
            print(name, dict(found[name][1].by_name.most_common()))
    print(table(found))


if __name__ == "__main__":
    main()
