"""Attention for responses that share the tokens of their prompt, which is packed once.

A response's token attends to the prompt and, causally, to its own response. The two parts are two calls of torch's
fused CPU attention, each of which also returns the log of its softmax's sum. The whole softmax follows from them:

    lse = log(exp(lse_own) + exp(lse_prompt))
    out = out_own * exp(lse_own - lse) + out_prompt * exp(lse_prompt - lse)

The backward pass calls the fused backward of each part with `lse` and `out` of the whole. That gives the exact
gradients of the part, because the fused backward uses only exp(score - lse) and the product of gradient and output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models.attention import PLAIN, PackedContext, Terms
from steepest.models.packing import SharedPrompts

_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
DEVICE = "cpu"
"""The only type of device on which this module's fused attention runs."""


class SharedPromptContext(PackedContext):
    """Causal attention within each segment, and from the responses of a prompt to the prompt."""

    def __init__(self, shared: SharedPrompts, max_length: int, device: torch.device | str = DEVICE) -> None:
        """`max_length` is the length of the longest prompt with its response."""
        super().__init__(shared.segments, device)
        self.max_length = max_length
        self.spans = shared.spans
        self._full: tuple[PackedContext, Tensor, Tensor] | None = None
        self.num_pairs += sum((middle - start) * (end - middle) for start, middle, end in shared.spans)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """See AttentionContext. `layer` plays no part."""
        if not terms.within(self.max_length).are_plain:
            return self._in_full(layer, (query, key, value), scale, terms)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        kind = query.device.type
        # Autocast does not cast the inputs of this function, so they are cast here.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        q, k, v = (x.transpose(0, 1).to(dtype) for x in (query, key, value))
        size = v.shape[-1]
        width = max(size, q.shape[-1])  # the fused attention wants one size; zeros change no score and no sum
        q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        out: Tensor = _Attend.apply(q, k, v, scale, self)
        return out if size == width else out[..., :size]

    def _in_full(self, layer: int, parts: tuple[Tensor, ...], scale: float | None, terms: Terms) -> Tensor:
        """Attention with every prompt repeated for each of its responses, for terms that the fused parts do not know.
        A prompt's own outputs are those in front of its first response."""
        if self._full is None:
            self._full = self._lay_out_in_full(parts[0].device)
        context, index, back = self._full
        query, key, value = (x.index_select(1, index) for x in parts)
        return context.attend(layer, query, key, value, scale, terms).index_select(0, back)

    def _lay_out_in_full(self, device: torch.device) -> tuple[PackedContext, Tensor, Tensor]:
        """(the context of whole sequences, their tokens in the packed order, and each packed token's first place)."""
        spans = {start: (middle, end) for start, middle, end in self.spans}
        pieces: list[list[int]] = []
        prompt: list[int] = []
        place = prompt_end = 0
        for length in self.lengths:
            tokens = list(range(place, place + length))
            if place in spans:
                prompt, (middle, prompt_end) = tokens, spans[place]
                if middle == prompt_end:  # its responses are all empty
                    pieces.append(prompt)
            else:
                pieces.append(prompt + tokens if place < prompt_end else tokens)
            place += length
        index = [token for piece in pieces for token in piece]
        first: dict[int, int] = {}
        for at, token in enumerate(index):
            first.setdefault(token, at)
        back = torch.tensor([first[token] for token in range(place)], device=device)
        return PackedContext([len(piece) for piece in pieces], device), torch.tensor(index, device=device), back

    def padded(self, x: Tensor) -> Tensor:
        """(N, ...) -> the buckets' rows, end to end; padding repeats a segment's last token."""
        return x if self._uniform else x.index_select(0, self._padded_index)

    def padded_zeros(self, x: Tensor) -> Tensor:
        """Do the same as `padded`, with 0 in the padding."""
        if self._uniform:
            return x
        return self.padded(x).masked_fill_(self._is_pad.view(-1, *[1] * (x.dim() - 1)), 0.0)

    def packed(self, x: Tensor) -> Tensor:
        """Invert `padded`: leave out the padding."""
        return x if self._uniform else x.index_select(0, self._packed_index)

    def buckets(self, *parts: Tensor) -> Iterator[list[Tensor]]:
        """Padded (P, H, D) tensors as (rows, H, width, D) views, bucket by bucket."""
        start = 0
        for rows, width in self._buckets:
            yield [x[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2) for x in parts]
            start += rows * width

    def prompts(self, of_responses: tuple[Tensor, ...], of_prompt: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
        """Packed (N, H, D) tensors as (1, H, n, D) views of the responses' and of the prompt's tokens, by prompt."""
        for start, middle, end in self.spans:
            yield [
                *(x[middle:end].transpose(0, 1)[None] for x in of_responses),
                *(x[start:middle].transpose(0, 1)[None] for x in of_prompt),
            ]


class _Attend(torch.autograd.Function):
    """q (N, H, D), k and v (N, KV, D) -> (N, H, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, context: SharedPromptContext) -> Tensor:
        parts = [context.padded(x) for x in (q, k, v)]
        found = [_FUSED(*bucket, 0.0, True, scale=scale) for bucket in context.buckets(*parts)]
        out = context.packed(torch.cat([o.transpose(1, 2).flatten(0, 1) for o, _ in found]))
        lse = context.packed(torch.cat([part.transpose(1, 2).flatten(0, 1) for _, part in found]))
        for queries, outs, sums, keys, values in context.prompts((q, out, lse[..., None]), (k, v)):
            more, more_lse = _FUSED(queries, keys, values, 0.0, False, scale=scale)
            more_lse = more_lse[..., None]
            whole = torch.logaddexp(sums, more_lse)
            outs.copy_(outs * (sums - whole).exp() + more * (more_lse - whole).exp())
            sums.copy_(whole)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.context = scale, context
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        context: SharedPromptContext = ctx.context
        lse = lse[..., None]
        parts = [context.padded_zeros(grad), *(context.padded(x) for x in (q, k, v, out, lse))]
        found: list[list[Tensor]] = [
            [x.transpose(1, 2).flatten(0, 1) for x in _backward(bucket, True, ctx.scale)]
            for bucket in context.buckets(*parts)
        ]
        grads = [context.packed(torch.cat(x)) for x in zip(*found, strict=True)]
        views = context.prompts((grad, q, out, lse, grads[0]), (k, v, grads[1], grads[2]))
        for grad_out, queries, outs, sums, grad_q, keys, values, grad_k, grad_v in views:
            more = _backward([grad_out, queries, keys, values, outs, sums], False, ctx.scale)
            for total, part in zip((grad_q, grad_k, grad_v), more, strict=True):
                total.add_(part)
        return grads[0], grads[1], grads[2], None, None


def _backward(parts: list[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one call; `parts` are the output's gradient, q, k, v, out and lse (..., 1)."""
    grad, q, k, v, out, lse = parts
    found: tuple[Tensor, Tensor, Tensor] = _FUSED_BACKWARD(
        grad, q, k, v, out, lse.squeeze(-1), 0.0, causal, scale=scale
    )
    return found
