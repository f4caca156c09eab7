"""The in-process engine: continuous batching on the policy's own modules, log-probs in the same pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.devices.api import device_of
from steepest.devices.memory import GOES_ON, memory_guard, readable
from steepest.errors import RolloutError
from steepest.models.attention import RecordingContext
from steepest.models.causal_lm import CausalLM
from steepest.rollout.api import Completion, SamplingParams, check_prompts
from steepest.rollout.builtin.kv_cache import DecodeContext, KVCache, PrefillContext
from steepest.rollout.builtin.sampler import sample, uniforms
from steepest.rollout.builtin.scheduler import Group, Scheduler, num_slots_for

DEFAULT_KV_MEMORY_BYTES = 4 * 2**30
MAX_PREFILL_TOKENS = 4096
"""Prompt tokens in one prefill pass, unless a single prompt is longer; bounds the activations."""
_SHARE = (
    "Set actor_rollout_ref.rollout.dtype=float32, which generates with the trained weights and no copy, or take a "
    "smaller model."
)
_SYNC_EVERY = 8
"""Steps between looks at which rows have ended, on an accelerator, where each look waits for the device."""


@dataclass
class RolloutStats:
    """What the last call of generate did."""

    prefill_tokens: int = 0
    decode_steps: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    kv_bytes: int = 0


class BuiltinEngine:
    """Generates with the policy's weights, in its process.

    With `dtype` equal to the weights' own, the engine runs on the policy's modules: no copy, never stale. With another
    dtype it runs on a copy in that dtype, and `load_weights` has to be called after every update; `generate` raises
    RolloutError when that was forgotten.

    At most `max_num_seqs` sequences are active at once, fewer when `kv_memory_bytes` (default 4 GiB) holds fewer.
    Prompt plus response stay within `max_model_len`; a response cut by it has finish_reason "length".
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_num_seqs: int = 256,
        max_model_len: int,
        kv_memory_bytes: int | None = None,
    ) -> None:
        """`pad_token_id` plays no part here: nothing is padded. It is in the signature that engines share."""
        model.check_length(max_model_len)
        self._source = model
        self._shared = all(p.dtype == dtype for p in model.hf.parameters())
        self._device = device_of(next(model.parameters()).device)
        with memory_guard(self._device, lambda: (f"rollout: a copy of the weights in {dtype}", _SHARE)):
            self._model = model if self._shared else model.copy_as(dtype)
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._kv_memory_bytes = DEFAULT_KV_MEMORY_BYTES if kv_memory_bytes is None else kv_memory_bytes
        self._ends = sorted(set(end_token_ids))
        self._dtype = dtype
        self._cache: KVCache | None = None
        self._layout = (0, 0)
        self.version = 0
        self.notes: tuple[str, ...] = ()
        self.stats = RolloutStats()
        self._loaded = self._fingerprint()

    @property
    def shares_weights(self) -> bool:
        """Whether generation runs on the policy's own modules."""
        return self._shared

    def load_weights(self, version: int) -> None:
        """Note the trainer's version; where the engine has a copy, refresh it in place (buffers stay)."""
        if not self._shared:
            with torch.no_grad():
                pairs = zip(self._model.hf.parameters(), self._source.hf.parameters(), strict=True)
                for mine, theirs in pairs:
                    mine.copy_(theirs)
        self.version = version
        self._loaded = self._fingerprint()

    def _fingerprint(self) -> list[tuple[int, int]]:
        """Changes whenever torch writes into a weight or a weight gets other storage."""
        return [] if self._shared else [(p._version, p.data_ptr()) for p in self._source.hf.parameters()]

    def sleep(self) -> None:
        """Free the KV cache."""
        if self._cache is not None:
            self._cache.free()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """See RolloutEngine. A row's uniforms depend on (seed, row) alone, so its tokens do not depend on
        max_num_seqs, up to rounding of the logits."""
        check_prompts(prompts, self._max_model_len)
        if self._loaded != self._fingerprint():
            raise RolloutError(
                f"the policy's weights changed after version {self.version} was loaded into the rollout engine, so it "
                "would sample from old weights. Call load_weights() after every update."
            )
        if not prompts:
            return []
        with memory_guard(self._device, self._doing), _generation_mode(self._model):
            run = self._start(prompts, sampling)
            run.run()
        self.stats = run.stats
        return run.completions(len(prompts))

    def _doing(self) -> tuple[str, str]:
        """What generate does and what to lower, for when memory runs out."""
        slots, capacity = self._layout
        size = 0 if self._cache is None else slots * capacity * self._cache.bytes_per_token
        return (
            f"rollout: {slots} sequence(s) at once, each of at most {capacity} tokens, KV cache {readable(size)}",
            f"Lower actor_rollout_ref.rollout.max_num_seqs below {slots} (now {self._max_num_seqs}), "
            f"actor_rollout_ref.rollout.gpu_memory_utilization or data.max_response_length. {GOES_ON}",
        )

    def _start(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> _Run:
        device = next(self._model.parameters()).device
        if self._cache is None:
            context = RecordingContext([1], device)
            one = torch.zeros(1, dtype=torch.int64, device=device)
            self._model.hidden_states(one, one, context)
            self._cache = KVCache(context.shapes, self._dtype, device)
        capacity = min(max(len(p) for p in prompts) + sampling.max_tokens, self._max_model_len)
        num_slots = num_slots_for(
            capacity,
            len(prompts) * sampling.n,
            self._max_num_seqs,
            self._cache.bytes_per_token,
            self._kv_memory_bytes,
        )
        self._layout = num_slots, capacity
        self._cache.lay_out(num_slots, capacity)
        ends = [] if sampling.ignore_eos else self._ends
        return _Run(self._model, self._cache, prompts, sampling, ends, num_slots, self._max_model_len)


@contextmanager
def _generation_mode(model: CausalLM) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast inside the body."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device.type
    try:
        with torch.inference_mode(), torch.autocast(device, enabled=False):
            yield
    finally:
        model.train(training)


class _Run:
    """One call of generate. Per-slot state lives in tensors of S entries, of which the first n are active; results in
    (R, T + 1) tensors, where the last column takes what a row writes after its end until it is dropped."""

    def __init__(
        self,
        model: CausalLM,
        cache: KVCache,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        ends: Sequence[int],
        num_slots: int,
        max_model_len: int,
    ) -> None:
        self._model, self._cache, self._sampling = model, cache, sampling
        self._device = device = next(model.parameters()).device
        self._scheduler = Scheduler(prompts, sampling.n, num_slots)
        self._max_model_len = max_model_len
        rows, self._width = len(prompts) * sampling.n, sampling.max_tokens + 1
        self._uniforms = uniforms(sampling.seed, rows, self._width).flatten().to(device)
        self._tokens = torch.zeros(rows * self._width, dtype=torch.int64, device=device)
        self._log_probs = torch.zeros(rows * self._width, dtype=torch.float32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._is_end = torch.zeros(model.vocab_size, dtype=torch.bool)
        self._is_end[[e for e in ends if e < model.vocab_size]] = True
        self._goes_on = (~self._is_end).to(device, torch.int64)
        # Slot state: row of the result, next input token and its position, next place in the results, end of that
        # row's places, and 1 while the row is alive.
        self._slots = torch.arange(num_slots, device=device)
        self._state = torch.zeros(6, num_slots, dtype=torch.int64, device=device)
        self._row, self._token, self._position, self._cursor, self._limit, self._alive = self._state
        self._n = 0
        self._max_position = 0
        self._sync_every = 1 if device.type == "cpu" else _SYNC_EVERY
        self.stats = RolloutStats(kv_bytes=cache.allocated_bytes)

    def run(self) -> None:
        """Prefill and decode until nothing waits and nothing is active."""
        while self._n or self._scheduler:
            start = time.perf_counter()
            if groups := self._scheduler.admit(self._n, MAX_PREFILL_TOKENS):
                self._prefill(groups)
                self._drop_finished()
                self.stats.prefill_s += time.perf_counter() - start
            elif self._n:
                self._decode()
                if self.stats.decode_steps % self._sync_every == 0:
                    self._drop_finished()
                self.stats.decode_s += time.perf_counter() - start

    def _prefill(self, groups: list[Group]) -> None:
        """Run the prompts of `groups`, give each sample its slot, and sample its first token."""
        device = self._device
        lengths = torch.tensor([len(g.prompt) for g in groups])
        counts = torch.tensor([len(g.rows) for g in groups])
        firsts = self._n + counts.cumsum(0) - counts
        ids = torch.tensor([t for g in groups for t in g.prompt])
        ends = lengths.cumsum(0)
        positions = torch.arange(len(ids)) - (ends - lengths).repeat_interleave(lengths)
        slots = firsts.repeat_interleave(lengths)
        context = PrefillContext(self._cache, lengths.tolist(), slots.to(device), positions.to(device))
        hidden = self._model.hidden_states(ids.to(device), positions.to(device), context)
        logits = self._model.logits(hidden[(ends - 1).to(device)])
        self._share(counts, firsts, int(lengths.max()))

        new = slice(self._n, self._n + int(counts.sum()))
        row = torch.tensor([r for g in groups for r in g.rows])
        own_length = lengths.repeat_interleave(counts)
        room = (self._max_model_len - own_length).clamp(max=self._width - 1)
        begin = row * self._width
        state = torch.stack([row, row, own_length - 1, begin, begin + room, torch.ones_like(row)])
        self._state[:, new] = state.to(device)
        self._n = new.stop
        self._sample(logits.repeat_interleave(counts.to(device), 0), new)
        self._max_position = max(self._max_position, int(lengths.max()))
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
        """One token for every active row."""
        n = self._n
        position = self._position[:n]
        # Between two looks rows that have ended stay, so the bound can run past the longest row there can be.
        length = min(self._max_position + 1, self._cache.capacity)
        context = DecodeContext(self._cache, position, self._slots[:n], length)
        hidden = self._model.hidden_states(self._token[:n], position, context)
        self._sample(self._model.logits(hidden), slice(0, n))
        self._max_position += 1
        self.stats.decode_steps += 1

    def _sample(self, logits: Tensor, rows: slice) -> None:
        """Sample for some slots, write the results, move on. A row that has ended moves one last place, and stays."""
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

    def _drop_finished(self) -> None:
        """Note the lengths of rows that have ended and fill their slots with the last active rows."""
        alive = self._alive[: self._n].bool()
        num_alive = int(alive.sum())
        if num_alive == self._n:
            return
        dead = (~alive).nonzero()[:, 0]
        row = self._row[dead]
        self._lengths[row] = self._cursor[dead] - row * self._width
        holes = dead[dead < num_alive]
        movers = alive[num_alive:].nonzero()[:, 0] + num_alive
        self._n = num_alive
        if len(holes):
            self._cache.copy_slots(movers, holes, self._max_position + 1)
            self._state[:, holes] = self._state[:, movers]
        self._max_position = int(self._position[:num_alive].max()) if num_alive else 0

    def completions(self, num_prompts: int) -> list[list[Completion]]:
        """The results as lists. Raises RolloutError when the model produced NaN."""
        lengths, n = self._lengths.tolist(), self._sampling.n
        tokens, log_probs = (x.view(-1, self._width).cpu() for x in (self._tokens, self._log_probs))
        real = torch.arange(self._width) < self._lengths.cpu()[:, None]
        if not bool(torch.isfinite(log_probs[real]).all()):
            row = int((real & ~torch.isfinite(log_probs)).any(1).nonzero()[0])
            raise RolloutError(
                f"the policy gave NaN or infinite logits for prompt {row // n}: its weights are damaged. Look at "
                "actor/grad_norm before it, lower actor_rollout_ref.actor.optim.lr, and resume from a checkpoint."
            )
        last = tokens.gather(1, (self._lengths.cpu() - 1)[:, None])[:, 0]
        stopped = self._is_end[last].tolist()
        self.stats.generated_tokens = sum(lengths)
        all_ids, all_log_probs = tokens.tolist(), log_probs.tolist()
        made = [
            Completion(ids[:length], values[:length], "stop" if stop else "length")
            for ids, values, length, stop in zip(all_ids, all_log_probs, lengths, stopped, strict=True)
        ]
        return [made[i * n : i * n + n] for i in range(num_prompts)]
