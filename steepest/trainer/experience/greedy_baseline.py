"""What some estimators read beside the scores: rewards by name (gdpo), the reward of a greedy response (remax)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steepest.config.schema import Config
from steepest.config.sections.advantages import named_rewards
from steepest.core.batch import Batch, RowStatus
from steepest.data.prompts import Prompt
from steepest.errors import ConfigError
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.dynamic_sampling import values_of
from steepest.trainer.experience.scoring import StepScorer

Fill = Callable[[Batch, list[RewardResult]], None]


@dataclass(frozen=True)
class NamedRewards:
    """Puts rewards, each by its name, into the batch (`Batch.extras["named_rewards"]`)."""

    names: Sequence[str]

    def __call__(self, batch: Batch, results: list[RewardResult]) -> None:
        """Raises RewardError for a name that a reward did not report."""
        columns = [values_of(results, name, key="algorithm.gdpo_reward_keys") for name in self.names]
        batch.extras["named_rewards"] = torch.stack(columns, dim=1)


def _names_of_rewards(config: Config) -> tuple[str, ...]:
    names = tuple(named_rewards(config))
    if not names:  # of gdpo a rule has asked for them
        raise ConfigError(
            f"algorithm.adv_estimator={config.algorithm.adv_estimator} reads rewards by name, and none is named. Set "
            "algorithm.gdpo_reward_keys, or reward.functions."
        )
    return names


FILLS: dict[str, Callable[[Config], Fill]] = {
    "named_rewards": lambda config: NamedRewards(_names_of_rewards(config)),
}
"""Name of an extra -> what writes it when a step's responses have been scored. Two are written elsewhere: those of
GreedyBaselines, which also generates, and `sum_pi_squared`, which comes from the actor's pass (`old_log_probs`)."""


@dataclass
class GreedyBaselines:
    """One greedy response to each prompt of the rollouts, and its reward as the baseline of the prompt's responses.

    It is generated with them and scored as they are. A prompt whose greedy response got no score has no baseline: its
    responses are left out of the training as REWARD_FAILED, as one whose own reward failed.
    """

    sampled: Callable[[int], Batch]
    """Responses for the prompts of a step, the groups numbered from 0."""
    greedily: Callable[[Sequence[Prompt]], Batch]
    """The greedy response to each prompt."""
    scorer: StepScorer
    _greedy: Batch | None = None
    """Generated and not scored yet."""

    def generate(self, step: int) -> Batch:
        batch = self.sampled(step)
        prompts: dict[int, Prompt] = {}
        for group, prompt in zip(batch.group_ids.tolist(), batch.samples, strict=True):
            prompts.setdefault(group, prompt)
        self._greedy = self.greedily([prompts[group] for group in range(len(prompts))])
        return batch

    def fill(self, batch: Batch, results: list[RewardResult]) -> None:
        """The baselines of what `generate` gave last, into the batch."""
        greedy, self._greedy = self._greedy, None
        assert greedy is not None, "responses are scored once"
        scores = [result.score for result in self.scorer.results(greedy, self.scorer.scorer.texts(greedy))]
        baselines = torch.tensor([math.nan if score is None else score for score in scores])[batch.group_ids]
        batch.extras["reward_baselines"] = baselines
        batch.leave_out(baselines.isnan(), RowStatus.REWARD_FAILED)
