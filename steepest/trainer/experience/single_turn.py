"""From prompts to a batch: the trainer's side of the rollout engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from steepest.core.batch import Batch
from steepest.data.prompts import Prompt
from steepest.data.sampler import PromptSampler
from steepest.errors import RolloutError
from steepest.rollout.api import Completion, RolloutEngine, SamplingParams


def generate_batch(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, *, pad_id: int) -> Batch:
    """`sampling.n` responses for each prompt, the responses of one prompt side by side, in the order of `prompts`.

    Raises RolloutError when the engine's answers do not fit the prompts.
    """
    answers = engine.generate([prompt.token_ids for prompt in prompts], sampling)
    _check(answers, len(prompts), sampling.n)
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


def _check(answers: Sequence[Sequence[Completion]], num_prompts: int, n: int) -> None:
    """Everything after this pairs by position: a missing answer would move all later ones to a wrong prompt."""
    if len(answers) != num_prompts:
        raise RolloutError(f"the rollout engine answered {len(answers)} prompts of {num_prompts}.")
    for i, group in enumerate(answers):
        if len(group) != n:
            raise RolloutError(f"the rollout engine gave {len(group)} responses to prompt {i}, asked for {n}.")
        for answer in group:
            if not answer.token_ids or len(answer.token_ids) != len(answer.log_probs):
                raise RolloutError(
                    f"the rollout engine gave prompt {i} a response of {len(answer.token_ids)} tokens with "
                    f"{len(answer.log_probs)} log-probs: a response has at least one token and a log-prob for each."
                )


def step_seed(seed: int, step: int) -> int:
    """The sampling seed of a step: a function of the run's seed and the step alone, so a resumed run repeats it."""
    return (seed * 1_000_003 + step) % (2**63 - 1)


@dataclass
class StepRollouts:
    """The batch of step N (counted from 1): the sampler's prompts, answered with the step's own seed."""

    engine: RolloutEngine
    prompts: Sequence[Prompt]
    sampler: PromptSampler
    sampling: SamplingParams
    pad_id: int
    release: Callable[[], None] = lambda: None
    """Called when the responses are there: `engine.sleep`, or nothing."""

    def __call__(self, step: int) -> Batch:
        rows = [self.prompts[i] for i in self.sampler.indices(step - 1)]
        sampling = replace(self.sampling, seed=step_seed(self.sampling.seed, step))
        batch = generate_batch(self.engine, rows, sampling, pad_id=self.pad_id)
        self.release()
        return batch

    def greedily(self, prompts: Sequence[Prompt]) -> Batch:
        """The likeliest response to each prompt, token by token. Draws no random number and does not release."""
        sampling = replace(self.sampling, n=1, temperature=0.0, top_p=1.0, top_k=-1)
        return generate_batch(self.engine, prompts, sampling, pad_id=self.pad_id)
