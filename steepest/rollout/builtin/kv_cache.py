"""Keys and values of the sequences being generated, and the attention that writes and reads them.

S slots of one sequence each, room for C tokens a slot. A slot of layer l is k[l][slot]: (KV heads, C, D). The active
rows always are slots 0 to n-1, so that decoding reads one contiguous block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models.attention import PackedContext


class KVCache:
    """Buffers for all layers. They are kept between calls and grow when a call needs more."""

    def __init__(self, shapes: Mapping[int, tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> None:
        """`shapes`: layer -> (key/value heads, key dimension, value dimension)."""
        self._shapes = [shapes[layer] for layer in sorted(shapes)]
        self._dtype, self._device = dtype, device
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._room = 0
        self.capacity = 0
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return sum(heads * (dk + dv) for heads, dk, dv in self._shapes) * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        return self._room * self.bytes_per_token

    def lay_out(self, num_slots: int, capacity: int) -> None:
        """Cut the buffers into `num_slots` slots of `capacity` tokens; what was in them is forgotten."""
        needed = num_slots * capacity
        if needed > self._room:
            self.free()
            # Zeros, not empty: masked places are multiplied by 0, and 0 * NaN would be NaN.
            self._buffers = [
                (self._zeros(needed * heads * dk), self._zeros(needed * heads * dv)) for heads, dk, dv in self._shapes
            ]
            self._room = needed
        self.capacity = capacity
        self.k, self.v = [], []
        for (heads, dk, dv), (k, v) in zip(self._shapes, self._buffers, strict=True):
            self.k.append(k[: needed * heads * dk].view(num_slots, heads, capacity, dk))
            self.v.append(v[: needed * heads * dv].view(num_slots, heads, capacity, dv))

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self._dtype, device=self._device)

    def free(self) -> None:
        """Give the memory back."""
        self._buffers, self.k, self.v, self._room = [], [], [], 0

    def write_index(self, slots: Tensor, positions: Tensor, layer: int) -> Tensor:
        """(N * KV,) rows of the flattened (S * KV * C, D) buffer for N tokens, token by token."""
        heads = self._shapes[layer][0]
        head = torch.arange(heads, device=slots.device)
        return ((slots[:, None] * heads + head) * self.capacity + positions[:, None]).flatten()

    def write(self, layer: int, index: Tensor, key: Tensor, value: Tensor) -> None:
        """Store key (KV, N, D) and value (KV, N, Dv) at `write_index`."""
        for buffer, new in ((self.k[layer], key), (self.v[layer], value)):
            rows = new.transpose(0, 1).reshape(-1, new.shape[2])
            buffer.view(-1, buffer.shape[3]).index_copy_(0, index, rows.to(buffer.dtype))

    def copy_slots(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` tokens of the slots `source` to the slots `target`; the two must not overlap."""
        for buffer in (*self.k, *self.v):
            buffer[target, :, :length] = buffer[source, :, :length]

    def heads(self, layer: int) -> int:
        return self._shapes[layer][0]


class _WriteIndices:
    """Layers with equally many heads share one write index."""

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self._cache, self._slots, self._positions = cache, slots, positions
        self._by_heads: dict[int, Tensor] = {}

    def __call__(self, layer: int) -> Tensor:
        heads = self._cache.heads(layer)
        if heads not in self._by_heads:
            self._by_heads[heads] = self._cache.write_index(self._slots, self._positions, layer)
        return self._by_heads[heads]


class PrefillContext(PackedContext):
    """Packed prompts: attend within each, and leave keys and values in its slot."""

    def __init__(self, cache: KVCache, lengths: Sequence[int], slots: Tensor, positions: Tensor) -> None:
        """slots and positions are (N,), one a packed token."""
        super().__init__(lengths, slots.device)
        self._cache = cache
        self._index = _WriteIndices(cache, slots, positions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self._cache.write(layer, self._index(layer), key, value)
        return super().attend(layer, query, key, value, scale)


class DecodeContext:
    """One new token for each of the slots 0 to n-1, which attends to its slot up to its own position."""

    def __init__(self, cache: KVCache, positions: Tensor, slots: Tensor, max_length: int) -> None:
        """positions and slots are (n,); max_length is the largest position plus one."""
        self.max_length = max_length
        self._cache = cache
        self._index = _WriteIndices(cache, slots, positions)
        column = torch.arange(max_length, device=positions.device)
        self._hidden = column > positions[:, None]
        self._bias: Tensor | None = None
        self._num_rows = len(positions)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (H, n, D), key and value (KV, n, D) -> (n, H, Dv)."""
        self._cache.write(layer, self._index(layer), key, value)
        n, length = self._num_rows, self.max_length
        k, v = self._cache.k[layer][:n, :, :length], self._cache.v[layer][:n, :, :length]
        # The queries that share a key head become the rows of one small matrix, so keys are read once for all of them.
        q = query.transpose(0, 1).unflatten(1, (k.shape[1], -1)).to(k.dtype)
        if self._bias is None:
            zeros = torch.zeros(n, 1, 1, length, dtype=q.dtype, device=q.device)
            self._bias = zeros.masked_fill_(self._hidden[:, None, None], float("-inf"))
        if q.device.type == "cpu" and q.dtype == torch.float32:
            out = _small_attention(q, k, v, self._bias, q.shape[-1] ** -0.5 if scale is None else scale)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias, scale=scale)
        return out.flatten(1, 2).to(query.dtype)


def _small_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Plain attention as two batched products. Measured on CPU for a few query rows a head: 10 to 30 % faster than
    the fused kernel, which splits work over query blocks that are not there."""
    n, heads, group, _ = q.shape
    scores = torch.matmul(q, k.transpose(2, 3)).mul_(scale).add_(bias)
    return torch.matmul(scores.softmax(-1), v).view(n, heads, group, v.shape[-1])
