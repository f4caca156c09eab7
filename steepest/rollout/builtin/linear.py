"""Linear layers of the engine's own decoder: the policy's own, fused copies, and copies pre-packed for oneDNN.

Measured on two cores with AVX2, fp32, a 135M model, G FLOP/s of one core (it reaches 92 on large squares), plain and
packed: head 21 and 40 at 8 rows, 34 and 52 at 16, 49 and 66 at 32, 61 and 73 at 64; the layers 28 and 36 at 8 rows, 57
and 62 at 32, 69 and 69 at 64, 87 and 80 at 512. On a slower day: head 54 and 73 at 128 rows, 49 and 64 at 256; layers
67 and 70, 72 and 73. A whole decoding step of 128 rows took 0.90 and 0.79 s. So packed weights are used for few rows,
the policy's own for many.

In bf16 the numbers are those of the working weights (`models.working_weights`): a policy that trains in bf16 has them
already, so the engine casts nothing. oneDNN lays a plain matrix out again in each product in bf16, so packed weights
serve any number of rows there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.models.bf16_storage import is_held
from steepest.models.working_weights import copied_bytes, half
from steepest.rollout.builtin.layout import Matrix

_ROWS_HINT = 32
"""The number of rows for which oneDNN chooses the packed layout; the layout is equally fast for 1 to 64 rows."""

Sink = Callable[[Tensor], None]


class Linear(Protocol):
    """One or several linear layers on the same input, with their outputs side by side."""

    def __call__(self, x: Tensor) -> Tensor:
        """(N, K) -> (N, outputs), a new tensor."""
        ...

    def sinks(self) -> dict[str, list[Sink]]:
        """Mapping from the name of a weight to the functions that copy it; empty if nothing is copied."""
        ...

    @property
    def copied_bytes(self) -> int:
        """Size in bytes of the copies that exist now."""
        ...

    def free(self) -> None:
        """Free the copies until the sinks get weights again."""
        ...


class OwnLinear:
    """Computes with the policy's own weights: there is no copy, so it is never out of date."""

    def __init__(self, parts: Sequence[Matrix]) -> None:
        self._modules: list[Any] = [part.module for part in parts]
        self._ends = _ends(parts)
        self._plain = all(type(m) is nn.Linear and not is_held(m) and m.bias is None for m in self._modules)

    def __call__(self, x: Tensor) -> Tensor:
        if len(self._modules) == 1:
            only: Tensor = self._modules[0](x)
            return only
        out = x.new_empty(len(x), self._ends[-1])
        start = 0
        for module, end in zip(self._modules, self._ends, strict=True):
            if self._plain:
                torch.mm(x, module.weight.t(), out=out[:, start:end])
            else:
                out[:, start:end] = module(x)
            start = end
        return out

    def sinks(self) -> dict[str, list[Sink]]:
        return {}

    @property
    def copied_bytes(self) -> int:
        return 0

    def free(self) -> None:
        """Do nothing: it has no copy."""


class FusedLinear:
    """Computes with the weights in the engine's dtype, side by side in one matrix: the policy's working weights where
    they lie so in memory, else a copy."""

    def __init__(self, parts: Sequence[Matrix], dtype: torch.dtype) -> None:
        self._parts, self._dtype = parts, dtype
        self._weight: Tensor | None = None
        self._lent = False
        """True if the matrix is memory of the policy's working weights."""
        self._sent: dict[int, Tensor] = {}
        self._ends = _ends(parts)
        first = parts[0].base
        self._shape = (self._ends[-1], first.in_features)
        self._device = first.weight.device
        has_bias = any(part.base.bias is not None for part in parts)
        self._bias = torch.zeros(self._ends[-1], dtype=dtype, device=self._device) if has_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    def sinks(self) -> dict[str, list[Sink]]:
        found: dict[str, list[Sink]] = {}
        start = 0
        for index, (part, end) in enumerate(zip(self._parts, self._ends, strict=True)):
            found[part.weight_name] = [partial(self._take, index)]
            if part.base.bias is not None:
                found[f"{part.name}.bias"] = [partial(self._take_bias, slice(start, end))]
            start = end
        return found

    def _take(self, index: int, weight: Tensor) -> None:
        """Take one part; when the last one has arrived, the matrix is made."""
        self._sent[index] = weight
        if len(self._sent) == len(self._parts):
            weights = [self._sent[index] for index in range(len(self._parts))]
            self._sent = {}
            self._fill(weights)

    def _fill(self, weights: Sequence[Tensor]) -> None:
        lent = self._working(weights)
        if lent is not None:
            self._weight, self._lent = lent, True
            return
        if self._weight is None or self._lent:
            self._weight, self._lent = torch.empty(self._shape, dtype=self._dtype, device=self._device), False
        self._copy(weights, self._weight)

    def _copy(self, weights: Sequence[Tensor], matrix: Tensor) -> None:
        start = 0
        for weight, end in zip(weights, self._ends, strict=True):
            matrix[start:end].copy_(weight)
            start = end

    def _working(self, weights: Sequence[Tensor]) -> Tensor | None:
        """The weights as one matrix, if they are the policy's working weights and lie one after another."""
        if self._dtype != torch.bfloat16:
            return None
        place, storage = weights[0].data_ptr(), weights[0].untyped_storage().data_ptr()
        for part, weight in zip(self._parts, weights, strict=True):
            own = part.base.weight
            if weight.data_ptr() != place or weight.untyped_storage().data_ptr() != storage:
                return None
            if not copied_bytes([own]) or half(own).data_ptr() != place:
                return None
            place += weight.nbytes
        return weights[0].detach().as_strided(self._shape, (self._shape[1], 1))

    def _take_bias(self, place: slice, bias: Tensor) -> None:
        assert self._bias is not None
        self._bias[place].copy_(bias)

    @property
    def copied_bytes(self) -> int:
        return 0 if self._weight is None or self._lent else self._shape[0] * self._shape[1] * self._dtype.itemsize

    def free(self) -> None:
        self._weight, self._lent = None, False


class PackedLinear(FusedLinear):
    """Computes with a copy in oneDNN's layout, written in place at each update. `many`: used for more than `most_rows`
    rows; None: for more than `packed_rows`."""

    def __init__(
        self, parts: Sequence[Matrix], dtype: torch.dtype, many: Linear | None, most_rows: int | None = None
    ) -> None:
        super().__init__(parts, dtype)
        self._many, self._most_rows = many, packed_rows() if most_rows is None else most_rows

    def __call__(self, x: Tensor) -> Tensor:
        if self._many is not None and len(x) > self._most_rows:
            return self._many(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out

    @property
    def copied_bytes(self) -> int:
        return super().copied_bytes + (0 if self._many is None else self._many.copied_bytes)

    def sinks(self) -> dict[str, list[Sink]]:
        found = super().sinks()
        for name, more in ({} if self._many is None else self._many.sinks()).items():
            found[name].extend(more)
        return found

    def free(self) -> None:
        super().free()
        if self._many is not None:
            self._many.free()

    def _fill(self, weights: Sequence[Tensor]) -> None:
        matrix = self._working(weights)
        if matrix is None and len(weights) == 1 and weights[0].dtype == self._dtype:
            matrix = weights[0]
        if matrix is None:
            matrix = torch.empty(self._shape, dtype=self._dtype)
            self._copy(weights, matrix)
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach(), _ROWS_HINT)
        if self._weight is None:
            self._weight = packed
        else:
            self._weight.copy_(packed)


def packed_rows() -> int:
    """Up to this number of rows packed weights are faster than the policy's own, if both exist. Where there is more
    than AVX2, nothing above 64 rows has been measured."""
    return 256 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 64


def serves(part: Matrix, dtype: torch.dtype) -> bool:
    """True if the policy's own layer computes in `dtype`."""
    return part.base.weight.dtype == dtype or (is_held(part.base) and dtype == torch.float32)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """True if oneDNN computes in this dtype on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _ends(parts: Sequence[Matrix]) -> list[int]:
    ends, total = [], 0
    for part in parts:
        total += part.base.out_features
        ends.append(total)
    return ends
