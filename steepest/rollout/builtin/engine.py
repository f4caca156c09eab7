"""Steepest's own engine: continuous batching in torch, with log-probs from the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from steepest.devices.api import device_of
from steepest.devices.memory import RESUMES, memory_guard, readable
from steepest.errors import RolloutError, setting
from steepest.process.malloc import given_back_when_freed
from steepest.progress import STEP
from steepest.rollout.api import Completion, GenerationRequest, WeightSource
from steepest.rollout.builtin.choose_network import PACKED_SHARE, choose_network
from steepest.rollout.builtin.generation import Generation, RolloutStats
from steepest.rollout.builtin.kv_cache import KVCache
from steepest.rollout.builtin.network import Network
from steepest.rollout.builtin.own_forward import OwnForward, OwnGeneration
from steepest.rollout.builtin.scheduler import num_slots_for
from steepest.rollout.requests import SamplingGroup, check_requests, generate_in_groups
from steepest.rollout.weights import EngineModel, Fingerprint, ModelDescription

DEFAULT_KV_MEMORY_BYTES = 4 * 2**30
_SHARE = (
    f"Set {setting('dtype', 'rollout')}=float32, which generates with the trained weights and no copy, or take a "
    "smaller model."
)
_GIVE_BACK = (
    f"Set {setting('free_cache_engine')}=true, which gives it back while the models train, or take a smaller model."
)


class BuiltinEngine:
    """Generates in torch, with weights from any source; with `LocalWeights` on the trainer's own modules.

    Models with Llama's layout run on the engine's own decoder; `notes` gives the reason if a model does not. On a CPU,
    and if `dtype` is not the dtype of the weights, the engine holds copies (fused, and packed for the processor). Then
    `load_weights` must be called after every update; otherwise `generate` raises RolloutError. In other cases, with
    `LocalWeights`, it runs on the policy's modules, so it needs no copy and is never out of date. With another source
    it builds its own model at the first load and copies each load into it. Tokens and log-probs are the same for both
    sources, bit for bit (for a policy with an adapter: up to rounding, since a stream sends merged matrices).

    At most `max_num_seqs` sequences are active at once, fewer when `kv_memory_bytes` (default 4 GiB) holds fewer.
    Prompt plus response stay within `max_model_len`; a response cut by it has finish_reason "length".
    """

    def __init__(
        self,
        description: ModelDescription,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_num_seqs: int = 256,
        max_model_len: int,
        kv_memory_bytes: int | None = None,
        packed_share: float = PACKED_SHARE,
    ) -> None:
        """`pad_token_id` is not used, because nothing is padded; all engines share this signature.

        `packed_share` is the largest share of the machine's memory for packed copies of weights that need no copy.
        """
        description.check_length(max_model_len)
        self._description, self._model = description, EngineModel(description)
        self._device = device_of(description.device)
        self._dtype = dtype
        self._packed_share = packed_share
        self._network: Network | None = None
        self.notes: tuple[str, ...] = ()
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._kv_memory_bytes = DEFAULT_KV_MEMORY_BYTES if kv_memory_bytes is None else kv_memory_bytes
        self._ends = sorted(set(end_token_ids))
        self._cache: KVCache | None = None
        self._layout = (0, 0)
        self._asleep = False
        self.version = 0
        self.stats = RolloutStats()
        self._loaded: Fingerprint | None = None
        """Fingerprint at the last load; None before the first one and after a failed one."""

    @property
    def shares_weights(self) -> bool:
        """True if generation uses the trainer's own weights only."""
        return self._model.shared and self._network is not None and not self._network.copies

    @property
    def copied_bytes(self) -> int:
        """See RolloutEngine. After `sleep` it is the size of the engine's own model, if it has one, else 0."""
        return self._model.own_bytes + (0 if self._network is None else self._network.copied_bytes)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See RolloutEngine. Copies are refreshed in place; their buffers are kept."""
        self._loaded = None
        with memory_guard(self._device, self._copying):
            model = self._model.load(source)
            found = self._model.fingerprint()
            if self._network is None:
                memory = self._device.memory().total
                with given_back_when_freed():
                    self._network, self.notes = choose_network(
                        model, self._dtype, self._max_model_len, memory, self._packed_share
                    )
            else:
                self._refresh(self._network)
        self.version, self._asleep = version, False
        self._loaded = [] if self.shares_weights else found

    def _refresh(self, network: Network) -> None:
        if not self._asleep:
            network.refresh()
            return
        with given_back_when_freed():  # so that the next `sleep` can return the copies' memory to the system
            network.refresh()

    def sleep(self) -> None:
        """Free the KV cache, and those copies of weights that the next `load_weights` makes again."""
        if self._cache is not None:
            self._cache.free()
        if self._network is not None:
            self._network.free()
        self._asleep = True

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """See RolloutEngine. The random numbers of a sample depend on its seed and its number in the call alone, so its
        tokens do not depend on max_num_seqs, up to rounding of the logits. Requests of equal sampling run together, one
        group after the other."""
        check_requests(requests, self._max_model_len, engine="builtin")
        network = self._network_of_this_policy()
        if not requests:
            return []
        if self._asleep:
            with memory_guard(self._device, self._copying):
                self._refresh(network)
            self._asleep = False
        self.stats = RolloutStats()
        with STEP.activity("gen", sum(request.sampling.n for request in requests)) as generating:
            return generate_in_groups(requests, partial(self._generate, network, generating.advance))

    def _network_of_this_policy(self) -> Network:
        """The network. Raises RolloutError without weights, or if they are older than the policy's."""
        if self._network is None or self._loaded is None:
            raise RolloutError("the rollout engine has no weights: load_weights() was not called, or it failed.")
        if self._loaded != ([] if self.shares_weights else self._model.fingerprint()):
            raise RolloutError(
                f"the policy's weights changed after version {self.version} was loaded into the rollout engine, so it "
                "would sample from old weights. Call load_weights() after every update."
            )
        return self._network

    def _generate(
        self, network: Network, advance: Callable[[int], None], group: SamplingGroup
    ) -> list[list[Completion]]:
        with (
            memory_guard(self._device, self._doing),
            torch.inference_mode(),
            torch.autocast(self._description.device.type, enabled=False),
        ):
            run = self._start(network, group)
            run.run(advance)
        made = run.completions(self.version)
        self.stats.add(run.stats)
        return made

    def _copying(self) -> tuple[str, str]:
        """Text for an out-of-memory error while weights are copied."""
        on_cpu = self._description.device.type == "cpu"
        return f"rollout: a copy of the weights in {self._dtype}", _GIVE_BACK if on_cpu else _SHARE

    def _doing(self) -> tuple[str, str]:
        """Text for an out-of-memory error: what `generate` was doing, and the key to lower."""
        slots, capacity = self._layout
        size = 0 if self._cache is None else slots * capacity * self._cache.bytes_per_token
        return (
            f"rollout: {slots} sequence(s) at once, each of at most {capacity} tokens, KV cache {readable(size)}",
            f"Lower {setting('max_num_seqs')} below {slots} (now {self._max_num_seqs}), "
            f"{setting('gpu_memory_utilization')} or {setting('max_response_length')}. {RESUMES}",
        )

    def _start(self, network: Network, group: SamplingGroup) -> Generation | OwnGeneration:
        ends = [] if group.sampling.ignore_eos else self._ends
        if isinstance(network, OwnForward):
            rows = min(self._max_num_seqs, len(group.samples))
            return OwnGeneration(network, group, ends, rows, self._max_model_len)
        if self._cache is None:
            self._cache = KVCache(network.shapes(), self._dtype, self._description.device)
        longest = max(len(request.token_ids) for request in group.requests)
        capacity = min(longest + group.sampling.max_tokens, self._max_model_len)
        num_slots = num_slots_for(
            capacity,
            len(group.samples),
            self._max_num_seqs,
            self._cache.bytes_per_token,
            self._kv_memory_bytes,
        )
        self._layout = num_slots, capacity
        with given_back_when_freed():
            self._cache.lay_out(num_slots, capacity)
        vocab_size = self._description.vocab_size
        return Generation(network, self._cache, group, ends, num_slots, self._max_model_len, vocab_size)
