"""What every rollout engine offers, and what it is asked for. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from steepest.errors import RolloutError
from steepest.registry import Registry

ROLLOUT_ENGINES = Registry("rollout engine", "actor_rollout_ref.rollout.name")
"""Factories: `factory(model, *, end_token_ids, pad_token_id, dtype, max_num_seqs, max_model_len, kv_memory_bytes)`."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Log-probs are those of the distribution sampled from: after temperature, then top-k, then top-p,
    renormalised. Values out of range raise RolloutError."""

    max_tokens: int
    """Most tokens of a response, the end token included."""
    temperature: float = 1.0
    """0 is greedy; the log-probs are then those of temperature 1, without top-k and top-p."""
    top_p: float = 1.0
    """Keep the likeliest tokens until their probabilities reach this sum; 1 keeps all."""
    top_k: int = -1
    """Keep the k likeliest tokens; -1 keeps all."""
    n: int = 1
    """Responses per prompt."""
    seed: int = 0
    """Same seed, same tokens. Give every step a seed of its own."""
    ignore_eos: bool = False
    """Go on after end tokens up to max_tokens; for benchmarks."""

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
class Completion:
    """One response as the engine made it; these ids reach the trainer, no text in between."""

    token_ids: list[int]
    """At least one; the end token, where there is one, is the last."""
    log_probs: list[float]
    """One a token, of the distribution it was sampled from."""
    finish_reason: Literal["stop", "length"]
    """"stop" after an end token, "length" at a limit."""


class RolloutEngine(Protocol):
    """Turns prompts into responses with the policy's current weights."""

    notes: tuple[str, ...]
    """What the user should know about the engine, said once at start."""

    @property
    def copied_bytes(self) -> int:
        """What its copies of the policy's weights take now."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Completion]]:
        """`sampling.n` completions for each prompt, in the order of the prompts. Raises RolloutError."""
        ...

    def load_weights(self, version: int) -> None:
        """Take over the policy's weights as they are now; `version` is the trainer's step count."""
        ...

    def sleep(self) -> None:
        """Give memory back until the next load_weights, where the engine can."""
        ...


def check_prompts(prompts: Sequence[Sequence[int]], max_model_len: int) -> None:
    """Raises RolloutError for an empty prompt and for one that leaves no room for a response token."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise RolloutError(f"prompt {i} is empty: a response needs at least one token before it.")
        if len(prompt) >= max_model_len:
            raise RolloutError(
                f"prompt {i} has {len(prompt)} tokens and max_model_len is {max_model_len}: no room for a response. "
                "Raise actor_rollout_ref.rollout.max_model_len or lower data.max_prompt_length."
            )
