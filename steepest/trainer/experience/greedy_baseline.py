"""ReMax's baseline: the reward of one greedy response to each prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steepest.core.batch import Batch, RowStatus
from steepest.data.prompts import Prompt
from steepest.trainer.experience.api import Collector, Experience
from steepest.trainer.experience.scoring import StepScorer
from steepest.trainer.loop import Timer


@dataclass
class GreedyBaseline:
    """Generates one greedy response to each prompt of what `collect` returns, and scores it: its reward is the baseline
    of the prompt's responses, `extras["reward_baselines"]` (B,) f32, NaN where that reward failed.

    A prompt whose greedy response got no score has no baseline: its responses are left out of the training as
    REWARD_FAILED, like a response whose own reward failed.
    """

    collect: Collector
    greedily: Callable[[Sequence[Prompt]], Batch]
    """The greedy response to each prompt."""
    scorer: StepScorer
    generation_flops: Callable[[Batch], float]
    timer: Callable[[], Timer] = Timer
    release: Callable[[], None] = lambda: None
    """Called when the greedy responses are generated, see SingleTurn."""

    def __call__(self, step: int) -> Experience:
        found, timed = self.collect(step), self.timer()
        batch = found.batch
        prompts: dict[int, Prompt] = {}
        for group, prompt in zip(batch.group_ids.tolist(), batch.samples, strict=True):
            prompts.setdefault(group, prompt)
        with timed("gen"):
            greedy = self.greedily([prompts[group] for group in range(len(prompts))])
            self.release()
        timed.add_flops("gen", self.generation_flops(greedy))
        with timed("reward"):
            scores = [result.score for result in self.scorer.results(greedy, self.scorer.scorer.texts(greedy))]
        baselines = torch.tensor([math.nan if score is None else score for score in scores])[batch.group_ids]
        batch.extras["reward_baselines"] = baselines
        batch.leave_out(baselines.isnan(), RowStatus.REWARD_FAILED)
        timed.add(found.seconds, found.flops)
        found.seconds, found.flops = timed.seconds, timed.flops
        return found
