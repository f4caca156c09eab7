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
        self._dtype, self.device = dtype, device
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
        return torch.zeros(size, dtype=self._dtype, device=self.device)

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

    @property
    def num_heads(self) -> int:
        """Key heads of the first layer."""
        return self._shapes[0][0]


class _WriteIndices:
    """Layers with equally many heads share one write index."""

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self._cache, self._slots, self._positions = cache, slots, positions
        self._by_heads: dict[int, Tensor] = {}

    def move(self, positions: Tensor) -> None:
        """To the next tokens of the same slots."""
        self._positions = positions
        self._by_heads = {}

    def __call__(self, layer: int) -> Tensor:
        heads = self._cache.heads(layer)
        if heads not in self._by_heads:
            self._by_heads[heads] = self._cache.write_index(self._slots, self._positions, layer)
        return self._by_heads[heads]


class Prefix:
    """Tokens that all prompts begin with: their keys and values, computed once."""

    def __init__(self, cache: KVCache, length: int) -> None:
        """Copies of what slot 0 holds in its first `length` places."""
        self.length = length
        self._kv = [(k[0, :, :length].clone(), v[0, :, :length].clone()) for k, v in zip(cache.k, cache.v, strict=True)]

    def write(self, cache: KVCache, slots: Tensor) -> None:
        """Put them at the beginning of the slots."""
        for (k, v), keys, values in zip(self._kv, cache.k, cache.v, strict=True):
            keys[slots, :, : self.length] = k
            values[slots, :, : self.length] = v

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key and value (rows, KV, L, D) with the prefix in front of each row."""
        return tuple(  # type: ignore[return-value]
            torch.cat([own.to(x.dtype).expand(len(x), -1, -1, -1), x], 2)
            for own, x in zip(self._kv[layer], (key, value), strict=True)
        )


class PrefillContext(PackedContext):
    """Packed prompts: attend within each, and leave keys and values in its slot."""

    def __init__(
        self, cache: KVCache, lengths: Sequence[int], slots: Tensor, positions: Tensor, prefix: Prefix | None = None
    ) -> None:
        """slots and positions are (N,), one a packed token. With a `prefix`, only what comes after it is packed."""
        super().__init__(lengths, slots.device)
        self._cache, self._prefix = cache, prefix
        self._index = _WriteIndices(cache, slots, positions)
        self._layer = 0
        if prefix is not None:
            self.max_length += prefix.length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self._cache.write(layer, self._index(layer), key, value)
        self._layer = layer
        return super().attend(layer, query, key, value, scale)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        if self._prefix is None:
            return super()._attention(query, key, value, scale)
        key, value = self._prefix.before(self._layer, key, value)
        length, seen = query.shape[2], self._prefix.length
        mask = torch.ones(length, seen + length, dtype=torch.bool, device=query.device).tril_(seen)
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=gqa)


Chunk = tuple[int, int, int]
"""Slots from, to, and the most places that any of them attends to."""


_CHUNK_COST = 200
"""What a chunk more costs, in places of one key head: three small operations. Measured on a CPU: 15 us, and 76 ns."""


def chunks_of(positions: Sequence[int], heads: int) -> list[Chunk]:
    """Cut slots with tokens at `positions` so that little is computed past their ends, in few chunks."""
    step = max(4, len(positions) // 16)
    chunks: list[Chunk] = []
    for start in range(0, len(positions), step):
        block = positions[start : start + step]
        stop, length = start + len(block), max(block) + 1
        if chunks:
            begin, _, before = chunks[-1]
            wasted = (stop - start) * max(0, before - length) + (start - begin) * max(0, length - before)
            if wasted * heads <= _CHUNK_COST:
                chunks[-1] = (begin, stop, max(before, length))
                continue
        chunks.append((start, stop, length))
    return chunks


class DecodeContext:
    """One new token for each of the slots 0 to n-1, which attends to its slot up to its own position.

    `chunks` cover the slots in order. On a CPU each is computed alone, over its own length: short sequences do not pay
    for the longest one.
    """

    def __init__(self, cache: KVCache, positions: Tensor, slots: Tensor, chunks: Sequence[Chunk]) -> None:
        """positions and slots are (n,)."""
        self.max_length = max(length for _, _, length in chunks)
        self._cache, self._positions, self._chunks = cache, positions, chunks
        self._index = _WriteIndices(cache, slots, positions)
        self._biases: dict[int, Tensor] = {}

    def step(self, positions: Tensor, chunks: Sequence[Chunk]) -> None:
        """Go on to the next token: the slots are the same, and each is at a further position or where it was."""
        self.max_length = max(length for _, _, length in chunks)
        self._positions, self._chunks = positions, chunks
        self._index.move(positions)
        for heads, bias in self._biases.items():
            seen = positions if heads == 1 else positions.repeat_interleave(heads)
            bias.scatter_(2, seen[:, None, None], 0.0)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query (H, n, D), key and value (KV, n, D) -> (n, H, Dv)."""
        self._cache.write(layer, self._index(layer), key, value)
        keys, values = self._cache.k[layer], self._cache.v[layer]
        # The queries that share a key head become the rows of one small matrix, so keys are read once for all of them.
        q = query.transpose(0, 1).unflatten(1, (keys.shape[1], -1)).to(keys.dtype)
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        if q.device.type == "cpu" and q.dtype == torch.float32:
            out = self._by_chunks(q * factor, keys, values)
        else:
            n, length = len(q), self.max_length
            bias = self._bias(1, q.dtype)[:, None, :, :length]
            k, v = keys[:n, :, :length], values[:n, :, :length]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=factor)
        return out.flatten(1, 2).to(query.dtype)

    def _by_chunks(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Plain attention as two batched products. Measured on CPU for a few query rows a head: 10 to 30 % faster than
        the fused kernel, which splits work over query blocks that are not there."""
        n, heads, group, _ = q.shape
        q, keys, values = q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1)
        bias = self._bias(heads, q.dtype)
        out = q.new_empty(n * heads, group, values.shape[-1])
        for start, stop, length in self._chunks:
            part = slice(start * heads, stop * heads)
            k, v = keys[part, :length], values[part, :length]
            scores = torch.baddbmm(bias[part, :, :length], q[part], k.transpose(1, 2))
            torch.bmm(scores.softmax(-1), v, out=out[part])
        return out.view(n, heads, group, -1)

    def _bias(self, heads: int, dtype: torch.dtype) -> Tensor:
        """(n * heads, 1, room of a slot): 0 for places that are seen, else -inf."""
        made = self._biases.get(heads)
        if made is None:
            column = torch.arange(self._cache.capacity, device=self._positions.device)
            hidden = (column > self._positions[:, None]).repeat_interleave(heads, 0)[:, None]
            made = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._biases[heads] = made
        return made
