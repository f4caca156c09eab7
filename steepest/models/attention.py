"""The one attention function that Steepest gives to transformers: attention of packed sequences.

Models run with `attn_implementation="steepest"` on inputs of shape (1, N): N tokens of several sequences, without
padding and without a mask. A context object knows which token may attend to which. It is passed to the model as
`attention_context=`, and transformers passes it through every layer to `attend_packed`. So training, prefill and
decoding differ only in the context.

transformers makes a mask only for implementations that registered a mask function. "steepest" registers none, so none
is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from steepest.errors import ModelError
from steepest.models.flops import causal_pairs

IMPLEMENTATION = "steepest"


class CannotPack(Exception):
    """The model cannot run on packed sequences; the text says why, of the model ("it ...", "its ...")."""


@dataclass(frozen=True)
class Terms:
    """What the scores of a layer have besides the products of queries and keys."""

    window: int | None = None
    """A token attends to this number of last tokens, itself included; None: to all."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap)."""
    sinks: Tensor | None = None
    """(H,) the score of one more place of each head, which has no value."""

    def within(self, length: int) -> Terms:
        """The same for sequences of at most `length` tokens, without a window that hides nothing."""
        return replace(self, window=None) if self.window is not None and self.window >= length else self

    @property
    def are_plain(self) -> bool:
        """True if there are none."""
        return self.window is None and self.softcap is None and self.sinks is None


PLAIN = Terms()


class AttentionContext(Protocol):
    """Knows which packed tokens belong together. One object serves all layers of one forward pass."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """query (H, N, D), key (KV, N, D), value (KV, N, Dv) of one layer -> (N, H, Dv)."""
        ...


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    attention_context: AttentionContext | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in each layer: query (1, H, N, D), key and value (1, KV, N, D) -> (1, N, H, D).

    Raises CannotPack for a call without a context and for what packed sequences cannot honour.
    """
    if attention_context is None:
        raise CannotPack("it does not pass keyword arguments down to its attention layers")
    if extra.get("position_bias") is not None:
        raise CannotPack("it adds a position bias to its attention")
    if attention_mask is not None:
        raise CannotPack("it makes an attention mask of its own")
    if dropout:
        raise ModelError(
            f"{type(module).__name__} asks for attention dropout {dropout}; reinforcement learning needs it to be 0."
        )
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise CannotPack("its attention does not know the number of its layer")
    terms = Terms(sliding_window, extra.get("softcap"), extra.get("s_aux"))
    return attention_context.attend(int(layer), query[0], key[0], value[0], scaling, terms)[None], None


AttentionInterface.register(IMPLEMENTATION, attend_packed)


def set_own_attention(hf: PreTrainedModel) -> None:
    """Switch to transformers' fast attention, or to its plain one where the family has no other."""
    try:
        hf.set_attn_implementation("sdpa")
    except (ValueError, ImportError):
        hf.set_attn_implementation("eager")


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Use another attention implementation of transformers ("eager", "sdpa") in the `with` block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class _ToPadded(torch.autograd.Function):
    """(N, ...) -> (P, ...) by index. Its gradient is a gather too, because padding has no gradient to add."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, padded_index: Tensor, packed_index: Tensor) -> Tensor:
        ctx.save_for_backward(packed_index)
        return x.index_select(0, padded_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (packed_index,) = ctx.saved_tensors
        return grad.index_select(0, packed_index), None, None


class _ToPacked(torch.autograd.Function):
    """(P, ...) -> (N, ...) by index, the inverse of _ToPadded; gradients of padding are 0."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, padded_index: Tensor, packed_index: Tensor, is_pad: Tensor) -> Tensor:
        ctx.save_for_backward(padded_index, is_pad)
        return x.index_select(0, packed_index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        padded_index, is_pad = ctx.saved_tensors
        spread = grad.index_select(0, padded_index)
        return spread.masked_fill_(is_pad.view(-1, *[1] * (grad.dim() - 1)), 0.0), None, None, None


def unpad(x: Tensor, padded_index: Tensor, packed_index: Tensor, is_pad: Tensor) -> Tensor:
    """(P, ...) -> (N, ...): leave out the padding."""
    packed: Tensor = _ToPacked.apply(x, padded_index, packed_index, is_pad)
    return packed


class PackedContext:
    """Causal attention within each of the packed sequences; used for training and for log-probs.

    Sequences of similar length share a right-padded bucket, so attention runs as a few dense causal calls. Padding
    lies to the right of every real token, so causality alone hides it and no mask is needed.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """`lengths` are those of the packed sequences, in packed order."""
        self.lengths = tuple(lengths)
        self.max_length = max(self.lengths)
        self.num_pairs = causal_pairs(self.lengths)
        order = sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i))
        self._buckets: list[tuple[int, int]] = []  # (sequences, padded length) of each bucket
        padded_lengths = [0] * len(order)
        for i in order:
            if not self._buckets or not _fits(self.lengths[i], self._buckets[-1][1]):
                self._buckets.append((0, self.lengths[i]))
            rows, width = self._buckets[-1]
            self._buckets[-1] = (rows + 1, width)
            padded_lengths[i] = width
        self._uniform = len(self._buckets) == 1 and min(self.lengths) == self.max_length
        if not self._uniform:
            self._make_indices(order, padded_lengths, device)

    def _make_indices(self, order: list[int], padded_lengths: list[int], device: torch.device | str) -> None:
        picked = torch.tensor(order)
        lengths, widths = torch.tensor(self.lengths), torch.tensor(padded_lengths)
        starts = (lengths.cumsum(0) - lengths)[picked]
        lengths, widths = lengths[picked], widths[picked]
        which = torch.arange(len(order)).repeat_interleave(widths)
        column = torch.arange(int(widths.sum())) - (widths.cumsum(0) - widths)[which]
        is_pad = column >= lengths[which]
        # Padding repeats the sequence's last token; any finite number would do, because nothing attends to it.
        padded_index = starts[which] + torch.minimum(column, lengths[which] - 1)
        packed_index = torch.empty(int(lengths.sum()), dtype=torch.int64)
        packed_index[padded_index[~is_pad]] = torch.arange(len(which))[~is_pad]
        self._padded_index = padded_index.to(device)
        self._packed_index = packed_index.to(device)
        self._is_pad = is_pad.to(device)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """See AttentionContext. `layer` is not used."""
        parts = [x.transpose(0, 1) for x in (query, key, value)]
        if self._uniform:
            return self._dense(parts, scale, terms)
        parts = [_ToPadded.apply(x, self._padded_index, self._packed_index) for x in parts]
        out = self._dense(parts, scale, terms)
        return unpad(out, self._padded_index, self._packed_index, self._is_pad)

    def _dense(self, parts: list[Tensor], scale: float | None, terms: Terms) -> Tensor:
        start, outs = 0, []
        for rows, width in self._buckets:
            q, k, v = (x[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2) for x in parts)
            outs.append(self._attention(q, k, v, scale, terms).transpose(1, 2).flatten(0, 1))
            start += rows * width
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms) -> Tensor:
        """Attention of one bucket: query (rows, H, L, D), key and value (rows, KV, L, D)."""
        return causal_attention(query, key, value, scale, terms)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms, before: int = 0
) -> Tensor:
    """Query (rows, H, L, D), key and value (rows, KV, before + L, D): query i attends to places 0 to before + i."""
    width = key.shape[2]
    terms = terms.within(width)
    gqa = query.shape[1] != key.shape[1]
    if terms.are_plain and not before:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)
    place = torch.arange(width, device=query.device)
    seen = visible(place, place[before:], terms.window)
    if terms.softcap is None and terms.sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=gqa)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if gqa else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return softmax_of(scores, seen, terms).to(value.dtype) @ value


def visible(place: Tensor, position: Tensor, window: int | None) -> Tensor:
    """(len(position), len(place)) bool: whether the token at a position attends to a place."""
    seen = place <= position[:, None]
    return seen if window is None else seen & (place > position[:, None] - window)


def softmax_of(scores: Tensor, seen: Tensor, terms: Terms) -> Tensor:
    """Probabilities of scores (rows, H, L, W), with the soft cap and the sinks of `terms`; at least in fp32."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if terms.softcap is not None:
        scores = torch.tanh(scores / terms.softcap) * terms.softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if terms.sinks is None:
        return scores.softmax(-1)
    sinks = terms.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _fits(length: int, width: int) -> bool:
    """True if a sequence may join a bucket: at most a quarter of its row is padding, or the bucket is short."""
    return length * 4 >= width * 3 or width <= 32


class RecordingContext(PackedContext):
    """A PackedContext that records each layer's key and value shapes, for self-checks and the size of a KV cache."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__(lengths, device)
        self.shapes: dict[int, tuple[int, int, int]] = {}
        """layer -> (key/value heads, key dimension, value dimension)"""
        self.terms: dict[int, Terms] = {}
        self.scales: dict[int, float] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        if layer in self.shapes:
            raise CannotPack("a layer calls its attention more than once")
        self.shapes[layer] = (key.shape[0], key.shape[2], value.shape[2])
        self.terms[layer] = terms
        self.scales[layer] = query.shape[-1] ** -0.5 if scale is None else scale
        return super().attend(layer, query, key, value, scale, terms)
