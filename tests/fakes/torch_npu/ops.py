"""The fused operators that callers import from torch_npu, in plain torch. Names and order are the real schemas'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_COMPRESSED = (2048, 2048)


def _mask(sq: int, sk: int, mode: int, given: Tensor | None, device: torch.device) -> Tensor | None:
    """True hides. Mode 0: the given one; 2: causal aligned at the top left; 3: at the bottom right."""
    if mode == 0:
        return None if given is None else given.bool()
    if mode not in (2, 3):
        raise NotImplementedError(f"stand-in npu_fusion_attention: sparse_mode={mode}")
    if given is None or tuple(given.shape) != _COMPRESSED:
        raise RuntimeError("sparse_mode 2/3 needs the compressed [2048, 2048] atten_mask")
    shift = sk - sq if mode == 3 else 0
    return torch.ones(sq, sk, dtype=torch.bool, device=device).triu(1 + shift)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, keep_prob: float, mask: Tensor | None) -> Tensor:
    """(..., heads, tokens, dim)"""
    repeat = q.shape[-3] // k.shape[-3]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, -3), v.repeat_interleave(repeat, -3)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    share = scores.softmax(-1)
    if keep_prob < 1:
        share = torch.nn.functional.dropout(share, 1 - keep_prob)
    return torch.matmul(share, v.float()).to(q.dtype)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = 2147483647,
    next_tockens: int = 2147483647,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Attention in the layouts TND (packed, with cumulated lengths), BSND and BNSD; the first result is the output."""
    for tensor in (query, key, value):
        if tensor.device.type != "npu":
            raise RuntimeError(f"npu_fusion_attention: expected an npu tensor, got {tensor.device}")
    if pse is not None or padding_mask is not None:
        raise NotImplementedError("stand-in npu_fusion_attention: pse, padding_mask")
    device = query.device
    if input_layout == "TND":
        if actual_seq_qlen is None or actual_seq_kvlen is None:
            raise RuntimeError("layout TND needs actual_seq_qlen and actual_seq_kvlen")
        outs, q0, k0 = [], 0, 0
        for q1, k1 in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
            q, k, v = (x.transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            mask = _mask(q1 - q0, k1 - k0, sparse_mode, atten_mask, device)
            outs.append(_attend(q, k, v, scale, keep_prob, mask).transpose(0, 1))
            q0, k0 = q1, k1
        out = torch.cat(outs)
    elif input_layout in ("BSND", "BNSD"):
        swap = input_layout == "BSND"
        q, k, v = (x.transpose(1, 2) if swap else x for x in (query, key, value))
        mask = _mask(q.shape[2], k.shape[2], sparse_mode, atten_mask, device)
        out = _attend(q, k, v, scale, keep_prob, mask)
        out = out.transpose(1, 2) if swap else out
    else:
        raise NotImplementedError(f"stand-in npu_fusion_attention: layout {input_layout}")
    none = torch.empty(0, device=device)
    return out, none, none, none, 0, 0, 0


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(normed input, reciprocal of its root mean square)"""
    factor = torch.rsqrt(input.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return (input.float() * factor).to(input.dtype) * gamma, factor


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """silu(first half) * second half"""
    gate, up = input.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Rotary positions: r1 holds the cosines, r2 the sines."""
    if rotary_mode != "half" or rotate is not None:
        raise NotImplementedError("stand-in npu_rotary_mul: rotary_mode, rotate")
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat((-second, first), -1) * r2
