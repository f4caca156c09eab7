"""A rollout engine, a tokenizer and a pool whose answers a test can foretell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steepest.data.prompts import Prompt
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.rollout.api import Completion, GenerationRequest, SamplingParams


def prompt(number: int, *, source: str = "toy") -> Prompt:
    """A prompt whose only token is its number, which is also the right answer."""
    return Prompt(f"rows:{number}", [{"role": "user", "content": str(number)}], source, str(number), {}, (number,))


class EchoEngine:
    """Answers prompt [p] with [p + 100 * k] for its k-th sample; remembers what it was asked."""

    def __init__(self, finish_reason: str = "stop") -> None:
        self.finish_reason = finish_reason
        self.calls: list[tuple[list[tuple[int, ...]], SamplingParams]] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        (sampling,) = {request.sampling for request in requests}
        self.calls.append(([tuple(request.token_ids) for request in requests], sampling))
        return [
            [
                Completion([request.token_ids[0] + 100 * k], [-1.0], self.finish_reason, 0, request.request_id)  # type: ignore[arg-type]
                for k in range(sampling.n)
            ]
            for request in requests
        ]


class NumberTokenizer:
    pad_token_id = 0

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(map(str, row)) for row in rows]


class FakePool:
    """Scores with a function of the request."""

    def __init__(self, function: Callable[[RewardRequest], RewardResult]) -> None:
        self.function = function

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        return [self.function(request) for request in requests]


def exact(request: RewardRequest) -> RewardResult:
    """1 for an answer equal to the ground truth."""
    return RewardResult(float(request.solution == request.ground_truth), {"format": 1.0}, None)
