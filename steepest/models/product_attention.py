"""Causal attention of packed sequences by plain batched products.

torch's fused attention is slow in bf16 on some processors, above all its backward pass. Here the query heads that share
a key head are multiplied together, and the probabilities are kept for the backward pass:

    P = softmax(scale * Q K^T + mask)           out = P V
    dV = P^T dout                               dS = P * (dP - sum(dP * P)), dP = dout V^T
    dQ = scale * dS K                           dK = scale * dS^T Q

For bf16 tensors the products over the head's size (Q K^T, dout V^T) run in float32, since a CPU returns the sums of a
bf16 product in bf16 only and scores need more. The products over the sequence, which are most of the sums, run in bf16.

Queries are taken in blocks of BLOCK, and a block is multiplied with the keys up to its end, so that nearly half of a
long square is left out. If sequences are longer than KEPT, their probabilities are computed again in the backward pass:
memory stays proportional to the number of tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.models.attention import PackedContext, Terms

BLOCK = 64
"""Queries of a block."""
KEPT = 512
"""Longest sequence whose probabilities are kept."""
_SCORES = 2**20
"""Number of scores computed at a time, unless one sequence has more in a block: they stay in the cache."""


class ProductContext(PackedContext):
    """Causal attention within each packed sequence by `CausalProducts`; layers with terms take torch's."""

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms) -> Tensor:
        if not terms.within(key.shape[2]).are_plain:
            return super()._attention(query, key, value, scale, terms)
        kind = query.device.type
        if torch.is_autocast_enabled(kind):  # which does not cast the inputs of an autograd function
            query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out: Tensor = CausalProducts.apply(query, key, value, scale)
        return out


class _Block(NamedTuple):
    """Queries of some sequences, all heads of a group together, and the keys that they see."""

    rows: slice
    """Rows of the (b * KV, ...) tensors."""
    queries: slice
    """Places of the L * g of a row."""
    keys: slice
    diagonal: slice
    """The keys that a part of the queries does not see."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of its scores."""
        return self.rows.stop - self.rows.start, self.queries.stop - self.queries.start, self.keys.stop


class CausalProducts(torch.autograd.Function):
    """query (b, H, L, D), key (b, KV, L, D), value (b, KV, L, Dv) -> (b, H, L, Dv). Saved: the three, and P."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        group = query.shape[1] // key.shape[1]
        q, k, v = _grouped(query, group), _grouped(key, 1), _grouped(value, 1)
        out = v.new_empty(len(q), q.shape[1], v.shape[2])
        keeps = any(ctx.needs_input_grad[:3]) and key.shape[2] <= KEPT
        kept = []
        with torch.autocast(query.device.type, enabled=False):
            scores = _Scores(_wide(q) * scale, _wide(k), group)
            room = None if keeps else scores.room(q.dtype)
            for block in _blocks(q, group):
                p = scores.probabilities(block, room, q.dtype)
                torch.bmm(p, v[block.rows, block.keys], out=out[block.rows, block.queries])
                if keeps:
                    kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.group = scale, group
        return _heads(out, len(query), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        group, sequences = ctx.group, len(grad)
        grad = _grouped(grad, group)
        grad_q, grad_k, grad_v = torch.empty_like(q), _zeros(k), _zeros(v)
        wide_grad, wide_v = _wide(grad), _wide(v)
        scores = _Scores(wide_grad if kept else _wide(q) * ctx.scale, wide_v if kept else _wide(k), group)
        room_p, room_grad, room_low = scores.room(q.dtype), scores.room(wide_grad.dtype), scores.room(q.dtype)
        for index, block in enumerate(_blocks(q, group)):
            rows, queries, keys = block.rows, block.queries, block.keys
            p = kept[index] if kept else scores.probabilities(block, room_p, q.dtype)
            grad_v[rows, keys] += torch.bmm(p.transpose(1, 2), grad[rows, queries])
            grad_s = _part(room_grad, block)
            torch.bmm(wide_grad[rows, queries], wide_v[rows, keys].transpose(1, 2), out=grad_s)
            wide_p = p if p.dtype == grad_s.dtype else _part(scores.buffer, block).copy_(p)
            torch.ops.aten._softmax_backward_data.out(grad_s, wide_p, -1, grad_s.dtype, grad_input=grad_s)
            low = grad_s if p.dtype == grad_s.dtype else _part(room_low, block).copy_(grad_s)
            torch.bmm(low, k[rows, keys], out=grad_q[rows, queries])
            grad_k[rows, keys] += torch.bmm(low.transpose(1, 2), q[rows, queries])
        found = _heads(grad_q.mul_(ctx.scale), sequences, group), _heads(grad_k.mul_(ctx.scale), sequences, 1)
        return *(x.to(q.dtype) for x in (*found, _heads(grad_v, sequences, 1))), None


class _Scores:
    """Computes the probabilities of blocks, in memory that all blocks share: on a CPU new memory costs as much time as
    the computation."""

    def __init__(self, q: Tensor, k: Tensor, group: int) -> None:
        """`q` is scaled."""
        self.q, self.k, self.group = q, k, group
        self.largest = max((math.prod(block.shape) for block in _blocks(q, group)), default=0)
        self.buffer = self.room(q.dtype)

    def room(self, dtype: torch.dtype) -> Tensor:
        """Memory for the largest block."""
        return self.q.new_empty(self.largest, dtype=dtype)

    def probabilities(self, block: _Block, room: Tensor | None, dtype: torch.dtype) -> Tensor:
        """softmax(Q K^T + mask) of a block in `room`, in new memory without one."""
        scores = _part(self.buffer, block)
        torch.bmm(self.q[block.rows, block.queries], self.k[block.rows, block.keys].transpose(1, 2), out=scores)
        size = block.diagonal.stop - block.diagonal.start
        scores[..., block.diagonal].add_(_mask(size, self.group, scores.dtype, scores.device))
        found = torch.empty(block.shape, dtype=dtype, device=scores.device) if room is None else _part(room, block)
        if dtype == scores.dtype:
            torch.ops.aten._softmax.out(scores, -1, False, out=found)
            return found
        torch.ops.aten._softmax.out(scores, -1, False, out=scores)
        return found.copy_(scores)


def _part(room: Tensor, block: _Block) -> Tensor:
    return room[: math.prod(block.shape)].view(block.shape)


def _grouped(x: Tensor, group: int) -> Tensor:
    """(b, KV * g, L, D) -> (b * KV, L * g, D): the heads of a group side by side at each place."""
    sequences, heads, length, size = x.shape
    split = x.reshape(sequences, heads // group, group, length, size).transpose(2, 3)
    return split.reshape(sequences * heads // group, length * group, size)


def _heads(x: Tensor, sequences: int, group: int) -> Tensor:
    """Invert `_grouped`; a view."""
    split = x.view(sequences, -1, x.shape[1] // group, group, x.shape[2])
    return (
        split.transpose(2, 3).flatten(1, 2)
        if group == 1
        else split.transpose(2, 3).reshape(sequences, -1, x.shape[1] // group, x.shape[2])
    )


def _blocks(q: Tensor, group: int) -> Iterator[_Block]:
    """The blocks of all sequences, in the order of memory."""
    length = q.shape[1] // group
    count = -(-length // BLOCK)
    bounds = [i * length // count for i in range(count + 1)]
    step = max(1, _SCORES // (group * length * (bounds[1] - bounds[0])))
    for row in range(0, len(q), step):
        for start, end in itertools.pairwise(bounds):
            queries = slice(start * group, end * group)
            yield _Block(slice(row, min(row + step, len(q))), queries, slice(0, end), slice(start, end))


@lru_cache(maxsize=64)
def _mask(size: int, group: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size * g, size): 0 where a query sees a key, else -inf."""
    full = torch.full((size, size), float("-inf"), dtype=dtype, device=device)
    return full.triu_(1).repeat_interleave(group, 0)


def _wide(x: Tensor) -> Tensor:
    """In float32, if x is in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _zeros(x: Tensor) -> Tensor:
    """Zeros in which sums over blocks are taken: in float32."""
    return torch.zeros_like(_wide(x))
