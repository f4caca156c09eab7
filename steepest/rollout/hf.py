"""transformers' own generate: slow, padded, and independent of everything in builtin/. The reference of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from steepest.devices.api import device_of
from steepest.devices.memory import GOES_ON, memory_guard
from steepest.errors import RolloutError
from steepest.models.attention import attention_implementation
from steepest.models.causal_lm import CausalLM
from steepest.models.hf_logging import quiet_transformers
from steepest.rollout.api import Completion, SamplingParams, check_prompts


class HFEngine:
    """Runs `generate` of the policy's own transformers model, with sdpa attention and a cache of transformers'.

    It computes in the weights' dtype, and shares them, so it is never stale. Same seed, same tokens for the same call;
    a row's tokens do depend on the rows beside it.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        end_token_ids: Sequence[int],
        pad_token_id: int,
        dtype: torch.dtype = torch.float32,
        max_num_seqs: int = 32,
        max_model_len: int,
        kv_memory_bytes: int | None = None,
    ) -> None:
        """`max_num_seqs` rows are generated at a time. `kv_memory_bytes` has no effect. Raises RolloutError for a
        `dtype` other than the weights' own."""
        held = next(model.parameters()).dtype
        if dtype != held:
            raise RolloutError(
                f"actor_rollout_ref.rollout.name=hf generates in the weights' dtype, {held}, not in {dtype}. Set "
                f"actor_rollout_ref.rollout.dtype={str(held).removeprefix('torch.')}, or use builtin."
            )
        model.check_length(max_model_len)
        self._model, self._pad = model, pad_token_id
        self._ends = sorted(set(end_token_ids))
        self._max_num_seqs, self._max_model_len = max_num_seqs, max_model_len
        self._device = device_of(next(model.parameters()).device)
        self.version = 0
        self.notes: tuple[str, ...] = ()

    @property
    def copied_bytes(self) -> int:
        """See RolloutEngine: the weights are the policy's own."""
        return 0

    def load_weights(self, version: int) -> None:
        """Note the version; the weights are the policy's own."""
        self.version = version

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """See RolloutEngine."""
        check_prompts(prompts, self._max_model_len)
        rows = [list(p) for p in prompts for _ in range(sampling.n)]
        training = self._model.training
        self._model.eval()
        made: list[Completion] = []
        try:
            with self._own_random_numbers(), quiet_transformers(), attention_implementation(self._model.hf, "sdpa"):
                torch.manual_seed(sampling.seed)
                for start in range(0, len(rows), self._max_num_seqs):
                    with memory_guard(self._device, self._doing):
                        made += self._generate_rows(rows[start : start + self._max_num_seqs], sampling)
        finally:
            self._model.train(training)
        return [made[i * sampling.n : (i + 1) * sampling.n] for i in range(len(prompts))]

    def _own_random_numbers(self) -> AbstractContextManager[None]:
        """What the body draws and seeds, on the CPU and on every card, is put back after it."""
        kind = self._device.type
        return torch.random.fork_rng([] if kind == "cpu" else range(self._device.count()), device_type=kind)

    def _doing(self) -> tuple[str, str]:
        """What generate does and what to lower, for when memory runs out."""
        return (
            f"rollout: {self._max_num_seqs} sequence(s) at once",
            f"Lower actor_rollout_ref.rollout.max_num_seqs (now {self._max_num_seqs}) or data.max_response_length. "
            f"{GOES_ON}",
        )

    @torch.no_grad()
    def _generate_rows(self, rows: list[list[int]], sampling: SamplingParams) -> list[Completion]:
        hf, device = self._model.hf, next(self._model.parameters()).device
        width = max(len(r) for r in rows)
        ids = torch.tensor([[self._pad] * (width - len(r)) + r for r in rows], device=device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        own = hf.generation_config
        hf.generation_config = GenerationConfig()  # else generate fills ours with the model's own top_p and penalties
        try:
            out = hf.generate(ids, attention_mask=mask, generation_config=self._config(sampling))
        finally:
            hf.generation_config = own
        tokens = out.sequences[:, width:]
        scores = torch.stack(out.scores, 1).float()  # (rows, T, V), after temperature, top-k and top-p
        log_probs = scores.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        tokens, log_probs = tokens.cpu(), log_probs.cpu()
        return [self._completion(t, p, len(r), sampling) for t, p, r in zip(tokens, log_probs, rows, strict=True)]

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

    def _completion(
        self, tokens: Tensor, log_probs: Tensor, prompt_length: int, sampling: SamplingParams
    ) -> Completion:
        """Cut a row of generate's rectangle after its first end token, or at the length limit."""
        limit = min(len(tokens), self._max_model_len - prompt_length)
        ends = () if sampling.ignore_eos else self._ends
        ids = tokens[:limit].tolist()
        length = next((i + 1 for i, token in enumerate(ids) if token in ends), limit)
        reason = "stop" if ids[length - 1] in ends else "length"
        return Completion(ids[:length], log_probs[:length].tolist(), reason)  # type: ignore[arg-type]
