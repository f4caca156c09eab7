"""`actor_rollout_ref.actor`: the policy's loss and update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from steepest.config.algorithms import LOSSES, LossSpec, PolicyLossConfig
from steepest.config.checks import ACTOR, ROLLOUT, Deriver, IsSet, NoEffect, Section, names_of, without_effect
from steepest.config.needs import updates_per_step
from steepest.config.sections.kl import KLLossKind
from steepest.config.sections.model import ComputeConfig, OptimConfig, optim_without_effect, small_rate
from steepest.config.types import (
    DERIVED,
    Bounds,
    LossAggMode,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveShare,
    Seed,
)

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()


@dataclass(frozen=True)
class ActorConfig:
    """`actor_rollout_ref.actor`: the policy's update."""

    ppo_mini_batch_size: Positive = DERIVED
    """Prompts an optimizer step, with all their `rollout.n` responses; must divide `data.train_batch_size`.
    null: 256 if that divides it, else the whole batch. verl: 256."""
    ppo_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward and backward; null: filled to `ppo_max_token_len_per_gpu`. Changes memory, not the result."""
    use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless `ppo_micro_batch_size_per_gpu` is given."""
    ppo_max_token_len_per_gpu: Positive = DERIVED
    """Tokens (prompt and response, no padding) a micro-batch; null: 4096, or one longest sequence if that is more."""
    clip_ratio: PositiveFloat = 0.2
    """PPO's clip of the probability ratio, for both sides unless the next two say otherwise."""
    clip_ratio_low: PositiveShare = DERIVED
    """The ratio is clipped at 1 minus this; null: `clip_ratio`, and where that is not given, with gspo 0.0003, geo_mean
    0.4 (of the log-ratio), dppo_tv 0.15 (of the probability), dppo_kl 0.05 (nats). verl: 0.2 for all."""
    clip_ratio_high: PositiveFloat = DERIVED
    """The ratio is clipped at 1 plus this; null: as `clip_ratio_low`, but with gspo 0.0004."""
    clip_ratio_c: Annotated[float, Bounds(above=1.0)] = DERIVED
    """vanilla's dual clip: with a negative advantage A the loss is at most this times -A. dppo_tv and dppo_kl: the
    largest ratio. null: 3, with the dppo losses 20. verl: 3."""
    tau_pos: PositiveFloat = 1.0
    """sapo: how fast the gate closes on tokens with a positive advantage as their ratio leaves 1."""
    tau_neg: PositiveFloat = 1.05
    """sapo: the same for the others."""
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    loss_agg_mode: LossAggMode = DERIVED
    """How token losses become one number; the denominator counts the whole mini-batch. null: token-mean, with gspo,
    geo_mean and sapo seq-mean-token-mean, which verl always takes for them."""
    loss_scale_factor: PositiveFloat | None = None
    """Divisor of seq-mean-token-sum-norm; needed there, unused elsewhere."""
    entropy_coeff: float = 0.0
    """Weight of the entropy bonus in the loss."""
    use_kl_loss: bool = False
    """Add the KL divergence to the reference to the loss."""
    kl_loss_coef: NonNegativeFloat = 0.001
    """Weight of that KL term."""
    kl_loss_type: KLLossKind = "low_var_kl"
    """Estimator of that KL term; a trailing + keeps the value and takes the gradient of k2. full: no estimate, the KL
    over the whole vocabulary at each token, for a pass of the reference in each update."""
    ppo_epochs: Positive = 1
    """Passes over a step's batch."""
    old_log_probs: Literal["auto", "recompute"] = "auto"
    """Log-probs before the update. auto: no pass of their own where the update's or the engine's can stand in (the
    engine's are checked on a sample of rows in each step); recompute: a pass in each step. Ours, not verl's."""
    use_prefix_sharing: bool | None = None
    """Compute the prompt of a group's `rollout.n` responses once a pass, in actor, reference and critic; null: on where
    it can be, which is on the CPU. verl: `use_prefix_grouper`, off."""
    shuffle: bool = False
    """Shuffle the rows before they are cut into mini-batches, again for each pass."""
    data_loader_seed: Seed = 42
    """Seed of that shuffle, and of the tokens that clip_cov draws."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    fsdp_config: ComputeConfig = field(default_factory=ComputeConfig)


@SECTION.null
def resolve(d: Deriver) -> None:
    key, low, high = (f"{ACTOR}.{name}" for name in ("policy_loss.loss_mode", "clip_ratio_low", "clip_ratio_high"))
    loss = LOSSES.assume(d[key])  # the user's own function gets PPO's values
    if loss.clip_range is not None and not d.is_set(f"{ACTOR}.clip_ratio"):
        for side, value in zip((low, high), loss.clip_range, strict=True):
            d.fill(side, value, key)
    d.copy(f"{ACTOR}.clip_ratio", low, high)
    d.fill(f"{ACTOR}.clip_ratio_c", loss.ratio_bound, key)
    d.fill(f"{ACTOR}.loss_agg_mode", loss.mean, key)


@SECTION.rule(
    f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor", "critic.loss_agg_mode", "critic.loss_scale_factor"
)
def norm_has_a_scale(c: Config, is_set: IsSet) -> Iterator[str]:
    actor = c.actor_rollout_ref.actor
    wanted: dict[str, tuple[str | None, float | None]] = {ACTOR: (actor.loss_agg_mode, actor.loss_scale_factor)}
    if is_set("critic.loss_agg_mode"):
        wanted["critic"] = (c.critic.loss_agg_mode, c.critic.loss_scale_factor)
    for section, (mode, scale) in wanted.items():
        if mode == "seq-mean-token-sum-norm" and scale is None:
            yield (
                f"{section}.loss_agg_mode={mode}: needs {section}.loss_scale_factor, the fixed length to divide by, "
                f"e.g. {c.data.max_response_length} (data.max_response_length)."
            )


@SECTION.rule(*(f"{ACTOR}.policy_loss.{name}" for name in ("loss_mode", "clip_cov_lb", "clip_cov_ub")))
def a_covariance_can_lie_between(c: Config, is_set: IsSet) -> Iterator[str]:
    loss = c.actor_rollout_ref.actor.policy_loss
    takes_them = "policy_loss.clip_cov_lb" in LOSSES.assume(loss.loss_mode).keys
    if takes_them and loss.clip_cov_lb >= loss.clip_cov_ub:
        yield (
            f"{ACTOR}.policy_loss.clip_cov_lb={loss.clip_cov_lb:g}: must be below clip_cov_ub={loss.clip_cov_ub:g}, "
            "else no token has a covariance between the two."
        )


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            (f"{ACTOR}.loss_scale_factor",),
            lambda c: not c.actor_rollout_ref.actor.loss_agg_mode.endswith("-norm"),
            "no -norm loss_agg_mode",
        ),
        NoEffect(
            (f"{ACTOR}.use_prefix_sharing",),
            lambda c: c.actor_rollout_ref.rollout.n == 1,
            f"{ROLLOUT}.n=1: no two responses have one prompt",
        ),
        NoEffect(
            (*names_of(ACTOR, "policy_loss clip_ratio"), *(f"{ACTOR}.{key}" for key in LOSSES.option_keys())),
            _is_replaced,
            "algorithm.rollout_correction.loss_type=reinforce stands for the policy loss in bypass mode",
        ),
        # clip_ratio is what gives its sides their values
        _of_other_losses("clip_ratio", "clip_ratio_low"),
        *(_of_other_losses(key, key) for key in LOSSES.option_keys()),
        NoEffect((f"{ACTOR}.data_loader_seed",), _never_draws, f"{ACTOR}.shuffle is off"),
        *optim_without_effect(f"{ACTOR}.optim", lambda c: c.actor_rollout_ref.actor.optim),
    ]


def _is_replaced(c: Config) -> bool:
    correction = c.algorithm.rollout_correction
    return correction.bypass_mode and correction.loss_type == "reinforce"


def _of_other_losses(key: str, read: str) -> NoEffect:
    return NoEffect(
        (f"{ACTOR}.{key}",),
        lambda c: not LOSSES.takes(c.actor_rollout_ref.actor.policy_loss.loss_mode, read),
        f"only {ACTOR}.policy_loss.loss_mode={'|'.join(LOSSES.takers(read))} takes it",
    )


def _never_draws(c: Config) -> bool:
    actor = c.actor_rollout_ref.actor
    spec = LOSSES.find(actor.policy_loss.loss_mode)
    return not actor.shuffle and spec is not None and not spec.draws


@SECTION.warning
def clip_is_overruled(given: dict[str, Any], config: Config) -> Iterator[str]:
    """`clip_ratio` next to both of its sides."""
    sides = [f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high"]
    if f"{ACTOR}.clip_ratio" in given and all(given.get(side) is not None for side in sides):
        yield without_effect([f"{ACTOR}.clip_ratio"], "clip_ratio_low and clip_ratio_high are both given")


@SECTION.warning
def small_lora_rate(given: dict[str, Any], config: Config) -> Iterator[str]:
    """LoRA with the learning rate that suits all weights."""
    arr, key = config.actor_rollout_ref, f"{ACTOR}.optim.lr"
    if arr.model.lora_rank > 0 and key not in given:
        yield small_rate(key, arr.actor.optim.lr, "1e-5")


@SECTION.warning
def wide_sequence_clip(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss of one ratio a response (gspo) with the clip range of a token's ratio."""
    actor, spec = config.actor_rollout_ref.actor, _spec(config)
    if spec.widest_clip is None or spec.clip_range is None:
        return
    if max(actor.clip_ratio_low, actor.clip_ratio_high) > spec.widest_clip:
        low, high = spec.clip_range
        yield (
            f"{ACTOR}.clip_ratio_low={actor.clip_ratio_low:g}, clip_ratio_high={actor.clip_ratio_high:g} with "
            f"policy_loss.loss_mode={spec.name}: a response's ratio lies near 1, so this clip hardly ever acts. The "
            f"paper's are {low:g} and {high:g}, the default without these keys."
        )


@SECTION.warning
def other_mean_than_the_papers(given: dict[str, Any], config: Config) -> Iterator[str]:
    """Losses of whole responses, aggregated as losses of tokens."""
    spec, mode = _spec(config), config.actor_rollout_ref.actor.loss_agg_mode
    if spec.mean == "seq-mean-token-mean" and mode != spec.mean:
        yield (
            f"{ACTOR}.loss_agg_mode={mode} with policy_loss.loss_mode={spec.name}: a response weighs as much as it has "
            "tokens. The paper's mean, which verl takes whatever this key says, is seq-mean-token-mean, the default "
            "without the key."
        )


@SECTION.warning
def off_policy_without_a_ratio(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss without a ratio (gpg) with several updates a batch."""
    updates, spec = updates_per_step(config), _spec(config)
    if not spec.has_ratio and updates > 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode={spec.name} with {updates} updates a step: this loss has no ratio, so from "
            "the second one on nothing corrects for the policy having moved. Use one (ppo_mini_batch_size = "
            "train_batch_size, ppo_epochs=1), or another loss."
        )


@SECTION.warning
def penalty_of_an_unmoved_policy(given: dict[str, Any], config: Config) -> Iterator[str]:
    """A loss that is the plain policy gradient until the policy has moved (kl_cov), with one update a batch."""
    spec = _spec(config)
    if spec.pointless_in_one_update and updates_per_step(config) == 1:
        yield (
            f"{ACTOR}.policy_loss.loss_mode={spec.name} with one update a step: its {spec.idle_at_ratio_one} is "
            "on the distance to the policy before the update, which is 0 then. Use a smaller "
            "ppo_mini_batch_size, or more ppo_epochs."
        )


def _spec(config: Config) -> LossSpec:
    return LOSSES.assume(config.actor_rollout_ref.actor.policy_loss.loss_mode)
