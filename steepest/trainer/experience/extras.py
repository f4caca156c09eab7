"""Writers of `Batch.extras`: what some advantage estimators read in addition to scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from steepest.config.schema import Config
from steepest.config.sections.advantages import named_rewards
from steepest.core.batch import Batch
from steepest.errors import ConfigError
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.dynamic_sampling import values_of

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
"""Name of an extra -> its writer, called when responses have been scored. Two extras are written elsewhere:
`reward_baselines` by GreedyBaseline, which also generates, and `sum_pi_squared` by the actor's pass (old_log_probs)."""
