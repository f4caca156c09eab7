"""Keys without effect about advantages: options that the estimator of the run does not read."""

from __future__ import annotations

from steepest.config.estimators import takes
from steepest.config.idle import Idle
from steepest.config.idle import names_of as _names

ADVANTAGE_IDLE = [
    Idle(
        _names("algorithm", "lam_critic length_adaptive_alpha"),
        lambda c: not takes(c.algorithm.adv_estimator, "lam_critic"),
        "algorithm.adv_estimator is not gae",
    ),
    Idle(
        ("algorithm.lam",),
        lambda c: c.algorithm.lam_critic is not None and c.algorithm.length_adaptive_alpha is not None,
        "length_adaptive_alpha gives the advantages' lambda and lam_critic the returns'",
    ),
    Idle(
        _names("algorithm", "gdpo_reward_keys gdpo_reward_weights"),
        lambda c: c.algorithm.adv_estimator != "gdpo" and ":" not in c.algorithm.adv_estimator,
        "algorithm.adv_estimator is not gdpo",
    ),
]
