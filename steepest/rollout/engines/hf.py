"""transformers' own generate: slow, padded, without any code of builtin/. The tests use it as reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from steepest.core.log_probs import log_softmax
from steepest.devices.api import device_of
from steepest.devices.memory import RESUMES, memory_guard
from steepest.errors import RolloutError, setting
from steepest.models.attention import attention_implementation
from steepest.models.causal_lm import CausalLM
from steepest.models.hf_logging import quiet_transformers
from steepest.progress import STEP
from steepest.rollout.api import ROLLOUT_ENGINES, Completion, GenerationRequest, SamplingParams, WeightSource
from steepest.rollout.requests import SamplingGroup, check_requests, generate_in_groups
from steepest.rollout.weights import EngineModel, ModelDescription


@ROLLOUT_ENGINES.register("hf")
class HFEngine:
    """Runs `generate` of a transformers model, with transformers' sdpa attention and KV cache.

    It computes in the weights' dtype. With `LocalWeights` it shares the policy's model, so it is never out of date;
    with another source it has its own model. The same call with the same seed gives the same tokens, but the tokens of
    a row depend on the rows that are generated with it.
    """

    def __init__(
        self,
        description: ModelDescription,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_num_seqs: int = 32,
        max_model_len: int,
        kv_memory_bytes: int | None = None,
    ) -> None:
        """`max_num_seqs` rows are generated at a time. `kv_memory_bytes` has no effect. Raises RolloutError for a
        `dtype` other than the weights' own, and for a model that runs in rows."""
        held = description.dtype
        if dtype != held:
            raise RolloutError(
                f"{setting('rollout_engine')}=hf generates in the weights' dtype, {held}, not in {dtype}. Set "
                f"{setting('dtype', 'rollout')}={str(held).removeprefix('torch.')}, or use builtin."
            )
        if description.rows is not None:
            raise RolloutError(
                f"{setting('rollout_engine')}=hf pads prompts on the left, which is not sure to be right for "
                f"{description.architecture.__name__}: {description.rows}. Use builtin."
            )
        description.check_length(max_model_len)
        self._held, self._pad = EngineModel(description), pad_token_id
        self._model: CausalLM | None = None
        """The model with the weights of the last load; None before the first one and after a failed one."""
        self._ends = sorted(set(end_token_ids))
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._device = device_of(description.device)
        self.version = 0
        self.notes: tuple[str, ...] = ()

    @property
    def copied_bytes(self) -> int:
        """See RolloutEngine: 0 with `LocalWeights`."""
        return self._held.own_bytes

    def load_weights(self, source: WeightSource, version: int) -> None:
        """See RolloutEngine. With `LocalWeights` nothing is copied."""
        self._model = None
        with memory_guard(self._device, self._doing):
            self._model = self._held.load(source)
        self.version = version

    def sleep(self) -> None:
        """Do nothing: between calls the engine holds only its own model, if it has one, which stays in memory."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """See RolloutEngine. Requests of equal sampling run together, one group after the other."""
        check_requests(requests, self._max_model_len, engine="hf")
        model = self._model
        if model is None:
            raise RolloutError("the rollout engine has no weights: load_weights() was not called, or it failed.")
        training = model.training
        model.eval()
        try:
            with (
                self._own_random_numbers(),
                quiet_transformers(),
                attention_implementation(model.hf, "sdpa"),
                STEP.activity("gen", sum(request.sampling.n for request in requests)) as generating,
            ):
                return generate_in_groups(requests, partial(self._generate, model, generating.advance))
        finally:
            model.train(training)

    def _generate(
        self, model: CausalLM, advance: Callable[[int], None], group: SamplingGroup
    ) -> list[list[Completion]]:
        n = group.sampling.n
        rows = [request for request in group.requests for _ in range(n)]
        torch.manual_seed(group_seed(group.sampling.seed, group.samples[0]))
        made: list[Completion] = []
        for start in range(0, len(rows), self._max_num_seqs):
            with memory_guard(self._device, self._doing):
                made += self._generate_rows(model, rows[start : start + self._max_num_seqs], group.sampling)
            advance(len(made) - start)
        return [made[start : start + n] for start in range(0, len(made), n)]

    def _own_random_numbers(self) -> AbstractContextManager[None]:
        """Restore the state of the random generators, on the CPU and on every card, after the `with` block."""
        kind = self._device.type
        return torch.random.fork_rng([] if kind == "cpu" else range(self._device.count()), device_type=kind)

    def _doing(self) -> tuple[str, str]:
        """Text for an out-of-memory error: what `generate` was doing, and the key to lower."""
        return (
            f"rollout: {self._max_num_seqs} sequence(s) at once",
            f"Lower {setting('max_num_seqs')} (now {self._max_num_seqs}) or {setting('max_response_length')}. "
            f"{RESUMES}",
        )

    @torch.no_grad()
    def _generate_rows(
        self, model: CausalLM, requests: Sequence[GenerationRequest], sampling: SamplingParams
    ) -> list[Completion]:
        hf, device = model.hf, next(model.parameters()).device
        rows = [list(request.token_ids) for request in requests]
        width = max(len(r) for r in rows)
        ids = torch.tensor([[self._pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        own = hf.generation_config
        hf.generation_config = GenerationConfig()  # else generate adds the model's own top_p and penalties to ours
        try:
            out = hf.generate(ids, attention_mask=mask, generation_config=self._config(sampling))
        finally:
            hf.generation_config = own
        tokens = out.sequences[:, width:]
        # out.scores: T times (rows, V), after temperature, top-k and top-p
        columns = [log_softmax(s.float()).gather(1, tokens[:, t, None]) for t, s in enumerate(out.scores)]
        log_probs = torch.cat(columns, 1)
        tokens, log_probs = tokens.cpu(), log_probs.cpu()
        return [self._completion(t, p, request) for t, p, request in zip(tokens, log_probs, requests, strict=True)]

    def _config(self, sampling: SamplingParams) -> GenerationConfig:
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            top_k = max(sampling.top_k, 0)
            options.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=top_k)
        return GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            eos_token_id=None if sampling.ignore_eos else self._ends,
            pad_token_id=self._pad,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )

    def _completion(self, tokens: Tensor, log_probs: Tensor, request: GenerationRequest) -> Completion:
        """Cut a row of generate's output after its first end token, or at the length limit."""
        limit = min(len(tokens), self._max_model_len - len(request.token_ids))
        ends = () if request.sampling.ignore_eos else self._ends
        ids = tokens[:limit].tolist()
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), limit)
        stopped = ids[length - 1] in ends
        return Completion(
            ids[:length],
            log_probs[:length].tolist(),
            "stop" if stopped else "length",
            self.version,
            request.request_id,
        )


def group_seed(seed: int, first_sample: int) -> int:
    """Seed of the group whose first sample has this number in the call: `seed` itself for the first group, and another
    number for each later one, so that groups of equal seeds do not draw the same random numbers."""
    return seed if first_sample == 0 else (seed + first_sample * 6364136223846793005) % (2**63 - 1)
