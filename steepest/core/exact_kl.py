"""The exact KL(policy || reference) over the whole vocabulary, computed from hidden states without an (M, V) tensor.

M tokens, H hidden size of the policy, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from steepest.core.log_probs import CHUNK_LOGITS, _add_product, _Head
from steepest.core.products import product_in_float32
from steepest.errors import ConfigError, setting

Projection = tuple[Tensor, Tensor, Tensor | None]
"""(hidden (M, H), weight (V, H), bias (V,) or None)."""


def exact_kl(
    policy: Projection,
    reference: Projection,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    half: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The KL divergence of the two next-token distributions at each position.

        p, q = softmax(s), softmax(s_ref)            with s as in `token_log_probs`
        KL   = sum over the vocabulary of p * (log p - log q)
        d KL / d s_j = p_j * (log p_j - log q_j - KL)

    Value and gradient are exactly those of the KL at each position; those of `kl_estimate`, which uses one sampled
    token, are so in expectation at best. The KL of a whole sequence also depends on how a token changes the later
    positions; no loss term contains that effect.

    Returns (M,) f32, differentiable once with respect to the policy's hidden, weight and bias; the reference gets no
    gradient. Tokens are taken `chunk_tokens` at a time, by default as many as make 8M logits; the backward computes
    each chunk's logits again. Memory holds two chunks, one for each model, and a third in the backward. `half` is that
    of `token_log_probs`.

    Raises ConfigError for a temperature that is not positive, ValueError for shapes that do not fit.
    """
    if temperature <= 0:
        raise ConfigError(f"{setting('temperature')}={temperature}: a KL needs a temperature above 0.")
    hidden, weight, bias = policy
    ref_hidden, ref_weight, ref_bias = (None if value is None else value.detach() for value in reference)
    assert ref_hidden is not None and ref_weight is not None
    if hidden.shape[0] != ref_hidden.shape[0] or weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"exact_kl: {hidden.shape[0]} states over {weight.shape[0]} tokens against {ref_hidden.shape[0]} over "
            f"{ref_weight.shape[0]}: policy and reference must speak of the same positions and vocabulary"
        )
    device = hidden.device.type
    head = _Head(
        matmul_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype,
        scale=float(logit_scale),
        softcap=softcap,
        inverse_temperature=1.0 / temperature,
        chunk_tokens=chunk_tokens or max(1, CHUNK_LOGITS // 2 // weight.shape[0]),
        with_entropy=False,
        half=half,
    )
    found: Tensor = _ExactKL.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, head)
    return found


class _Pair:
    """Computes the log-probs of policy and reference chunk by chunk, in buffers that all chunks share."""

    def __init__(self, head: _Head, policy: Projection, reference: Projection) -> None:
        self.head = head
        self.slices = head.slices(policy[0].shape[0])
        self.sides = []
        for hidden, weight, bias in (policy, reference):
            low_hidden, low_weight = hidden.to(head.matmul_dtype), head.low(weight)
            buffer = head.buffer(self.slices, low_weight)
            self.sides.append((low_hidden, low_weight, None if bias is None else bias.float(), buffer))

    def log_softmax(self, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(log p, log q, the policy's scaled logits), each (m, V); the last is overwritten where it is not needed."""
        scaled, ref_scaled = (self.head.logits(h[rows], w, b, buffer) for h, w, b, buffer in self.sides)
        return self.head.log_softmax(scaled), self.head.log_softmax(ref_scaled), scaled


class _ExactKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        head: _Head,
    ) -> Tensor:
        kl = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            pair = _Pair(head, (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
            for rows in pair.slices:
                log_p, log_q, _ = pair.log_softmax(rows)
                kl[rows] = (log_q.neg_().add_(log_p)).mul_(log_p.exp_()).sum(1)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl)
        ctx.head = head
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl = ctx.saved_tensors
        head: _Head = ctx.head
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if wants_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            pair = _Pair(head, (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias))
            low_hidden, low_weight = pair.sides[0][:2]
            for rows in pair.slices:
                log_p, log_q, scaled = pair.log_softmax(rows)
                surprise = log_q.neg_().add_(log_p).sub_(kl[rows, None]).mul_(grad_kl[rows, None])
                grad = head.through_logits(surprise.mul_(log_p.exp_()), scaled)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(head.matmul_dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = product_in_float32(grad, low_weight)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.T, low_hidden[rows], first=rows.start == 0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 4,
        )
