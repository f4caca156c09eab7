"""Keys without effect about what is learnt from: rollout correction, filtered groups, masked and resampled rows."""

from __future__ import annotations

from typing import Any

from steepest.config.algorithms import LOSSES
from steepest.config.idle import Idle
from steepest.config.idle import names_of as _names
from steepest.config.resolve import ACTOR
from steepest.config.schema import Config


def _correction(c: Config) -> Any:
    return c.algorithm.rollout_correction


CORRECTION_IDLE = [
    Idle(
        _names("algorithm.rollout_correction", "rollout_is_threshold rollout_is_batch_normalize"),
        lambda c: _correction(c).rollout_is is None,
        "algorithm.rollout_correction.rollout_is is null",
    ),
    Idle(
        ("algorithm.rollout_correction.rollout_rs_threshold",),
        lambda c: not _correction(c).rollout_rs,
        "algorithm.rollout_correction.rollout_rs is null",
    ),
    Idle(
        ("algorithm.rollout_correction.loss_type",),
        lambda c: not _correction(c).bypass_mode,
        "algorithm.rollout_correction.bypass_mode is off",
    ),
    Idle(
        (*_names(ACTOR, "policy_loss clip_ratio"), *(f"{ACTOR}.{key}" for key in LOSSES.option_keys())),
        lambda c: _correction(c).bypass_mode and _correction(c).loss_type == "reinforce",
        "algorithm.rollout_correction.loss_type=reinforce stands for the policy loss in bypass mode",
    ),
]
CURATION_IDLE = [
    Idle(
        _names("algorithm.filter_groups", "metric max_num_gen_batches"),
        lambda c: not c.algorithm.filter_groups.enable,
        "algorithm.filter_groups.enable is off",
    ),
    Idle(("algorithm.pf_ppo",), lambda c: not c.algorithm.use_pf_ppo, "algorithm.use_pf_ppo is off"),
    Idle(
        ("algorithm.pf_ppo.weight_pow",),
        lambda c: c.algorithm.pf_ppo.reweight_method != "pow",
        "algorithm.pf_ppo.reweight_method is not pow",
    ),
    Idle(
        ("algorithm.bootstrap_truncated",),
        lambda c: c.algorithm.mask_truncated,
        "algorithm.mask_truncated leaves truncated responses out",
    ),
    Idle(
        _names("reward.overlong_buffer", "len penalty_factor log"),
        lambda c: not c.reward.overlong_buffer.enable,
        "reward.overlong_buffer.enable is off",
    ),
    Idle(("trainer.critic_warmup_returns",), lambda c: c.trainer.critic_warmup == 0, "trainer.critic_warmup is 0"),
]
