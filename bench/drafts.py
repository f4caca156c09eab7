"""A prototype that did not save time (docs/long_tail.md): the last epoch's answers as drafts of the builtin engine.

The random noise belongs to (prompt, sample, place). So a draft that a slightly different policy sampled with the same
noise equals this policy's own sample up to some place. One pass over the draft's tokens gives this policy's logits at
each of them. The tokens sampled there equal the draft's up to the first difference; that token is itself a sample, and
from there the row is decoded like any other. So tokens and log-probs are those of a run without drafts, up to rounding.

The noise works like a race: word j arrives at the time E_j / p_j, with E_j from the exponential distribution; the first
word to arrive is the token, which is a sample of p. Two policies with the same E_j choose the same word with
probability at least 1 - 2 TV / (1 + TV), where TV is half the sum of |p - q|. With one uniform number and an inverse
CDF, a changed policy moves the interval of every unlikely word, and tokens differ 20 to 80 times as often (`parting`).

Only the benchmark uses it: temperature 1, no filters, CPU only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest.core.log_probs import CHUNK_LOGITS
from steepest.models.attention import PLAIN, Terms
from steepest.rollout.api import Completion, GenerationRequest
from steepest.rollout.builtin import engine as engine_module
from steepest.rollout.builtin.generation import Generation
from steepest.rollout.builtin.kv_cache import KVCache, _WriteIndices
from steepest.rollout.builtin.sampler import _mix
from steepest.rollout.builtin.scheduler import Group

Drafts = Sequence[Sequence[Sequence[int]]]
"""A draft for each sample of each prompt; an empty one means that there is no draft."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_AT_ONCE = 1 << 17
"""Numbers in one pass of the race, so few that its rows stay in the processor's cache."""
PASS_TOKENS = 1024
"""Draft tokens in one pass over all rows: enough for large products, but not more, because tokens after a row's first
difference are computed in vain."""
LEAST = 16
"""Least number of draft tokens of a row in a pass."""


def noise_keys(seeds: Tensor, num_columns: int) -> Tensor:
    """(R,) int64 seeds -> (R, num_columns) int64; number [r, t] is a hash of (seeds[r], t)."""
    return _mix(_mix(seeds)[:, None] + torch.arange(1, num_columns + 1) * _GOLDEN)


def race(logits: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) logits, which are overwritten, (n,) keys -> (n,) winners and their log-softmax."""
    rows = max(1, _AT_ONCE // logits.shape[1])
    token, log_prob = torch.empty_like(keys), torch.empty(len(keys))
    for start in range(0, len(keys), rows):
        part = slice(start, start + rows)
        mass = logits[part]
        mass = mass.sub_(mass.amax(-1, keepdim=True)).exp_()
        times = exponentials(keys[part], mass.shape[1])
        winner = torch.div(mass, times, out=times).argmax(-1, keepdim=True)
        token[part] = winner[:, 0]
        log_prob[part] = (mass.gather(1, winner)[:, 0] / mass.sum(-1)).log_()
    return token, log_prob


def exponentials(keys: Tensor, num_words: int) -> Tensor:
    """(n, V) f32 from the exponential distribution: a hash of key and word, in 31 bits.

    The hash has two rounds of multiply and xor-shift; half of the key is added before each. Small numbers decide the
    race, so they must be exact: log1p(-x) is used, not log(1 - x).
    """
    low, high = (half.to(torch.int32)[:, None] for half in (keys << 32 >> 32, keys >> 32))
    x = torch.arange(num_words, dtype=torch.int32)[None] * (0x9E3779B1 - (1 << 32)) + low
    x ^= x.bitwise_right_shift(16).bitwise_and_(0xFFFF)
    x *= 0x21F0AAAD
    x ^= high
    x ^= x.bitwise_right_shift(15).bitwise_and_(0x1FFFF)
    x *= 0x735A2D97
    x ^= x.bitwise_right_shift(15).bitwise_and_(0x1FFFF)
    return x.bitwise_and_(0x7FFFFFFF).float().mul_(-(2.0**-31)).sub_(2.0**-32).log1p_().neg_()


def parting(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """For (n, V) f64 distributions of two policies: the probability that the same noise gives another token, by inverse
    CDF and by race, and half their distance, which is the lower bound for every sampler."""
    zero = torch.zeros(len(p), 1, dtype=p.dtype)
    (p_low, p_high), (q_low, q_high) = ((torch.cat([zero, x[:, :-1]], 1), x) for x in (p.cumsum(1), q.cumsum(1)))
    shared = (torch.minimum(p_high, q_high) - torch.maximum(p_low, q_low)).clamp(min=0)
    order = (q / p).argsort(1)
    p, q = p.gather(1, order), q.gather(1, order)
    won = 1 / (p.cumsum(1) / p + (1 - q.cumsum(1)).clamp(min=0) / q)
    return {"TV": 0.5 * (p - q).abs().sum(1), "inverse CDF": 1 - shared.sum(1), "race": 1 - won.sum(1)}


class ExtendContext:
    """Attention of several next tokens for some slots: each attends to its slot and the new tokens before it."""

    def __init__(self, cache: KVCache, slots: Tensor, starts: Tensor, counts: Tensor) -> None:
        """slots, starts (the first new position) and counts are (n,)."""
        self.max_length = int((starts + counts).max())
        self._cache, self._slots = cache, slots
        self._width = int(counts.max())
        self.row = torch.arange(len(slots)).repeat_interleave(counts)
        """(N,) index of the slot of each packed token."""
        self.place = torch.arange(len(self.row)) - (counts.cumsum(0) - counts)[self.row]
        """(N,) number of each packed token among the new tokens of its slot."""
        self.positions = starts[self.row] + self.place
        self._index = _WriteIndices(cache, slots[self.row], self.positions)
        seen = starts[:, None] + torch.arange(self._width)
        self._mask = torch.arange(self.max_length) <= seen[:, None, :, None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """query (H, N, D), key and value (KV, N, D) -> (N, H, Dv). For layers without a window, a cap or sinks."""
        assert terms.within(self.max_length).are_plain
        self._cache.write(layer, self._index(layer), key, value)
        keys, values = (x[layer][self._slots, :, : self.max_length] for x in (self._cache.k, self._cache.v))
        padded = query.new_zeros(len(self._slots), self._width, query.shape[0], query.shape[2], dtype=keys.dtype)
        padded[self.row, self.place] = query.transpose(0, 1).to(keys.dtype)
        gqa = query.shape[0] != keys.shape[1]
        out = F.scaled_dot_product_attention(
            padded.transpose(1, 2), keys, values, attn_mask=self._mask, scale=scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)[self.row, self.place].to(query.dtype)


class DraftRun(Generation):
    """A Generation with racing noise, which checks drafts right after the prompts."""

    def __init__(
        self, *args: Any, seeds: Sequence[int], drafts: Drafts, pass_tokens: int, least: int, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._pass_tokens, self._least = pass_tokens, least
        each = _mix(torch.tensor(seeds))[:, None] + torch.arange(self._sampling.n)
        self._noise = noise_keys(each.flatten(), self._width).flatten()
        given = [list(draft[: self._width - 1]) for group in drafts for draft in group]
        self._draft_lengths = torch.tensor([len(draft) for draft in given])
        self._draft = torch.tensor([draft + [-1] * (self._width - len(draft)) for draft in given]).flatten()
        self.computed = self.reused = 0

    def _sample(self, logits: Tensor, rows: slice) -> None:
        cursor, alive = self._cursor[rows], self._alive[rows]
        token, log_prob = race(logits, self._noise[cursor])
        self._tokens[cursor], self._log_probs[cursor], self._token[rows] = token, log_prob, token
        self._position[rows] += alive
        cursor += alive
        alive *= self._goes_on[token] * (cursor < self._limit[rows])

    def _prefill(self, groups: list[Group]) -> None:
        first = self._n
        super()._prefill(groups)
        slots = torch.arange(first, self._n)
        # Each row has sampled the first token of its draft so far.
        slots = slots[self._token[slots] == self._draft[self._cursor[slots] - 1]]
        while len(slots := slots[self._left(slots) > 0]):
            slots = self._check(slots)
        self._max_position = int(self._position[: self._n].max())

    def _left(self, slots: Tensor) -> Tensor:
        """Number of tokens of each slot's draft that are not compared yet; 0 for a row that has ended."""
        row, cursor = self._row[slots], self._cursor[slots]
        end = torch.minimum(row * self._width + self._draft_lengths[row], self._limit[slots])
        return (end - cursor).clamp(min=0) * self._alive[slots]

    def _check(self, slots: Tensor) -> Tensor:
        """Compare a block of each slot's draft and keep the sampled tokens; returns the slots that still follow their
        draft."""
        counts = self._left(slots).clamp(max=max(self._least, self._pass_tokens // len(slots)))
        context = ExtendContext(self._cache, slots, self._position[slots], counts)
        row, place = context.row, context.place
        at = self._cursor[slots][row] + place
        hidden = self._network.hidden_states(self._draft[at - 1], context.positions, context, None)
        rows = max(1, CHUNK_LOGITS // len(self._goes_on))
        chunks = zip(hidden.split(rows), at.split(rows), strict=True)
        parts = [race(self._network.logits(states), self._noise[places]) for states, places in chunks]
        token, log_prob = (torch.cat(part) for part in zip(*parts, strict=True))
        same = torch.zeros(len(slots), int(counts.max()), dtype=torch.int64)
        same[row, place] = self._goes_on[token] * (token == self._draft[at])
        agreed = same.cumprod(1).sum(1)
        made = torch.minimum(agreed + 1, counts)
        kept = place < made[row]
        self._tokens[at[kept]], self._log_probs[at[kept]] = token[kept], log_prob[kept]
        self._token[slots] = last = token[counts.cumsum(0) - counts + made - 1]
        self._position[slots] += made
        self._cursor[slots] += made
        self._alive[slots] *= self._goes_on[last] * (self._cursor[slots] < self._limit[slots])
        self.computed += int(counts.sum())
        self.reused += int(made.sum())
        return slots[agreed == counts]


class DraftEngine(engine_module.BuiltinEngine):
    """The builtin engine, with seeds and drafts as further arguments."""

    run: DraftRun

    def generate_from(
        self, requests: Sequence[GenerationRequest], seeds: Sequence[int], drafts: Drafts, *,
        pass_tokens: int = PASS_TOKENS, least: int = LEAST,
    ) -> list[list[Completion]]:  # fmt: skip
        """Generate with a seed and drafts for each request, all of equal sampling. With equal seeds the same sample
        gets the same noise. A pass takes `pass_tokens` draft tokens of all rows, and at least `least` of a row. `run`
        holds the counts of the drafts."""

        def make(*args: Any) -> DraftRun:
            self.run = DraftRun(*args, seeds=seeds, drafts=drafts, pass_tokens=pass_tokens, least=least)
            return self.run

        plain = engine_module.Generation
        engine_module.Generation = make  # type: ignore[misc, assignment]
        try:
            return self.generate(requests)
        finally:
            engine_module.Generation = plain  # type: ignore[misc]
