"""The networks an engine can run: its own decoder on fused weights if the model's layout is known, else the model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.models.attention import AttentionContext, RecordingContext
from steepest.models.causal_lm import CausalLM
from steepest.rollout.builtin.layout import Layer, Layout, Matrix, Norm
from steepest.rollout.builtin.linear import (
    FusedLinear,
    Linear,
    OwnLinear,
    PackedLinear,
    Sink,
    serves,
)

_SMALL = 1 << 22
"""Up to this number of weights a second, plain copy is made for many rows: the time of such a small model depends on
the number of operations, and fused projections need fewer."""


class Network(Protocol):
    """Interface of a network that computes the policy for the engine."""

    copies: bool
    """True if it holds copies of weights, which `refresh` must renew after an update."""

    def hidden_states(self, ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None) -> Tensor:
        """The last hidden states, after the final norm, of the tokens `rows` (None: all tokens): (n, hidden)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, V) f32, which the caller may overwrite."""
        ...

    def shapes(self) -> dict[int, tuple[int, int, int]]:
        """layer -> (key/value heads, key dimension, value dimension)"""
        ...

    @property
    def copied_bytes(self) -> int:
        """Size in bytes of the copies of weights that exist now."""
        ...

    def refresh(self) -> None:
        """Copy the weights again, in place."""
        ...

    def free(self) -> None:
        """Free the copies until the next refresh, if that is possible."""
        ...


class ModelNetwork:
    """Runs the model's own forward pass, on the policy itself or on a copy in another dtype."""

    def __init__(self, source: CausalLM, dtype: torch.dtype) -> None:
        self.copies = any(p.dtype != dtype for p in source.hf.parameters())
        self._source = source
        self.model = source.copy_as(dtype) if self.copies else source
        """The policy itself, or the copy."""

    def hidden_states(self, ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None) -> Tensor:
        model = self.model
        training = model.training
        model.eval()
        try:
            hidden = model.hidden_states(ids, positions, context)
        finally:
            model.train(training)
        return hidden if rows is None else hidden[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def shapes(self) -> dict[int, tuple[int, int, int]]:
        device = next(self.model.parameters()).device
        context = RecordingContext([1], device)
        one = torch.zeros(1, dtype=torch.int64, device=device)
        self.hidden_states(one, one, context, None)
        return context.shapes

    @property
    def copied_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.hf.parameters()) if self.copies else 0

    def refresh(self) -> None:
        if self.copies:
            self.model.write_weights(self._source.named_weights())

    def free(self) -> None:
        """Do nothing: the copy stays, because the next refresh writes into it."""


class FusedNetwork:
    """Runs our own decoder: few operations per layer, fused projections, hidden states in fp32."""

    def __init__(self, source: CausalLM, layout: Layout, dtype: torch.dtype, *, copies: bool, packed: bool) -> None:
        """`copies`: it copies the weights, `packed` for oneDNN or plain; otherwise it uses the policy's."""
        self.copies = copies
        self._source, self._layout, self._dtype, self._packed = source, layout, dtype, packed
        self._shared = all(serves(part, dtype) for part in layout.matrices())
        self._small = sum(part.base.weight.numel() for part in layout.matrices()) <= _SMALL
        self._cos, self._sin = layout.cos.to(dtype), layout.sin.to(dtype)
        self._layers = [
            (
                layer,
                self._linear(*layer.qkv),
                self._linear(layer.output),
                self._linear(*layer.gate_up),
                self._linear(layer.down),
            )
            for layer in layout.layers
        ]
        self._head = self._linear(layout.head)
        self.refresh()

    def _linear(self, *parts: Matrix) -> Linear:
        if not self.copies:
            return OwnLinear(parts)
        if not self._packed:
            return FusedLinear(parts, self._dtype)
        many: Linear | None = None
        if self._small:
            many = FusedLinear(parts, self._dtype)
        elif self._shared:
            many = OwnLinear(parts)
        return PackedLinear(parts, self._dtype, many)

    def _linears(self) -> list[Linear]:
        return [linear for _, *four in self._layers for linear in four] + [self._head]

    def hidden_states(self, ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None) -> Tensor:
        layout = self._layout
        x = layout.embedding.weight.index_select(0, ids).float()
        if layout.embedding_scale != 1.0:
            x *= layout.embedding_scale
        cos, sin = (table.index_select(0, positions)[:, None] for table in (self._cos, self._sin))
        turns = cos, *sin.chunk(2, -1)
        for index, (layer, qkv, output, gate_up, down) in enumerate(self._layers):
            attended = self._attend(index, layer, qkv(self._norm(layer.input_norm, x)), turns, context)
            if rows is not None and index == len(self._layers) - 1:
                # The last layer needs the other tokens only as keys and values.
                x, attended = x[rows], attended[rows]
            x += output(attended)
            gate, up = gate_up(self._norm(layer.post_norm, x)).chunk(2, -1)
            gate = F.silu(gate, inplace=True) if isinstance(layer.activation, torch.nn.SiLU) else layer.activation(gate)
            x += down(gate.mul_(up))
        return self._norm(layout.norm, x)

    def _norm(self, norm: Norm, x: Tensor) -> Tensor:
        return norm(x).to(self._dtype)

    def _attend(
        self, index: int, layer: Layer, qkv: Tensor, turns: tuple[Tensor, ...], context: AttentionContext
    ) -> Tensor:
        """Norms of the heads, rotation, attention: (N, outputs of qkv) -> (N, H * D). `turns`: cos, and sin of the
        first and second halves."""
        layout = self._layout
        heads, both = layout.num_heads, layout.num_heads + layout.num_kv_heads
        split = qkv.view(len(qkv), -1, layout.head_dim)
        turned = split[:, :both]
        if layer.head_norms is not None:
            q_norm, k_norm = layer.head_norms
            parts = q_norm(turned[:, :heads].float()), k_norm(turned[:, heads:].float())
            turned = torch.cat(parts, 1).to(qkv.dtype)
        cos, *sines = turns
        rotated = turned * cos
        for part, other, sin in zip(rotated.chunk(2, -1), reversed(turned.chunk(2, -1)), sines, strict=True):
            part.addcmul_(other, sin)
        query, key, value = (x.transpose(0, 1) for x in (rotated[:, :heads], rotated[:, heads:], split[:, both:]))
        return context.attend(index, query, key, value, layer.scale, layer.terms).flatten(1)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        if self._layout.logit_scale != 1.0:
            logits *= self._layout.logit_scale
        cap = self._layout.softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def shapes(self) -> dict[int, tuple[int, int, int]]:
        return self._layout.shapes

    @property
    def copied_bytes(self) -> int:
        return sum(linear.copied_bytes for linear in self._linears())

    @torch.no_grad()
    def refresh(self) -> None:
        sinks: dict[str, list[Sink]] = {}
        for linear in self._linears():
            for name, takers in linear.sinks().items():
                sinks.setdefault(name, []).extend(takers)
        if sinks:
            for name, tensor in self._source.named_weights(self._dtype):
                for sink in sinks.pop(name, ()):
                    sink(tensor)
        assert not sinks, f"weights without a source: {sorted(sinks)}"

    def free(self) -> None:
        for linear in self._linears():
            linear.free()
