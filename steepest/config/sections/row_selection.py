"""Parts of `algorithm` that choose the rows to learn from: the filter of groups, PF-PPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steepest.config.checks import ROLLOUT, IsSet, NoEffect, Section, names_of
from steepest.config.types import Positive, PositiveFloat

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()


@dataclass(frozen=True)
class FilterGroupsConfig:
    """`algorithm.filter_groups`: DAPO's dynamic sampling."""

    enable: bool = False
    """Drop prompts whose responses all score alike, and generate for further prompts until the batch is full."""
    metric: str = "reward"
    """What must differ: reward (the score), or a part that the reward function reports, e.g. acc."""
    max_num_gen_batches: Positive = 10
    """Rounds of `train_batch_size` prompts a step, at most; what is then missing is filled with dropped prompts.
    verl: 0, no limit, so that a step may never end."""


@dataclass(frozen=True)
class PFPPOConfig:
    """`algorithm.pf_ppo`: how PF-PPO weighs responses."""

    reweight_method: Literal["pow", "max_min", "max_random"] = "pow"
    """pow: the score's size to the power of `weight_pow`; max_min: highest and lowest scores of the batch alone;
    max_random: the highest four times as often as each other."""
    weight_pow: PositiveFloat = 2.0
    """The power (pow)."""


@SECTION.rule("algorithm.filter_groups.enable", "algorithm.mask_equal_groups", f"{ROLLOUT}.n")
def groups_can_differ(c: Config, is_set: IsSet) -> Iterator[str]:
    algorithm = c.algorithm
    if c.actor_rollout_ref.rollout.n > 1:
        return
    for key, is_on in (
        ("filter_groups.enable", algorithm.filter_groups.enable),
        ("mask_equal_groups", algorithm.mask_equal_groups),
    ):
        if is_on:
            yield (
                f"algorithm.{key}=True with {ROLLOUT}.n=1: a group of one never differs, so nothing would be left. "
                f"Use {ROLLOUT}.n >= 2."
            )


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            names_of("algorithm.filter_groups", "metric max_num_gen_batches"),
            lambda c: not c.algorithm.filter_groups.enable,
            "algorithm.filter_groups.enable is off",
        ),
        NoEffect(("algorithm.pf_ppo",), lambda c: not c.algorithm.use_pf_ppo, "algorithm.use_pf_ppo is off"),
        NoEffect(
            ("algorithm.pf_ppo.weight_pow",),
            lambda c: c.algorithm.pf_ppo.reweight_method != "pow",
            "algorithm.pf_ppo.reweight_method is not pow",
        ),
    ]
