"""The contract of a rollout engine: requests in, completions out, weights from a source. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from steepest.errors import RolloutError, setting
from steepest.registry import ModuleRegistry

if TYPE_CHECKING:
    from torch import Tensor

ROLLOUT_ENGINES = ModuleRegistry("rollout engine", setting("rollout_engine"), package="steepest.rollout.engines")
"""Factories: `factory(description, *, end_token_ids, pad_token_id, dtype, max_num_seqs, max_model_len,
kv_memory_bytes)`, where `description` is a `rollout.weights.ModelDescription`. An engine has no weights until
`load_weights`."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Log-probs are those of the distribution sampled from: after temperature, then top-k, then top-p,
    renormalised. Values out of range raise RolloutError."""

    max_tokens: int
    """Largest number of tokens of a response, the end token included."""
    temperature: float = 1.0
    """0 is greedy; the log-probs are then those of temperature 1, without top-k and top-p."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities reach this sum; 1 keeps all."""
    top_k: int = -1
    """Keep the k likeliest tokens; -1 keeps all."""
    n: int = 1
    """Responses per prompt."""
    seed: int = 0
    """The same seed gives the same tokens. Pass another seed in every step."""
    ignore_eos: bool = False
    """Continue after end tokens up to max_tokens; for benchmarks."""

    def __post_init__(self) -> None:
        problems = [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (1 keeps all)"),
            ("top_k", self.top_k == -1 or self.top_k >= 1, "-1 (all) or at least 1"),
            ("n", self.n >= 1, "at least 1"),
        ]
        for name, good, allowed in problems:
            if not good:
                raise RolloutError(f"sampling: {name}={getattr(self, name)}, but it has to be {allowed}.")


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, which gets `sampling.n` responses. Requests of one call may differ in their sampling."""

    token_ids: Sequence[int]
    """The prompt; at least one token, and fewer than the engine's max_model_len."""
    sampling: SamplingParams
    request_id: str
    """Unique within a call. Errors name it, and each completion of the request repeats it."""
    session_id: str | None = None
    """Requests with the same id are turns of one conversation: each prompt begins with the prompt and the response of
    the turn before. An engine may keep the KV cache of a session between calls. The three engines here ignore it."""
    media: Mapping[str, Any] | None = None
    """Inputs that are not tokens (images, audio), as the model's processor made them. The contract does not look into
    it. An engine that cannot use it raises RolloutError."""


@dataclass(frozen=True)
class Completion:
    """One response, with the token ids that the engine sampled; the trainer trains on these ids, never on text.

    The prompt "2 + 2 =" was asked with max_tokens=8, temperature=1 and n=1. The policy of step 12 answered " 4" and
    its end token (id 2):

        Completion(
            token_ids=[604, 2],           # " 4", then the end token, which is part of the response
            log_probs=[-0.105, -0.020],   # the policy gave " 4" a probability of 0.90, then the end token 0.98
            finish_reason="stop",
            policy_version=12,            # load_weights(source, version=12) was the last load before this call
            request_id="sums:7#0",
        )

    With max_tokens=1 it is `token_ids=[604]`, `log_probs=[-0.105]`, `finish_reason="length"`.
    """

    token_ids: list[int]
    """At least one, except after an abort. If an end token was sampled, it is the last."""
    log_probs: list[float]
    """One number per token: log of the token's probability in the distribution it was sampled from (see
    SamplingParams)."""
    finish_reason: Literal["stop", "length", "abort"]
    """"stop" after an end token. "length" at max_tokens or max_model_len. "abort" if the engine gave the request up:
    the response is not complete and must not be trained on; the trainer raises RolloutError."""
    policy_version: int
    """`version` of the weights that all tokens of this response were sampled with."""
    request_id: str
    """Id of the request that this response answers."""


class WeightSource(Protocol):
    """Supplies an engine with weights. `rollout.weights.LocalWeights` is the source within one process; any class with
    this method is a source, for example one that receives tensors from another process."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight once, whole, as (Hugging Face name, tensor), with an adapter merged. A head that is tied to the
        embedding is left out. The tensors may be on any device and of any dtype; the engine copies what it keeps before
        it asks for the next one. One call of `load_weights` iterates once."""
        ...


class RolloutEngine(Protocol):
    """Turns requests into responses with the weights of its last `load_weights`."""

    notes: tuple[str, ...]
    """Sentences for the user, complete after the first `load_weights`, to be printed once."""

    @property
    def copied_bytes(self) -> int:
        """Memory that the engine's own copies of the weights take now, in bytes."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        """Answer all requests and return when the last one is finished.

        Result i holds the `sampling.n` completions of request i. Each request is sampled with its own `sampling`.
        Raises RolloutError: no weights were loaded, the policy's weights changed after the last load (where the engine
        can see them), a duplicate request_id, an empty or overlong prompt, media that the engine cannot use.
        """
        ...

    def load_weights(self, source: WeightSource, version: int) -> None:
        """Take all weights from `source`. `version` is the trainer's step count, and is written on each completion.

        If it raises, the engine refuses to generate until a load succeeds.
        """
        ...

    def sleep(self) -> None:
        """Free memory until the next load_weights, where the engine can."""
        ...
