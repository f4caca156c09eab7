"""Generation by a model's own forward pass and cache, for models that run in rows (`models/rows.py`).

transformers' `generate` keeps the cache, whatever kind that is: keys and values, or states of recurrent layers. The
sampler is the engine's. Prompts of equal length run together, so that nothing is padded: not every family honours
padding on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from steepest.core.log_probs import log_softmax
from steepest.errors import ModelError, setting
from steepest.models.architectures import TRIAL_ERRORS, first_line
from steepest.models.attention import set_own_attention
from steepest.models.causal_lm import CausalLM
from steepest.models.hf_logging import quiet_transformers
from steepest.models.rows import RowsContext, rows_reason
from steepest.rollout.api import Completion, SamplingParams
from steepest.rollout.builtin.generation import RolloutStats, refuse_damaged
from steepest.rollout.builtin.network import ModelNetwork
from steepest.rollout.builtin.sampler import sample, uniforms
from steepest.rollout.requests import SamplingGroup

_PROMPT, _STEPS = 5, 3
_TOLERANCE = 1e-4


class OwnForward(ModelNetwork):
    """The model, on the policy itself or on a copy in another dtype, with the way its cache is used."""

    def __init__(self, source: CausalLM, dtype: torch.dtype) -> None:
        """Raises ModelError if generation gives other log-probs than a pass over the whole sequence."""
        super().__init__(source, dtype)
        self.with_cache = True
        if _wrong(source, with_cache=True) is None:
            return
        self.with_cache = False
        if (wrong := _wrong(source, with_cache=False)) is not None:
            raise ModelError(
                f"{type(source.hf).__name__} cannot be trained with {setting('rollout_engine')}=builtin: its own "
                f"generation {wrong}. Name another model with {setting('path')}, or take another engine."
            )

    def run(self, ids: Tensor, chooser: LogitsProcessor, steps: int, ends: Sequence[int]) -> Tensor:
        """See `generate`."""
        return generate(self.model, ids, chooser, steps, ends, with_cache=self.with_cache)


def generate(
    model: CausalLM, ids: Tensor, chooser: LogitsProcessor, steps: int, ends: Sequence[int], *, with_cache: bool
) -> Tensor:
    """Rows of equal length -> rows with up to `steps` more tokens, which `chooser` has chosen. A row that has ended is
    filled with an end token."""
    hf = model.hf
    own, training = hf.generation_config, hf.training
    hf.generation_config = GenerationConfig()  # else transformers adds the model's own settings to ours
    hf.eval()
    config = GenerationConfig(
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
        use_cache=with_cache,
    )
    try:
        with quiet_transformers(), _own_attention(hf):
            made: Tensor = hf.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([chooser]),
            )
    finally:
        hf.generation_config = own
        hf.train(training)
    return made


@contextmanager
def _own_attention(hf: PreTrainedModel) -> Iterator[None]:
    """transformers' attention in the `with` block, for a model that the trainer runs on packed sequences."""
    if rows_reason(hf) is not None:
        yield
        return
    before = hf.config._attn_implementation
    set_own_attention(hf)
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def _wrong(model: CausalLM, *, with_cache: bool) -> str | None:
    """What is wrong with generation; None if nothing is."""
    try:
        found = _difference(model, with_cache)
    except TRIAL_ERRORS as error:
        return f"fails ({first_line(error)})"
    tolerance = _TOLERANCE if next(model.parameters()).dtype == torch.float32 else 0.1
    return None if found <= tolerance else f"differs by {found:.2g} from a pass over the whole sequence"


@torch.no_grad()
def _difference(model: CausalLM, with_cache: bool) -> float:
    """The largest difference of log-probs between generation and one pass over the same tokens."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, _PROMPT), generator=generator).to(device)
    seen = _Greedy()
    made = generate(model, ids, seen, _STEPS, (), with_cache=with_cache)
    length = made.shape[1] - 1
    with _own_attention(model.hf):
        hidden = RowsContext([length] * 2, device).run(model.hf.base_model, made[:, :-1].flatten())
    want = model.logits(hidden).view(2, length, -1)[:, _PROMPT - 1 :].flatten(0, 1)
    found = torch.stack(seen.logits, 1).flatten(0, 1)
    return float((log_softmax(want) - log_softmax(found)).abs().max())


class _Greedy(LogitsProcessor):
    """Leaves the logits as they are and keeps a copy."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.float().clone())
        return scores


class _Sampler(LogitsProcessor):
    """Samples a token for each row and leaves it the only possible one."""

    def __init__(self, sampling: SamplingParams, uniform: Tensor) -> None:
        """`uniform` is (rows, steps)."""
        self._sampling, self._uniform = sampling, uniform
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        s, column = self._sampling, self._uniform[:, len(self.log_probs)]
        token, log_prob = sample(
            scores.float().clone(), column, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p
        )
        self.log_probs.append(log_prob)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


class OwnGeneration:
    """Generates the responses of one group of requests with equal sampling. See `Generation`."""

    def __init__(
        self, network: OwnForward, group: SamplingGroup, ends: Sequence[int], num_slots: int, max_model_len: int
    ) -> None:
        """`num_slots` rows run at a time."""
        self._network, self._group, self._ends = network, group, list(ends)
        self._num_slots, self._max_model_len = num_slots, max_model_len
        self._made: dict[int, tuple[list[int], list[float]]] = {}
        self.stats = RolloutStats()

    def run(self, advance: Callable[[int], None] = lambda number: None) -> None:
        """Generate every row. `advance` hears of rows that have ended."""
        n = self._group.sampling.n
        by_length: dict[int, list[int]] = {}
        for row in range(len(self._group.samples)):
            by_length.setdefault(len(self._group.requests[row // n].token_ids), []).append(row)
        for rows in by_length.values():
            for start in range(0, len(rows), self._num_slots):
                part = rows[start : start + self._num_slots]
                self._run_rows(part)
                advance(len(part))

    def _run_rows(self, rows: list[int]) -> None:
        sampling, device = self._group.sampling, next(self._network.model.parameters()).device
        prompts = [list(self._group.requests[row // sampling.n].token_ids) for row in rows]
        length = len(prompts[0])
        steps = min(sampling.max_tokens, self._max_model_len - length)
        numbers = torch.tensor([self._group.samples[row] for row in rows], dtype=torch.int64)
        sampler = _Sampler(sampling, uniforms(sampling.seed, numbers, steps).to(device))
        made = self._network.run(torch.tensor(prompts, device=device), sampler, steps, self._ends)[:, length:].tolist()
        log_probs = torch.stack(sampler.log_probs, 1).tolist()
        for row, ids, values in zip(rows, made, log_probs, strict=True):
            count = next((i + 1 for i, token in enumerate(ids) if token in self._ends), len(ids))
            self._made[row] = ids[:count], values[:count]
            self.stats.generated_tokens += count
        self.stats.prefill_tokens += length * len(rows)
        self.stats.decode_steps += len(sampler.log_probs)

    def completions(self, policy_version: int) -> list[list[Completion]]:
        """See `Generation.completions`."""
        n, answers = self._group.sampling.n, []
        for place, request in enumerate(self._group.requests):
            parts = [self._made[row] for row in range(place * n, place * n + n)]
            for _, values in parts:
                refuse_damaged(values, request.request_id)
            answers.append(
                [
                    Completion(
                        ids, values, "stop" if ids[-1] in self._ends else "length", policy_version, request.request_id
                    )
                    for ids, values in parts
                ]
            )
        return answers
