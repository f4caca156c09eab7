"""From prompts to a batch: the trainer's side of the rollout engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from steepest.core.batch import Batch
from steepest.data.prompts import Prompt
from steepest.data.sampler import PromptSampler
from steepest.rollout.api import RolloutEngine, SamplingParams


def generate_batch(engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingParams, *, pad_id: int) -> Batch:
    """`sampling.n` responses for each prompt, the responses of one prompt side by side, in the order of `prompts`."""
    answers = engine.generate([prompt.token_ids for prompt in prompts], sampling)
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

    def __call__(self, step: int) -> Batch:
        rows = [self.prompts[i] for i in self.sampler.indices(step - 1)]
        sampling = replace(self.sampling, seed=step_seed(self.sampling.seed, step))
        return generate_batch(self.engine, rows, sampling, pad_id=self.pad_id)
