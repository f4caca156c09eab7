"""From prompts to scored responses, one turn each: the trainer's side of the rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from steepest.core.batch import Batch
from steepest.data.prompts import Prompt
from steepest.data.sampler import PromptSampler
from steepest.errors import RolloutError
from steepest.rollout.api import Completion, GenerationRequest, SamplingParams
from steepest.trainer.experience.api import Experience
from steepest.trainer.experience.scoring import StepScorer
from steepest.trainer.loop import Timer


class Generates(Protocol):
    """A rollout engine, or the cluster that holds one."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]: ...


def generate_batch(engine: Generates, prompts: Sequence[Prompt], sampling: SamplingParams, *, pad_id: int) -> Batch:
    """`sampling.n` responses for each prompt, the responses of one prompt side by side, in the order of `prompts`.

    Raises RolloutError when the engine's answers do not fit the prompts, and when it aborted one of them.
    """
    requests = [
        GenerationRequest(prompt.token_ids, sampling, f"{prompt.uid}#{place}") for place, prompt in enumerate(prompts)
    ]
    answers = engine.generate(requests)
    _check(answers, requests)
    pairs = [(i, answer) for i, group in enumerate(answers) for answer in group]
    return Batch.from_sequences(
        [prompts[i].token_ids for i, _ in pairs],
        [answer.token_ids for _, answer in pairs],
        group_ids=[i for i, _ in pairs],
        truncated=[answer.finish_reason == "length" for _, answer in pairs],
        rollout_log_probs=[answer.log_probs for _, answer in pairs],
        samples=[prompts[i] for i, _ in pairs],
        pad_id=pad_id,
    )


def _check(answers: Sequence[Sequence[Completion]], requests: Sequence[GenerationRequest]) -> None:
    """Everything after this pairs by position: a missing answer would move all later ones to a wrong prompt."""
    if len(answers) != len(requests):
        raise RolloutError(f"the rollout engine answered {len(answers)} prompts of {len(requests)}.")
    for request, group in zip(requests, answers, strict=True):
        prompt, n = request.request_id, request.sampling.n
        if len(group) != n:
            raise RolloutError(f"the rollout engine gave {len(group)} responses to prompt {prompt}, asked for {n}.")
        for answer in group:
            if answer.request_id != prompt:
                raise RolloutError(
                    f"the rollout engine answered request {answer.request_id} in the place of prompt {prompt}: its "
                    "answers are out of order."
                )
            if answer.finish_reason == "abort":
                raise RolloutError(
                    f"the rollout engine aborted the response to prompt {prompt} after {len(answer.token_ids)} tokens. "
                    "An incomplete response is not trained on, so the run ends; the engine's own messages above say "
                    "why. The same command resumes from the last checkpoint."
                )
            if not answer.token_ids or len(answer.token_ids) != len(answer.log_probs):
                raise RolloutError(
                    f"the rollout engine gave prompt {prompt} a response of {len(answer.token_ids)} tokens with "
                    f"{len(answer.log_probs)} log-probs: a response has at least one token and a log-prob for each."
                )


def step_seed(seed: int, step: int) -> int:
    """The sampling seed of a step: a function of the run's seed and the step alone, so a resumed run repeats it."""
    return (seed * 1_000_003 + step) % (2**63 - 1)


@dataclass
class StepRollouts:
    """Responses to the prompts of a step: the sampler's prompts, sampled with the step's own seed."""

    engine: Generates
    prompts: Sequence[Prompt]
    sampler: PromptSampler
    sampling: SamplingParams
    pad_id: int

    def __call__(self, step: int) -> Batch:
        """The batch of step N, counted from 1."""
        rows = [self.prompts[i] for i in self.sampler.indices(step - 1)]
        sampling = replace(self.sampling, seed=step_seed(self.sampling.seed, step))
        return generate_batch(self.engine, rows, sampling, pad_id=self.pad_id)

    def greedily(self, prompts: Sequence[Prompt]) -> Batch:
        """The likeliest response to each prompt, token by token. Draws no random number."""
        sampling = replace(self.sampling, n=1, temperature=0.0, top_p=1.0, top_k=-1)
        return generate_batch(self.engine, prompts, sampling, pad_id=self.pad_id)


@dataclass
class SingleTurn:
    """The innermost collector: one response to each prompt and sample, then its score."""

    rollouts: StepRollouts
    scorer: StepScorer
    generation_flops: Callable[[Batch], float]
    timer: Callable[[], Timer] = Timer
    """Makes the timer of one call."""
    release: Callable[[], None] = lambda: None
    """Called when the responses are generated: the engine may give its memory back. Nothing where a collector around
    this one generates more."""

    def __call__(self, step: int) -> Experience:
        timed = self.timer()
        with timed("gen"):
            batch = self.rollouts(step)
            self.release()
        timed.add_flops("gen", self.generation_flops(batch))
        with timed("reward"):
            responses = self.scorer.rate(batch)
        return Experience(batch, [responses], seconds=timed.seconds, flops=timed.flops)
