"""Samples tokens from logits and computes their log-probs, with one uniform random number per token.

The random numbers depend only on (seed, sample number, position). So the tokens of a sample depend neither on the other
samples that are decoded with it nor on the time when it was admitted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FEW = 128
"""Up to this vocabulary size the inverse CDF takes one step; above it first picks a block, then a token in it."""
_BELOW_ONE = 1.0 - 2.0**-23
_MASK64 = (1 << 64) - 1


def uniforms(seed: int, numbers: Tensor, num_columns: int) -> Tensor:
    """(R,) int64 -> (R, num_columns) f32 in [0, 1): entry [r, t] is a hash of (seed, numbers[r], t) alone.

    SplitMix64 (Steele, Lea, Flood 2014, https://doi.org/10.1145/2660193.2660195), its state started from the mixed
    seed and row; the top 24 bits are used.
    """
    out = torch.empty(len(numbers), num_columns, dtype=torch.float32)
    column = torch.arange(1, num_columns + 1) * _signed(0x9E3779B97F4A7C15)
    chunk = max(1, (1 << 20) // max(1, num_columns))
    for start in range(0, len(numbers), chunk):
        state = _mix(numbers[start : start + chunk] + _signed(_mix_int(seed & _MASK64)))
        bits = _mix(state[:, None] + column) >> 40
        out[start : start + chunk] = (bits & 0xFFFFFF).float() * 2.0**-24
    return out


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64. Products wrap around; masks make shifts logical."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def _mix_int(x: int) -> int:
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK64
    return x ^ x >> 31


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def sample(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: (n, V) f32 logits and (n,) uniforms -> (n,) int64 tokens, (n,) f32 log-probs.

    Temperature 0 takes the likeliest token and its log-prob at temperature 1. Otherwise the logits are divided by the
    temperature and cut to the top_k likeliest tokens and then to the top_p of the remaining ones; the log-prob is that
    of the renormalised rest. `logits` may be overwritten.
    """
    if temperature == 0:
        top, token = logits.max(-1)
        return token, -(logits - top[:, None]).exp_().sum(-1).log()
    if temperature != 1.0:
        logits = logits.div_(temperature)
    if top_k > 0 or top_p < 1.0:
        kept, index = _filter(logits, top_k, top_p)
        place, log_prob = _invert(kept, uniform)
        return index.gather(1, place[:, None])[:, 0], log_prob
    return _invert(logits, uniform)


def _invert(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token whose slice of the CDF contains the random number, and its log-softmax. Logits of -inf are never
    chosen.

    The probabilities overwrite the logits, so there is one (n, V) tensor. A sampled token has a probability far above
    the smallest float, so its logarithm is as exact as the logit."""
    mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    if logits.shape[1] <= _FEW:
        token = _search(mass.cumsum(-1), uniform[:, None])
    else:
        token = _search_blocks(mass, uniform[:, None])
    chosen = (mass.gather(1, token) / mass.sum(-1, keepdim=True)).log_()
    return token[:, 0], chosen[:, 0]


def _search(cdf: Tensor, uniform: Tensor) -> Tensor:
    """The first column whose cumulated mass exceeds uniform * total. Its own mass is above 0, since the sum rises
    there."""
    total = cdf[:, -1:]
    target = torch.minimum(uniform * total, total * _BELOW_ONE)
    return torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[1] - 1)


def _search_blocks(mass: Tensor, uniform: Tensor) -> Tensor:
    """Do the same in two steps: choose a block by its mass, then a token in it. Running sums are slow; two of about
    sqrt(V) terms replace one of V terms."""
    width = mass.shape[1]
    size = 1 << (width.bit_length() // 2)
    padding = -width % size
    blocks = (F.pad(mass, (0, padding)) if padding else mass).unflatten(1, (-1, size))
    cdf = blocks.sum(-1).cumsum(-1)
    block = _search(cdf, uniform)
    before = torch.where(block > 0, cdf.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, 1, size))[:, 0].cumsum(-1)
    # Rounding may put the target at either edge of the block; keep it where the sum rises.
    target = (uniform * cdf[:, -1:] - before).clamp_(min=0.0)
    target = torch.minimum(target, inner[:, -1:] * _BELOW_ONE)
    place = torch.searchsorted(inner, target, right=True)
    return (block * size + place).clamp_(max=width - 1)


def _filter(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The kept logits (n, K) in falling order, -inf past the cut, and their token ids (n, K)."""
    vocab = logits.shape[1]
    if top_k > 0:
        values, index = logits.topk(min(top_k, vocab), dim=-1)
        log_total = values.logsumexp(-1, keepdim=True)
    else:
        log_total = logits.logsumexp(-1, keepdim=True)
        # The cut is usually near the top, so the whole vocabulary is sorted only if a part does not suffice.
        width = min(vocab, 256)
        values, index = logits.topk(width, dim=-1)
        while width < vocab and bool(((values - log_total).exp().sum(-1) < top_p).any()):
            width = min(vocab, width * 16)
            values, index = logits.topk(width, dim=-1)
    if top_p < 1.0:
        prob = (values - log_total).exp()
        before = prob.cumsum(-1) - prob
        cut = before >= top_p
        cut[:, 0] = False
        values = values.masked_fill(cut, float("-inf"))
    return values, index
