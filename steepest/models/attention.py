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
SUPPORTED = (
    "Supported are decoder-only models with full causal attention in every layer that use transformers' attention "
    "interface, for example Qwen2, Qwen3, Llama, Mistral, Gemma (1), Granite, SmolLM, Phi-3, OLMo."
)
# Arguments that some models pass to their attention, and their meaning. None of them is supported here.
_REFUSED = {
    "softcap": "attention soft-capping",
    "s_aux": "attention sinks",
    "position_bias": "a position bias in attention",
}


class AttentionContext(Protocol):
    """Knows which packed tokens belong together. One object serves all layers of one forward pass."""

    max_length: int
    """The most tokens (earlier ones and itself) that any token of this pass attends to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
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

    Raises ModelError for a call without a context and for arguments that are not supported (see SUPPORTED).
    """
    name = type(module).__name__
    if attention_context is None:
        raise ModelError(
            f"{name} was called without attention_context=. Its model does not pass keyword arguments down to its "
            f"attention layers, or was called directly. {SUPPORTED}"
        )
    for key_name, what in _REFUSED.items():
        if extra.get(key_name) is not None:
            raise ModelError(f"{name} uses {what} ({key_name}), which Steepest does not compute. {SUPPORTED}")
    if attention_mask is not None:
        raise ModelError(
            f"{name} makes an attention mask of its own, which packed sequences cannot honour. {SUPPORTED}"
        )
    if dropout:
        raise ModelError(f"{name} asks for attention dropout {dropout}; reinforcement learning needs it to be 0.")
    if sliding_window is not None and attention_context.max_length > sliding_window:
        raise ModelError(
            f"{name} attends to the last {sliding_window} tokens only (sliding_window), but a sequence has "
            f"{attention_context.max_length}. Keep prompt plus response within {sliding_window} tokens. {SUPPORTED}"
        )
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return attention_context.attend(layer, query[0], key[0], value[0], scaling)[None], None


AttentionInterface.register(IMPLEMENTATION, attend_packed)


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

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See AttentionContext. `layer` is not used."""
        parts = [x.transpose(0, 1) for x in (query, key, value)]
        if self._uniform:
            return self._dense(parts, scale)
        parts = [_ToPadded.apply(x, self._padded_index, self._packed_index) for x in parts]
        out = self._dense(parts, scale)
        return _ToPacked.apply(out, self._padded_index, self._packed_index, self._is_pad)

    def _dense(self, parts: list[Tensor], scale: float | None) -> Tensor:
        start, outs = 0, []
        for rows, width in self._buckets:
            q, k, v = (x[start : start + rows * width].unflatten(0, (rows, width)).transpose(1, 2) for x in parts)
            outs.append(self._attention(q, k, v, scale).transpose(1, 2).flatten(0, 1))
            start += rows * width
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of one bucket: query (rows, H, L, D), key and value (rows, KV, L, D)."""
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=gqa)


def _fits(length: int, width: int) -> bool:
    """True if a sequence may join a bucket: at most a quarter of its row is padding, or the bucket is short."""
    return length * 4 >= width * 3 or width <= 32


class RecordingContext(PackedContext):
    """A PackedContext that records each layer's key and value shapes, for self-checks and the size of a KV cache."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        super().__init__(lengths, device)
        self.shapes: dict[int, tuple[int, int, int]] = {}
        """layer -> (key/value heads, key dimension, value dimension)"""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.shapes[layer] = (key.shape[0], key.shape[2], value.shape[2])
        return super().attend(layer, query, key, value, scale)
