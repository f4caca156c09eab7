"""Measures the limits of this machine: rates of matrix products by dtype, and memory bandwidth.

    python -m bench.limits                       the shapes of SmolLM2-135M
    python -m bench.limits --model DIR --threads 2

Products have a model's own shapes: many rows, as in training and prefill, and 32 rows, as in decoding. Decoding reads
every weight once per step, so its products use copies that together are larger than the last cache. The best of several
repetitions counts, because other programs may have used the machine in the others.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.compare import markdown, write_results
from bench.flops import Shape
from bench.measure import machine_seconds

SMOLLM2 = Shape(hidden=576, layers=30, heads=9, kv_heads=3, head_size=64, intermediate=1536, vocab=49152)
TRAINING_ROWS, DECODING_ROWS = 2048, 32
_RING_BYTES = 96 * 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def machine(threads: int) -> dict[str, Any]:
    """The machine in words, and the versions that matter."""
    from steepest.devices.backends.cpu import CPUDevice, processor_flags

    flags = sorted(processor_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16", "asimd"})
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": CPUDevice().hardware().rpartition(",")[0],
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": " ".join(flags) or "-",
        "memory_gib": round(CPUDevice().memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def best(function: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of as many calls as `seconds` allow: at least one, and three where they are short."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end or (len(times) < 3 and min(times) < seconds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def copy_bandwidth(seconds: float = 0.5) -> float:
    """GB/s of a copy of 256 MiB; both read and written bytes count."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best(lambda: target.copy_(source), seconds) / 1e9


def product_rate(shape: Shape, dtype: torch.dtype, rows: int, *, seconds: float = 0.25) -> float:
    """GFLOP/s over one model's products with `rows` rows: every layer's, and the vocabulary's at a quarter of them in
    training, at all of them in decoding."""
    operations = spent = 0.0
    for inputs, outputs in shape.matrices.values():
        ring = _weights(inputs, outputs, dtype, decoding=rows <= DECODING_ROWS)
        spent += shape.layers * _time(ring, rows, seconds)
        operations += shape.layers * 2 * rows * inputs * outputs
    scored = rows if rows <= DECODING_ROWS else rows // 4
    spent += _time(_weights(shape.hidden, shape.vocab, dtype, decoding=False), scored, seconds)
    operations += 2 * scored * shape.hidden * shape.vocab
    return operations / spent / 1e9


def _weights(inputs: int, outputs: int, dtype: torch.dtype, *, decoding: bool) -> list[Tensor]:
    size = inputs * outputs * dtype.itemsize
    copies = max(2, _RING_BYTES // size) if decoding else 1
    return [(torch.randn(outputs, inputs) * 0.02).to(dtype) for _ in range(copies)]


def _time(ring: list[Tensor], rows: int, seconds: float) -> float:
    x = torch.randn(rows, ring[0].shape[1]).to(ring[0].dtype)

    def once() -> None:
        for weight in ring:
            linear(x, weight)

    return best(once, seconds) / len(ring)


@torch.inference_mode()
def measure(
    shape: Shape, threads: int, *, seconds: float = 0.25, dtypes: tuple[str, ...] = tuple(_DTYPES)
) -> dict[str, float]:
    """GFLOP/s as `training_DTYPE` and `decoding_DTYPE`, copy_gb_s, and others_share: the share of the cores that other
    programs used meanwhile. If it is far from 0, the true limits are higher and shares of them smaller. It takes about
    ten seconds."""
    torch.set_num_threads(threads)
    began, own, everybody = time.perf_counter(), time.process_time(), machine_seconds()
    rates = {"copy_gb_s": copy_bandwidth(2 * seconds)}
    for name in dtypes:
        rates[f"training_{name}"] = product_rate(shape, _DTYPES[name], TRAINING_ROWS, seconds=seconds)
        rates[f"decoding_{name}"] = product_rate(shape, _DTYPES[name], DECODING_ROWS, seconds=seconds)
    others = machine_seconds() - everybody - (time.process_time() - own)
    rates["others_share"] = max(0.0, others) / (time.perf_counter() - began) / (os.cpu_count() or 1)
    return rates


def rows_of(rates: dict[str, float]) -> list[dict[str, Any]]:
    """The rates as rows of a table."""
    names = [name.partition("_")[2] for name in rates if name.startswith("training_")]
    rows: list[dict[str, Any]] = [
        {
            "dtype": name,
            f"{TRAINING_ROWS} rows, GFLOP/s": rates[f"training_{name}"],
            f"{DECODING_ROWS} rows, GFLOP/s": rates[f"decoding_{name}"],
            "copy, GB/s": rates["copy_gb_s"] if not i else None,
            "others' share of the CPU": rates["others_share"] if not i else None,
        }
        for i, name in enumerate(names)
    ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder whose shapes to use; default: SmolLM2-135M's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.25, help="for each product")
    parser.add_argument("--out", type=Path, help="folder for limits.json")
    args = parser.parse_args()
    rates = measure(Shape.of(args.model) if args.model else SMOLLM2, args.threads, seconds=args.seconds)
    about = machine(args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(markdown(rows_of(rates)))
    if args.out:
        write_results(
            args.out, "limits", machine={**about, "limits": rates}, about={}, tables={"limits": rows_of(rates)}
        )


if __name__ == "__main__":
    main()
