"""One call of generate: slots, prefill, decoding, results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.errors import RolloutError, setting
from steepest.rollout.api import Completion
from steepest.rollout.builtin.kv_cache import Chunk, DecodeContext, KVCache, PrefillContext, Prefix, chunks_of
from steepest.rollout.builtin.network import Network
from steepest.rollout.builtin.sampler import sample, uniforms
from steepest.rollout.builtin.scheduler import Group, Scheduler
from steepest.rollout.requests import SamplingGroup

MAX_PREFILL_TOKENS = 4096
"""Prompt tokens in one prefill pass, unless a single prompt is longer; bounds the activations."""
_SYNC_EVERY = 8
"""On an accelerator: steps between checks for rows that have ended. Each check waits for the device."""


@dataclass
class RolloutStats:
    """Counts of one run, or of all runs of the last call of generate."""

    prefill_tokens: int = 0
    decode_steps: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: int = 0

    def add(self, other: RolloutStats) -> None:
        """Add the counts of another run. Runs of a call share the KV cache, so its size is the largest one, not the
        sum."""
        self.prefill_tokens += other.prefill_tokens
        self.decode_steps += other.decode_steps
        self.generated_tokens += other.generated_tokens
        self.prefill_s += other.prefill_s
        self.decode_s += other.decode_s
        self.kv_bytes = max(self.kv_bytes, other.kv_bytes)


class Generation:
    """Generates the responses of one group of requests with equal sampling.

    The state of the slots is in tensors of S entries; the first n are active. The results are in (R, T + 1) tensors: a
    row that has ended writes into the last column until it is dropped."""

    def __init__(
        self,
        network: Network,
        cache: KVCache,
        group: SamplingGroup,
        ends: Sequence[int],
        num_slots: int,
        max_model_len: int,
        vocab_size: int,
    ) -> None:
        self._network, self._cache, self._group = network, cache, group
        self._sampling = sampling = group.sampling
        self._device = device = cache.device
        self._scheduler = Scheduler([request.token_ids for request in group.requests], sampling.n, num_slots)
        self._max_model_len = max_model_len
        rows, self._width = len(group.samples), sampling.max_tokens + 1
        numbers = torch.tensor(group.samples, dtype=torch.int64)
        self._uniforms = uniforms(sampling.seed, numbers, self._width).flatten().to(device)
        self._tokens = torch.zeros(rows * self._width, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(rows * self._width, dtype=torch.float32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._is_end = torch.zeros(vocab_size, dtype=torch.bool)
        self._is_end[[e for e in ends if e < vocab_size]] = True
        self._goes_on = (~self._is_end).to(device, torch.int64)
        # Slot state: row of the result, next input token and its position, next place in the results, end of that
        # row's places, and 1 while the row is alive.
        self._slots = torch.arange(num_slots, device=device)
        self._state = torch.zeros(6, num_slots, dtype=torch.int64, device=device)
        self._row, self._token, self._position, self._cursor, self._limit, self._alive = self._state
        self._n = 0
        self._max_position = 0
        # The context of the active rows; made again whenever rows come or go.
        self._chunks: list[Chunk] | None = None
        self._context: DecodeContext | None = None
        self._prefix: Prefix | None = None
        self._sync_every = 1 if device.type == "cpu" else _SYNC_EVERY
        self.stats = RolloutStats(kv_bytes=cache.allocated_bytes)

    def run(self, advance: Callable[[int], None] = lambda number: None) -> None:
        """Prefill and decode until no group waits and no row is active. `advance` hears of rows that have ended."""
        if self._device.type == "cpu" and (length := self._scheduler.common_prefix()):
            start = time.perf_counter()
            self._prefill_prefix(length)
            self.stats.prefill_s += time.perf_counter() - start
        while self._n or self._scheduler:
            start = time.perf_counter()
            if groups := self._scheduler.admit(self._n, MAX_PREFILL_TOKENS):
                self._prefill(groups)
                advance(self._drop_finished())
                self.stats.prefill_s += time.perf_counter() - start
            elif self._n:
                self._decode()
                if self.stats.decode_steps % self._sync_every == 0:
                    advance(self._drop_finished())
                self.stats.decode_s += time.perf_counter() - start

    def _prefill_prefix(self, length: int) -> None:
        """Run the common prefix of all prompts once."""
        self._cache.reserve(length, 0)
        ids = torch.tensor(self._scheduler.first_prompt()[:length])
        positions = torch.arange(length)
        context = PrefillContext(self._cache, [length], torch.zeros_like(ids), positions)
        self._network.hidden_states(ids, positions, context, ids[:1])
        self._prefix = Prefix(self._cache, length)
        self.stats.prefill_tokens += length

    def _prefill(self, groups: list[Group]) -> None:
        """Run the prompts of `groups`, give each sample its slot, and sample its first token."""
        device = self._device
        begin = 0 if self._prefix is None else self._prefix.length
        self._cache.reserve(max(len(g.prompt) for g in groups), self._n)
        lengths = torch.tensor([len(g.prompt) for g in groups])
        counts = torch.tensor([len(g.rows) for g in groups])
        firsts = self._n + counts.cumsum(0) - counts
        ids = torch.tensor([t for g in groups for t in g.prompt[begin:]])
        packed = lengths - begin
        ends = packed.cumsum(0)
        positions = torch.arange(len(ids)) - (ends - lengths).repeat_interleave(packed)
        slots = firsts.repeat_interleave(packed)
        if self._prefix is not None:
            self._prefix.write(self._cache, firsts)
        positions = positions.to(device)
        context = PrefillContext(self._cache, packed.tolist(), slots.to(device), positions, self._prefix)
        hidden = self._network.hidden_states(ids.to(device), positions, context, (ends - 1).to(device))
        logits = self._network.logits(hidden)
        self._share(counts, firsts, int(lengths.max()))

        new = slice(self._n, self._n + int(counts.sum()))
        row = torch.tensor([r for g in groups for r in g.rows])
        own_length = lengths.repeat_interleave(counts)
        room = (self._max_model_len - own_length).clamp(max=self._width - 1)
        first = row * self._width
        state = torch.stack([row, row, own_length - 1, first, first + room, torch.ones_like(row)])
        self._state[:, new] = state.to(device)
        self._n = new.stop
        self._sample(
            logits.repeat_interleave(counts.to(device), 0) if new.stop - new.start > len(groups) else logits, new
        )
        self._max_position = max(self._max_position, int(lengths.max()))
        self._chunks = self._context = None
        self.stats.prefill_tokens += len(ids)

    def _share(self, counts: Tensor, firsts: Tensor, length: int) -> None:
        """Copy each prompt's keys and values from its first sample's slot to the others'."""
        total = int(counts.sum())
        if total > len(counts):
            source = firsts.repeat_interleave(counts)
            target = torch.arange(self._n, self._n + total)
            copies = source != target
            self._cache.copy_slots(source[copies].to(self._device), target[copies].to(self._device), length)

    def _decode(self) -> None:
        """Decode one token for every active row."""
        n = self._n
        position = self._position[:n]
        chunks = self._lengths_now()
        if self._cache.reserve(max(length for _, _, length in chunks), n) or self._context is None:
            self._context = DecodeContext(self._cache, position, self._slots[:n], chunks)
        else:
            self._context.step(position, chunks)
        hidden = self._network.hidden_states(self._token[:n], position, self._context, None)
        self._sample(self._network.logits(hidden), slice(0, n))
        self._max_position += 1
        self.stats.decode_steps += 1

    def _lengths_now(self) -> list[Chunk]:
        """The active slots in chunks of about equal length. Each slot is one token longer than in the last step."""
        if self._device.type != "cpu":
            # Rows that have ended stay until the next check, so the bound can exceed the longest possible row.
            return [(0, self._n, min(self._max_position + 1, self._cache.longest))]
        if self._chunks is None:
            self._chunks = chunks_of(self._position[: self._n].tolist(), self._cache.num_heads)
        else:
            room = self._cache.longest
            self._chunks = [(start, stop, min(length + 1, room)) for start, stop, length in self._chunks]
        return self._chunks

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Sample for some slots, write the results, and advance them. A row that has ended moves one more place and
        stays."""
        cursor, alive = self._cursor[rows], self._alive[rows]
        s = self._sampling
        uniform = self._uniforms.index_select(0, cursor)
        token, log_prob = sample(logits, uniform, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        self._tokens.index_copy_(0, cursor, token)
        self._log_probs.index_copy_(0, cursor, log_prob)
        self._token[rows] = token
        self._position[rows] += alive
        cursor += alive
        alive *= self._goes_on.index_select(0, token) * (cursor < self._limit[rows])

    def _drop_finished(self) -> int:
        """Record the lengths of rows that have ended, and move the last active rows into their slots. Returns their
        number."""
        alive = self._alive[: self._n].bool()
        num_alive = int(alive.sum())
        if num_alive == self._n:
            return 0
        dead = (~alive).nonzero()[:, 0]
        row = self._row[dead]
        self._lengths[row] = self._cursor[dead] - row * self._width
        holes = dead[dead < num_alive]
        movers = alive[num_alive:].nonzero()[:, 0] + num_alive
        self._n = num_alive
        self._chunks = self._context = None
        if len(holes):
            self._cache.copy_slots(movers, holes, self._max_position + 1)
            self._state[:, holes] = self._state[:, movers]
        self._max_position = int(self._position[:num_alive].max()) if num_alive else 0
        return len(dead)

    def completions(self, policy_version: int) -> list[list[Completion]]:
        """The results, one list per request of the group. Raises RolloutError if the model produced NaN."""
        lengths, n = self._lengths.tolist(), self._sampling.n
        tokens, log_probs = (x.view(-1, self._width).cpu() for x in (self._tokens, self._log_probs))
        real = torch.arange(self._width) < self._lengths.cpu()[:, None]
        for row in (real & ~torch.isfinite(log_probs)).any(1).nonzero()[:1, 0].tolist():
            refuse_damaged(log_probs[row][real[row]].tolist(), self._group.requests[row // n].request_id)
        last = tokens.gather(1, (self._lengths.cpu() - 1)[:, None])[:, 0]
        stopped = self._is_end[last].tolist()
        self.stats.generated_tokens = sum(lengths)
        all_ids, all_log_probs = tokens.tolist(), log_probs.tolist()
        asked = [request.request_id for request in self._group.requests for _ in range(n)]
        made = [
            Completion(ids[:length], values[:length], "stop" if stop else "length", policy_version, request_id)
            for ids, values, length, stop, request_id in zip(
                all_ids, all_log_probs, lengths, stopped, asked, strict=True
            )
        ]
        return [made[start : start + n] for start in range(0, len(made), n)]


def refuse_damaged(log_probs: Sequence[float], request_id: str) -> None:
    """Raise RolloutError if one of a response's log-probs is not a number or infinite."""
    if not all(map(math.isfinite, log_probs)):
        raise RolloutError(
            f"the policy gave NaN or infinite logits for request {request_id}: its weights are damaged. Look at "
            f"actor/grad_norm before it, lower {setting('lr', 'actor')}, and resume from a checkpoint."
        )
