"""Rules about what is learnt from: rollout correction, filtered groups, masked and resampled rows. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.needs import corrects
from steepest.config.resolve import ACTOR, ROLLOUT, IsSet
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config
from steepest.config.thresholds import pair_thresholds, read_band

CURATION_RULES: list[Rule] = []
CORRECTION = "algorithm.rollout_correction"


@rule(f"{CORRECTION}.rollout_is", f"{CORRECTION}.rollout_is_threshold", table=CURATION_RULES)
def weights_have_a_bound(c: Config, is_set: IsSet) -> Iterator[str]:
    correction = c.algorithm.rollout_correction
    if correction.rollout_is is None:
        return
    try:
        read_band(correction.rollout_is_threshold)
    except ValueError as error:
        yield f"{CORRECTION}.rollout_is_threshold={correction.rollout_is_threshold}: {error}."


@rule(f"{CORRECTION}.rollout_rs", f"{CORRECTION}.rollout_rs_threshold", table=CURATION_RULES)
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


@rule(
    *(f"{CORRECTION}.{name}" for name in ("bypass_mode", "loss_type", "rollout_is", "rollout_is_batch_normalize")),
    f"{CORRECTION}.rollout_rs",
    f"{ACTOR}.old_log_probs",
    table=CURATION_RULES,
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


@rule(
    *(f"{CORRECTION}.{name}" for name in ("bypass_mode", "rollout_is", "rollout_rs")),
    f"{ROLLOUT}.top_p",
    f"{ROLLOUT}.top_k",
    table=CURATION_RULES,
)
def correction_needs_the_whole_distribution(c: Config, is_set: IsSet) -> Iterator[str]:
    rollout, correction = c.actor_rollout_ref.rollout, c.algorithm.rollout_correction
    if (rollout.top_p < 1 or rollout.top_k != -1) and (corrects(c) or correction.bypass_mode):
        name = "bypass_mode" if correction.bypass_mode else "rollout_is" if correction.rollout_is else "rollout_rs"
        yield (
            f"{CORRECTION}.{name} with {ROLLOUT}.top_p={rollout.top_p:g}, top_k={rollout.top_k}: the engine's "
            "log-probs are those of the filtered choice, which never draws some tokens, so no weight can mend it. Use "
            "top_p=1 and top_k=-1."
        )


@rule("reward.overlong_buffer.enable", "reward.overlong_buffer.len", "data.max_response_length", table=CURATION_RULES)
def the_overlong_buffer_has_a_length(c: Config, is_set: IsSet) -> Iterator[str]:
    buffer, longest = c.reward.overlong_buffer, c.data.max_response_length
    if buffer.enable and (buffer.len is None or buffer.len > longest):
        yield (
            f"reward.overlong_buffer.len={'null' if buffer.len is None else buffer.len}: must be at most "
            f"data.max_response_length={longest}, the tokens before that limit in which the penalty grows, "
            f"e.g. {max(1, longest // 5)}."
        )


@rule("algorithm.filter_groups.enable", "algorithm.mask_equal_groups", f"{ROLLOUT}.n", table=CURATION_RULES)
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
