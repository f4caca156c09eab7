"""The in-process engine: continuous batching with the policy's weights, log-probs in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from steepest.devices.api import device_of
from steepest.devices.memory import GOES_ON, memory_guard, readable
from steepest.errors import RolloutError
from steepest.models.causal_lm import CausalLM
from steepest.process.malloc import given_back_when_freed
from steepest.rollout.api import Completion, SamplingParams, check_prompts
from steepest.rollout.builtin.choose_network import choose_network
from steepest.rollout.builtin.generation import Generation, RolloutStats
from steepest.rollout.builtin.kv_cache import KVCache
from steepest.rollout.builtin.scheduler import num_slots_for

DEFAULT_KV_MEMORY_BYTES = 4 * 2**30
_SHARE = (
    "Set actor_rollout_ref.rollout.dtype=float32, which generates with the trained weights and no copy, or take a "
    "smaller model."
)
_GIVE_BACK = (
    "Set actor_rollout_ref.rollout.free_cache_engine=true, which gives it back while the models train, or take a "
    "smaller model."
)


class BuiltinEngine:
    """Generates with the policy's weights, in its process.

    Models that are laid out like Llama run on a decoder of the engine's own; `notes` says why another one does not. On
    a CPU, and where `dtype` is not the weights' own, the engine holds copies (fused, and packed for the processor), and
    `load_weights` has to be called after every update; `generate` raises RolloutError when that was forgotten. Else it
    runs on the policy's modules: no copy, never stale.

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
        self._device = device_of(next(model.parameters()).device)
        self.notes: tuple[str, ...]
        self._dtype = dtype
        with memory_guard(self._device, self._copying), given_back_when_freed():
            self._network, self.notes = choose_network(model, dtype, max_model_len, self._device.memory().total)
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._kv_memory_bytes = DEFAULT_KV_MEMORY_BYTES if kv_memory_bytes is None else kv_memory_bytes
        self._ends = sorted(set(end_token_ids))
        self._cache: KVCache | None = None
        self._layout = (0, 0)
        self._asleep = False
        self.version = 0
        self.stats = RolloutStats()
        self._loaded = self._fingerprint()
        self._fresh = True
        """Whether copies are still those made here, so that the load at start has nothing to do."""

    @property
    def shares_weights(self) -> bool:
        """Whether generation runs on the policy's own weights alone."""
        return not self._network.copies

    @property
    def copied_bytes(self) -> int:
        """See RolloutEngine; 0 too after `sleep`."""
        return self._network.copied_bytes

    def load_weights(self, version: int) -> None:
        """Note the trainer's version; where the engine has copies, refresh them in place (buffers stay)."""
        found = self._fingerprint()
        if not (self._fresh and found == self._loaded):
            # After `sleep` there are none, and the next one is to give them back to the system.
            apart = given_back_when_freed() if self._asleep else nullcontext()
            with memory_guard(self._device, self._copying), apart:
                self._network.refresh()
        self.version, self._asleep, self._fresh = version, False, False
        self._loaded = found

    def _fingerprint(self) -> list[tuple[int, int]]:
        """Changes whenever torch writes into a weight or a weight gets other storage."""
        return [] if self.shares_weights else [(p._version, p.data_ptr()) for p in self._source.hf.parameters()]

    def sleep(self) -> None:
        """Free the KV cache, and copies of weights where they are made anew at each update anyway."""
        if self._cache is not None:
            self._cache.free()
        self._network.free()
        self._asleep, self._fresh = True, False

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
        if self._asleep:
            self.load_weights(self.version)
        device = next(self._source.parameters()).device.type
        with (
            memory_guard(self._device, self._doing),
            torch.inference_mode(),
            torch.autocast(device, enabled=False),
        ):
            run = self._start(prompts, sampling)
            run.run()
        self.stats = run.stats
        return run.completions(len(prompts))

    def _copying(self) -> tuple[str, str]:
        """For when memory runs out over a copy."""
        on_cpu = next(self._source.parameters()).device.type == "cpu"
        return f"rollout: a copy of the weights in {self._dtype}", _GIVE_BACK if on_cpu else _SHARE

    def _doing(self) -> tuple[str, str]:
        """What generate does and what to lower, for when memory runs out."""
        slots, capacity = self._layout
        size = 0 if self._cache is None else slots * capacity * self._cache.bytes_per_token
        return (
            f"rollout: {slots} sequence(s) at once, each of at most {capacity} tokens, KV cache {readable(size)}",
            f"Lower actor_rollout_ref.rollout.max_num_seqs below {slots} (now {self._max_num_seqs}), "
            f"actor_rollout_ref.rollout.gpu_memory_utilization or data.max_response_length. {GOES_ON}",
        )

    def _start(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Generation:
        device = next(self._source.parameters()).device
        if self._cache is None:
            self._cache = KVCache(self._network.shapes(), self._dtype, device)
        capacity = min(max(len(p) for p in prompts) + sampling.max_tokens, self._max_model_len)
        num_slots = num_slots_for(
            capacity,
            len(prompts) * sampling.n,
            self._max_num_seqs,
            self._cache.bytes_per_token,
            self._kv_memory_bytes,
        )
        self._layout = num_slots, capacity
        with given_back_when_freed():
            self._cache.lay_out(num_slots, capacity)
        ends = [] if sampling.ignore_eos else self._ends
        vocab_size = self._source.vocab_size
        return Generation(
            self._network, self._cache, prompts, sampling, ends, num_slots, self._max_model_len, vocab_size
        )
