"""A rollout engine, a cluster, a tokenizer and a pool whose answers a test can foretell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.data.prompts import Prompt
from steepest.learner.critic import ValuesAndGradient
from steepest.learner.metrics import Metrics
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


class FakeCluster:
    """The roles of a run without a model. `calls` names what was asked of it, in order.

    A token's log-prob is -1 by the actor and -2 by the reference, its entropy 3, its value 4, and 5 at the end. Both
    updates and every generated token are one operation.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.flops = 0.0

    def _full(self, name: str, batch: Batch, value: float) -> Tensor:
        self.calls.append(name)
        return torch.full(batch.responses.shape, value).masked_fill(~batch.trained_mask, 0.0)

    def generation_flops(self, batch: Batch) -> float:
        return float(batch.response_lengths.sum())

    def release_engine(self) -> None:
        self.calls.append("release_engine")

    def publish(self, version: int) -> None:
        self.calls.append(f"publish {version}")

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._full("log_probs", batch, -1.0), torch.full(batch.responses.shape, 3.0)

    def log_probs_and_squares(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        return *self.log_probs(batch), self._full("squares", batch, 0.5)

    def policy_is_reference(self) -> bool:
        self.calls.append("policy_is_reference")
        return False

    def ref_log_probs(self, batch: Batch) -> Tensor:
        return self._full("ref_log_probs", batch, -2.0)

    def values(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._full("values", batch, 4.0), torch.full((len(batch),), 5.0)

    def values_and_gradient(self, batch: Batch, estimator: EstimatorCall) -> ValuesAndGradient:
        values = self._full("values_and_gradient", batch, 4.0)
        return ValuesAndGradient(values, torch.full((len(batch),), 5.0), {"the": 1.0})

    def update_actor(self, batch: Batch, step: int) -> Metrics:
        self.calls.append(f"update_actor {step}")
        self.flops += 1.0
        return {"actor/pg_loss": 1.0}

    def update_critic(self, batch: Batch, step: int) -> Metrics:
        self.calls.append(f"update_critic {step}")
        self.flops += 1.0
        return {"critic/vf_loss": 2.0}

    def step_critic(self, batch: Batch, found: ValuesAndGradient) -> Metrics:
        self.calls.append(f"step_critic with {found.metrics}")
        return {"critic/vf_loss": 2.0}

    def take_flops(self) -> float:
        taken, self.flops = self.flops, 0.0
        return taken


class NumberTokenizer:
    pad_token_id = 0

    def texts(self, batch: Batch) -> list[str]:
        rows = zip(batch.responses.tolist(), batch.response_lengths.tolist(), strict=True)
        return [" ".join(map(str, row[:n])) for row, n in rows]

    def opening(self, prompt_ids: Sequence[int]) -> str:
        return ""


class FakePool:
    """Scores with a function of the request."""

    def __init__(self, function: Callable[[RewardRequest], RewardResult]) -> None:
        self.function = function

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        return [self.function(request) for request in requests]


def exact(request: RewardRequest) -> RewardResult:
    """1 for an answer equal to the ground truth."""
    return RewardResult(float(request.solution == request.ground_truth), {"format": 1.0}, None)
