"""`algorithm.rollout_correction`: for an engine whose probabilities differ from the trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from steepest.config.checks import ACTOR, ROLLOUT, IsSet, NoEffect, Section, names_of
from steepest.config.needs import corrects

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()
CORRECTION = "algorithm.rollout_correction"
RejectionKind = Literal[
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]


@dataclass(frozen=True)
class RolloutCorrectionConfig:
    """`algorithm.rollout_correction`: for an engine whose probabilities differ from the trainer's."""

    rollout_is: Literal["token", "sequence"] | None = None
    """Importance weights on the policy loss, old over rollout probability: of each token, or the product over a
    response; null: none."""
    rollout_is_threshold: str = "2.0"
    """A number: larger weights are cut to it (TIS). low_high, e.g. 0.5_5.0: weights outside become 0 (IcePop)."""
    rollout_is_batch_normalize: bool = False
    """Divide the weights by their mean over the batch."""
    rollout_rs: tuple[RejectionKind, ...] | None = None
    """Leave out tokens or whole responses by one or more divergences, e.g. `[token_k1,seq_mean_k3]`; null: none."""
    rollout_rs_threshold: tuple[str, ...] | None = None
    """One each, or one for all. k1: ratios low_high of rollout over old probability, or high for 1/high to high.
    k2, k3: the largest divergence in nats."""
    bypass_mode: bool = False
    """Take the rollout's log-probs for old ones, without a pass: the loss's own ratio is then the correction."""
    loss_type: Literal["ppo_clip", "reinforce"] = "ppo_clip"
    """Bypass mode only. ppo_clip: `policy_loss.loss_mode` as it is; reinforce: -weight * log-prob * advantage."""


def read_band(text: str) -> tuple[float | None, float]:
    """(low, high); low is None for a single number. Raises ValueError whose text is the reason."""
    low, between, high = text.strip().partition("_")
    try:
        if "_" in high:  # Python reads 2_0 as 20
            raise ValueError
        numbers = [float(low), float(high)] if between else [float(low)]
    except ValueError:
        raise ValueError("must be a number, or low_high, e.g. 0.5_2.0") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise ValueError("must be above 0")
    if numbers[-1] < 1.0 or (numbers[0] > 1.0 and between):
        raise ValueError("1, the ratio of two policies that agree, must be within")
    return (numbers[0], numbers[1]) if between else (None, numbers[0])


def read_bound(text: str) -> float:
    """A divergence in nats. Raises ValueError whose text is the reason."""
    try:
        if "_" in text:  # Python reads 0.5_2 as 0.52
            raise ValueError
        bound = float(text)
    except ValueError:
        raise ValueError("must be one number, a divergence in nats, e.g. 0.01") from None
    if not 0 < bound < float("inf"):
        raise ValueError("must be above 0")
    return bound


def pair_thresholds(kinds: tuple[str, ...], thresholds: tuple[str, ...]) -> list[tuple[str, float | None, float]]:
    """(kind, low, high) of each rejection; a single threshold serves all. Raises ValueError naming what is wrong.

    k1 is bounded by ratios rollout / old, of which low is None for 1 / high; k2 and k3 by a divergence.
    """
    if len(thresholds) not in (1, len(kinds)):
        raise ValueError(f"{len(thresholds)} thresholds for {len(kinds)} rejections: give one each, or one for all")
    pairs = []
    for kind, text in zip(kinds, thresholds * (len(kinds) if len(thresholds) == 1 else 1), strict=True):
        try:
            low, high = read_band(text) if kind.endswith("k1") else (None, read_bound(text))
        except ValueError as error:
            raise ValueError(f"{text} for {kind}: {error}") from None
        pairs.append((kind, low, high))
    return pairs


@SECTION.rule(f"{CORRECTION}.rollout_is", f"{CORRECTION}.rollout_is_threshold")
def weights_have_a_bound(c: Config, is_set: IsSet) -> Iterator[str]:
    correction = c.algorithm.rollout_correction
    if correction.rollout_is is None:
        return
    try:
        read_band(correction.rollout_is_threshold)
    except ValueError as error:
        yield f"{CORRECTION}.rollout_is_threshold={correction.rollout_is_threshold}: {error}."


@SECTION.rule(f"{CORRECTION}.rollout_rs", f"{CORRECTION}.rollout_rs_threshold")
def rejections_have_bounds(c: Config, is_set: IsSet) -> Iterator[str]:
    kinds, thresholds = c.algorithm.rollout_correction.rollout_rs, c.algorithm.rollout_correction.rollout_rs_threshold
    if not kinds:
        return
    if not thresholds:
        yield (
            f"{CORRECTION}.rollout_rs=[{','.join(kinds)}]: needs {CORRECTION}.rollout_rs_threshold, one each or one "
            "for all: a band of ratios for k1, e.g. 0.5_2.0, a divergence in nats for k2 and k3, e.g. 0.01."
        )
        return
    if len(set(kinds)) < len(kinds):
        yield f"{CORRECTION}.rollout_rs=[{','.join(kinds)}]: one of them twice. Give it once."
        return
    try:
        pair_thresholds(kinds, thresholds)
    except ValueError as error:
        yield f"{CORRECTION}.rollout_rs_threshold: {error}."


@SECTION.rule(
    *(f"{CORRECTION}.{name}" for name in ("bypass_mode", "loss_type", "rollout_is", "rollout_is_batch_normalize")),
    f"{CORRECTION}.rollout_rs",
    f"{ACTOR}.old_log_probs",
)
def bypass_has_two_policies(c: Config, is_set: IsSet) -> Iterator[str]:
    correction = c.algorithm.rollout_correction
    if not correction.bypass_mode:
        return
    key = f"{CORRECTION}.bypass_mode=True"
    if correction.rollout_is is not None and correction.loss_type == "ppo_clip":
        yield (
            f"{key} with {CORRECTION}.rollout_is={correction.rollout_is}: the loss's ratio is training over rollout "
            f"there, so the weight would be applied twice. Remove rollout_is, or use {CORRECTION}.loss_type=reinforce."
        )
    elif correction.rollout_is is not None and correction.rollout_is_batch_normalize:
        yield (
            f"{key} with {CORRECTION}.rollout_is_batch_normalize=True: weights are made in the update there, a "
            "micro-batch at a time, so there is no batch to take a mean of. Remove one of them."
        )
    if correction.rollout_rs:
        yield (
            f"{key} with {CORRECTION}.rollout_rs: rejection compares the rollout's log-probs with those of the pass "
            "that bypass mode leaves out. Remove one of them."
        )
    if c.actor_rollout_ref.actor.old_log_probs == "recompute":
        yield f"{key} with {ACTOR}.old_log_probs=recompute: one leaves the pass out, the other asks for it. Remove one."


@SECTION.rule(
    *(f"{CORRECTION}.{name}" for name in ("bypass_mode", "rollout_is", "rollout_rs")),
    f"{ROLLOUT}.top_p",
    f"{ROLLOUT}.top_k",
)
def correction_needs_the_whole_distribution(c: Config, is_set: IsSet) -> Iterator[str]:
    rollout, correction = c.actor_rollout_ref.rollout, c.algorithm.rollout_correction
    if (rollout.top_p < 1 or rollout.top_k != -1) and (corrects(c) or correction.bypass_mode):
        name = "bypass_mode" if correction.bypass_mode else "rollout_is" if correction.rollout_is else "rollout_rs"
        yield (
            f"{CORRECTION}.{name} with {ROLLOUT}.top_p={rollout.top_p:g}, top_k={rollout.top_k}: the engine's "
            "log-probs are those of the filtered choice, which never draws some tokens, so no weight can correct it. "
            "Use top_p=1 and top_k=-1."
        )


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            names_of(CORRECTION, "rollout_is_threshold rollout_is_batch_normalize"),
            lambda c: c.algorithm.rollout_correction.rollout_is is None,
            f"{CORRECTION}.rollout_is is null",
        ),
        NoEffect(
            (f"{CORRECTION}.rollout_rs_threshold",),
            lambda c: not c.algorithm.rollout_correction.rollout_rs,
            f"{CORRECTION}.rollout_rs is null",
        ),
        NoEffect(
            (f"{CORRECTION}.loss_type",),
            lambda c: not c.algorithm.rollout_correction.bypass_mode,
            f"{CORRECTION}.bypass_mode is off",
        ),
    ]
