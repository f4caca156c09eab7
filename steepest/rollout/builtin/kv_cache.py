"""The KV cache of the sequences that are being generated, and the attention that writes and reads it.

There are S slots of one sequence each, with room for C tokens per slot. A slot of layer l is k[l][slot]: (KV heads, C,
D). The active rows always are slots 0 to n-1, so that decoding reads one contiguous block.

On a CPU in float32 keys are stored as (S, KV heads, D, C), and k[l] is a transposed view. This makes the product of a
few queries with the keys faster, by more than it costs to write a token's key into a column. Both together, measured on
two cores with AVX512, 32 rows, 30 layers of 3 heads with 64 numbers: 27 ms instead of 35 at 600 places, about equal at
150.

On a CPU that computes in bf16, oneDNN multiplies the slots of a bf16 cache, and it copies an operand that is not one
contiguous block. So the slots are only as long as the tokens need at the moment, rounded up (`reserve`), and attention
reads them whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models.attention import PLAIN, PackedContext, Terms, causal_attention, softmax_of, visible

_PLACES = 64
"""Slots that are read whole grow by this number of places: oneDNN compiles a product for each length."""


class KVCache:
    """Buffers for all layers. They are kept between calls and grow when a call needs more."""

    def __init__(
        self,
        shapes: Mapping[int, tuple[int, int, int]],
        dtype: torch.dtype,
        device: torch.device,
        *,
        bf16_products: bool | None = None,
    ) -> None:
        """`shapes`: layer -> (key/value heads, key dimension, value dimension). `bf16_products`: the processor has
        products in bf16; None: ask torch."""
        self._shapes = [shapes[layer] for layer in sorted(shapes)]
        self._dtype, self.device = dtype, device
        if bf16_products is None:
            bf16_products = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self.whole = device.type == "cpu" and dtype == torch.bfloat16 and bf16_products
        """True if decoding attends to whole slots, which grow with the tokens."""
        self.by_chunks = device.type == "cpu" and dtype == torch.float32
        """True if decoding attends chunk by chunk, to keys that are stored transposed."""
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._room = self._num_slots = 0
        self.longest = 0
        """Places that a slot may get."""
        self.capacity = 0
        """Places of a slot as it is laid out now."""
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    @property
    def bytes_per_token(self) -> int:
        """Size in bytes of the keys and values of one token in all layers."""
        return sum(heads * (dk + dv) for heads, dk, dv in self._shapes) * self._dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        return self._room * self.bytes_per_token

    def lay_out(self, num_slots: int, capacity: int) -> None:
        """Cut the buffers into `num_slots` slots of `capacity` tokens. Their old contents are lost. Slots that are read
        whole get their places by `reserve`."""
        needed = num_slots * capacity
        self._num_slots, self.longest = num_slots, capacity
        if needed > self._room:
            self.free()
            # Zeros, not empty: masked places are multiplied by 0, and 0 * NaN would be NaN.
            self._buffers = [
                (self._zeros(needed * heads * dk), self._zeros(needed * heads * dv)) for heads, dk, dv in self._shapes
            ]
            self._room = needed
        self._cut(min(capacity, _PLACES) if self.whole else capacity)

    def _cut(self, capacity: int) -> None:
        self.capacity, num_slots = capacity, self._num_slots
        needed = num_slots * capacity
        self.k, self.v = [], []
        for (heads, dk, dv), (k, v) in zip(self._shapes, self._buffers, strict=True):
            k = k[: needed * heads * dk]
            if self.by_chunks:
                self.k.append(k.view(num_slots, heads, dk, capacity).transpose(2, 3))
            else:
                self.k.append(k.view(num_slots, heads, capacity, dk))
            self.v.append(v[: needed * heads * dv].view(num_slots, heads, capacity, dv))

    def reserve(self, places: int, used: int) -> bool:
        """Make room for `places` tokens in each slot; the first `used` slots keep theirs. Returns True if it laid the
        slots out again."""
        if places <= self.capacity:
            return False
        assert self.whole and places <= self.longest
        before, old = (self.k, self.v), self.capacity
        self._cut(min(self.longest, -(-places // _PLACES) * _PLACES))
        for views, earlier in zip((self.k, self.v), before, strict=True):
            for view, kept in zip(views, earlier, strict=True):
                view[:used, :, :old] = kept[:used].clone()  # both lie in the same buffer
        return True

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=self._dtype, device=self.device)

    def free(self) -> None:
        """Free the buffers."""
        self._buffers, self.k, self.v, self._room = [], [], [], 0

    def write_index(self, slots: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Where `write` stores N tokens, token by token: (N * KV,) rows of a (S * KV * C, D) buffer, and for transposed
        keys (N * KV * D,) places in their buffer."""
        heads, dk, _ = self._shapes[layer]
        block = slots[:, None] * heads + torch.arange(heads, device=slots.device)
        rows = (block * self.capacity + positions[:, None]).flatten()
        if not self.by_chunks:
            return rows, rows
        line = block[:, :, None] * dk + torch.arange(dk)
        return rows, (line * self.capacity + positions[:, None, None]).flatten()

    def write(self, layer: int, index: tuple[Tensor, Tensor], key: Tensor, value: Tensor) -> None:
        """Store key (KV, N, D) and value (KV, N, Dv) at `write_index`."""
        rows, places = index
        _copy_rows(self.v[layer], rows, value)
        if self.by_chunks:
            # This operation uses all threads, unlike others that could write the same; scattered single numbers are
            # slow.
            self.k[layer].transpose(2, 3).put_(places, key.transpose(0, 1).reshape(-1).float())
        else:
            _copy_rows(self.k[layer], rows, key)

    def copy_slots(self, source: Tensor, target: Tensor, length: int) -> None:
        """Copy the first `length` tokens of the slots `source` to the slots `target`; the two must not overlap."""
        for buffer in (*self.k, *self.v):
            buffer[target, :, :length] = buffer[source, :, :length]

    def shape(self, layer: int) -> tuple[int, int, int]:
        """(key/value heads, key dimension, value dimension)"""
        return self._shapes[layer]

    @property
    def num_heads(self) -> int:
        """Key heads of the first layer."""
        return self._shapes[0][0]


def _copy_rows(buffer: Tensor, rows: Tensor, new: Tensor) -> None:
    """Write new (KV, N, D) into rows of the buffer."""
    size = new.shape[2]
    buffer.view(-1, size).index_copy_(0, rows, new.transpose(0, 1).reshape(-1, size).to(buffer.dtype))


class _WriteIndices:
    """Write indices of the present tokens. Layers with the same number and size of heads share one index."""

    def __init__(self, cache: KVCache, slots: Tensor, positions: Tensor) -> None:
        self._cache, self._slots, self._positions = cache, slots, positions
        self._by_shape: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def move(self, positions: Tensor) -> None:
        """Move to the next tokens of the same slots."""
        self._positions = positions
        self._by_shape = {}

    def __call__(self, layer: int) -> tuple[Tensor, Tensor]:
        shape = self._cache.shape(layer)
        if shape not in self._by_shape:
            self._by_shape[shape] = self._cache.write_index(self._slots, self._positions, layer)
        return self._by_shape[shape]


class Prefix:
    """Keys and values of the tokens that all prompts begin with, computed once."""

    def __init__(self, cache: KVCache, length: int) -> None:
        """Copy the first `length` places of slot 0."""
        self.length = length
        self._kv = [(k[0, :, :length].clone(), v[0, :, :length].clone()) for k, v in zip(cache.k, cache.v, strict=True)]

    def write(self, cache: KVCache, slots: Tensor) -> None:
        """Write the prefix to the beginning of the slots."""
        for (k, v), keys, values in zip(self._kv, cache.k, cache.v, strict=True):
            keys[slots, :, : self.length] = k
            values[slots, :, : self.length] = v

    def before(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value (rows, KV, L, D) with the prefix in front of each row."""
        return tuple(  # type: ignore[return-value]
            torch.cat([own.to(x.dtype).expand(len(x), -1, -1, -1), x], 2)
            for own, x in zip(self._kv[layer], (key, value), strict=True)
        )


class PrefillContext(PackedContext):
    """Prefill of packed prompts: each attends within itself, and its keys and values are written to its slot."""

    def __init__(
        self, cache: KVCache, lengths: Sequence[int], slots: Tensor, positions: Tensor, prefix: Prefix | None = None
    ) -> None:
        """slots and positions are (N,), one per packed token. With a `prefix`, only the tokens after it are packed."""
        super().__init__(lengths, slots.device)
        self._cache, self._prefix = cache, prefix
        self._index = _WriteIndices(cache, slots, positions)
        self._layer = 0
        if prefix is not None:
            self.max_length += prefix.length

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        self._cache.write(layer, self._index(layer), key, value)
        self._layer = layer
        return super().attend(layer, query, key, value, scale, terms)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms) -> Tensor:
        if self._prefix is None:
            return super()._attention(query, key, value, scale, terms)
        key, value = self._prefix.before(self._layer, key, value)
        return causal_attention(query, key, value, scale, terms, self._prefix.length)


Chunk = tuple[int, int, int]
"""(first slot, end slot, largest number of places that one of these slots attends to)."""


_CHUNK_COST = 500
"""Cost of one more chunk (three small operations), in places of one key head. Measured on a CPU: 19 us for the chunk,
33 ns for a place of a head of 64 numbers."""


def chunks_of(positions: Sequence[int], heads: int) -> list[Chunk]:
    """Cut slots with tokens at `positions` into few chunks, so that little is computed past the ends of the
    sequences."""
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
    """Decoding of one new token for each of the slots 0 to n-1, which attends to its slot up to its own position.

    `chunks` cover the slots in order. On a CPU each chunk is computed by itself, over its own length, so that the
    longest sequence does not slow down short ones.
    """

    def __init__(self, cache: KVCache, positions: Tensor, slots: Tensor, chunks: Sequence[Chunk]) -> None:
        """positions and slots are (n,)."""
        self.max_length = max(length for _, _, length in chunks)
        self._cache, self._positions, self._chunks = cache, positions, chunks
        self._index = _WriteIndices(cache, slots, positions)
        self._biases: dict[int, Tensor] = {}
        # For each chunk: values that all layers of a step share (by number of heads), and those that all steps share.
        self._bias_views: dict[int, list[Tensor]] = {}
        self._key_value_views: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def step(self, positions: Tensor, chunks: Sequence[Chunk]) -> None:
        """Advance to the next token. Slots and chunks stay the same; each position increases or stays."""
        self.max_length = max(length for _, _, length in chunks)
        self._positions, self._chunks = positions, chunks
        self._index.move(positions)
        self._bias_views = {}
        for heads, bias in self._biases.items():
            seen = positions if heads == 1 else positions.repeat_interleave(heads)
            bias.scatter_(2, seen[:, None, None], 0.0)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """query (H, n, D), key and value (KV, n, D) -> (n, H, Dv)."""
        self._cache.write(layer, self._index(layer), key, value)
        heads, n = len(key), query.shape[1]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        # Queries that share a key head become the rows of one small matrix, so that the keys are read once for all.
        q = query.transpose(0, 1).unflatten(1, (heads, -1))
        terms = terms.within(self.max_length)
        if not terms.are_plain:
            return self._with_terms(layer, q, factor, terms).to(query.dtype)
        if self._cache.by_chunks:
            return self._by_chunks(layer, q.float(), factor).view(n, len(query), -1).to(query.dtype)
        if self._cache.whole:
            return self._by_products(layer, q, factor).view(n, len(query), -1)
        length = self.max_length
        k, v = (x[layer][:n, :, :length] for x in (self._cache.k, self._cache.v))
        bias = self._bias(1, k.dtype)[:, None, :, :length]
        out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, attn_mask=bias, scale=factor)
        return out.flatten(1, 2).to(query.dtype)

    def _with_terms(self, layer: int, q: Tensor, factor: float, terms: Terms) -> Tensor:
        """Attention over all slots at once, with a window, a soft cap or sinks: (n, KV, group, D) -> (n, H, Dv)."""
        n, length = len(q), self.max_length
        k, v = (x[layer][:n, :, :length] for x in (self._cache.k, self._cache.v))
        q = q.to(k.dtype)
        seen = visible(torch.arange(length, device=q.device), self._positions, terms.window)
        # Query heads become the heads of one query each, as `softmax_of` has them.
        scores = (q @ k.transpose(2, 3) * factor).flatten(1, 2)[:, :, None]
        shares = softmax_of(scores, seen[:, None, None], terms).to(v.dtype)
        out: Tensor = (shares[:, :, 0].unflatten(1, q.shape[1:3]) @ v).flatten(1, 2)
        return out

    def _by_products(self, layer: int, q: Tensor, factor: float) -> Tensor:
        """Attention to whole slots as two batched products in bf16. torch computes a softmax of bf16 in float32."""
        n, heads, group, _ = q.shape
        keys, values = (x[layer][:n].flatten(0, 1) for x in (self._cache.k, self._cache.v))
        bias = self._bias(heads, keys.dtype)
        scores = torch.baddbmm(bias, q.reshape(n * heads, group, -1), keys.transpose(1, 2), alpha=factor)
        return torch.bmm(scores.softmax(-1), values)

    def _by_chunks(self, layer: int, q: Tensor, factor: float) -> Tensor:
        """Plain attention as two batched products. On a CPU, for a few query rows per head, it is 10 to 30 % faster
        than the fused kernel, which divides the work by query blocks, of which there is only one here."""
        n, heads, group, _ = q.shape
        q = q.reshape(n * heads, group, -1)
        out = q.new_empty(n * heads, group, self._cache.shape(layer)[2])
        sizes = [(stop - start) * heads for start, stop, _ in self._chunks]
        parts = zip(
            self._biases_by_chunk(heads),
            self._keys_values_by_chunk(layer),
            q.split(sizes),
            out.split(sizes),
            strict=True,
        )
        for bias, (keys, values), q_part, out_part in parts:
            length = bias.shape[2]
            scores = torch.baddbmm(bias, q_part, keys.narrow(2, 0, length), alpha=factor)
            torch.bmm(scores.softmax(-1), values.narrow(1, 0, length), out=out_part)
        return out

    def _biases_by_chunk(self, heads: int) -> list[Tensor]:
        """The bias of each chunk, (slots * heads, 1, length)."""
        if heads not in self._bias_views:
            bias = self._bias(heads, torch.float32)
            self._bias_views[heads] = [bias[start * heads : stop * heads, :, :n] for start, stop, n in self._chunks]
        return self._bias_views[heads]

    def _keys_values_by_chunk(self, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Keys (slots * heads, D, C) and values (slots * heads, C, Dv) of each chunk."""
        if layer not in self._key_value_views:
            keys, values = self._cache.k[layer].transpose(2, 3), self._cache.v[layer]
            self._key_value_views[layer] = [
                (keys[start:stop].flatten(0, 1), values[start:stop].flatten(0, 1)) for start, stop, _ in self._chunks
            ]
        return self._key_value_views[layer]

    def _bias(self, heads: int, dtype: torch.dtype) -> Tensor:
        """(n * heads, 1, capacity): 0 for places that a slot attends to, else -inf."""
        made = self._biases.get(heads)
        if made is None:
            column = torch.arange(self._cache.capacity, device=self._positions.device)
            hidden = (column > self._positions[:, None]).repeat_interleave(heads, 0)[:, None]
            made = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
            self._biases[heads] = made
        return made
