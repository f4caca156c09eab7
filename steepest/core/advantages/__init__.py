"""Advantage estimators: from rewards per token to advantages and returns per token.

Each estimator is one function: `AdvantageInputs` in, `(advantages, returns)` out, its options as keywords with types.
It is registered against its spec in config/algorithms.py, which states what it reads and which keys set its options.
"""

from steepest.core.advantages.estimator_call import EstimatorCall
from steepest.core.advantages.gae import gae
from steepest.core.advantages.gdpo import gdpo
from steepest.core.advantages.groups import gpg, grpo, grpo_passk, opo, reinforce_plus_plus_baseline, rloo
from steepest.core.advantages.inputs import ADVANTAGE_ESTIMATORS, AdvantageInputs
from steepest.core.advantages.reinforce import reinforce_plus_plus
from steepest.core.advantages.remax import remax
from steepest.core.advantages.token_baseline import optimal_token_baseline

__all__ = [
    "ADVANTAGE_ESTIMATORS",
    "AdvantageInputs",
    "EstimatorCall",
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "grpo_passk",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
]
