"""What is known of each built-in advantage estimator and policy loss without loading torch: one statement for each.

The configuration computes names, defaults, warnings and rules from these statements, the plan computes what a run
needs, and `core` registers each function against its statement (`core/registration.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from steepest.config.types import DERIVED, LossAggMode, NameOf, NonNegativeFloat, PositiveShare


@dataclass(frozen=True)
class Extra:
    """A tensor in `Batch.extras` that only some estimators read. trainer/experience/extras.py names its writer."""

    name: str
    shape: tuple[str, ...]
    """B rows, T response tokens; any other letter stands for any number."""
    keys: tuple[str, ...] = ()
    """Keys of `algorithm` that its writer reads."""


def _by_name(*extras: Extra) -> dict[str, Extra]:
    return {extra.name: extra for extra in extras}


EXTRAS = _by_name(
    Extra("named_rewards", ("B", "K"), keys=("gdpo_reward_keys", "gdpo_reward_weights")),
    Extra("reward_baselines", ("B",)),
    Extra("sum_pi_squared", ("B", "T")),
)


def same(*keys: str) -> dict[str, str]:
    """Options whose keyword has the name of the key: of `policy_loss.kl_cov_ratio` it is `kl_cov_ratio`."""
    return {key: key.rpartition(".")[2] for key in keys}


@dataclass(frozen=True)
class Spec:
    """What estimators and losses state alike."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    """Key of the section that configures it -> keyword of the function. Each of these keywords must exist."""
    constants: tuple[str, ...] = ()
    """Keywords that keep the function's default: no key sets them."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that have an effect with it."""
        return tuple(self.options)


@dataclass(frozen=True)
class EstimatorSpec(Spec):
    """An advantage estimator. `options` are keys of `algorithm`."""

    needs: tuple[str, ...] = ()
    """The optional fields of `AdvantageInputs` that it reads, and names of EXTRAS. A critic exists for `values`."""
    whitened: bool = DERIVED
    """Its advantages are whitened over the batch. Not stated: those of an estimator that reads `values` are."""
    by_row: bool = False
    """A row's returns follow from this row alone."""
    kl_by_default: bool = False
    """The default of `algorithm.kl_ctrl.kl_coef` counts, so that the KL is in the reward unless the user says no."""
    reads_scores: bool = True
    """False: it reads named rewards alone, so what is added to the scores changes nothing."""
    several_rewards: bool = False
    """It makes no sense with fewer than two named rewards."""

    def __post_init__(self) -> None:
        if self.whitened is DERIVED:
            object.__setattr__(self, "whitened", self.needs_critic)

    @property
    def needs_critic(self) -> bool:
        return "values" in self.needs

    @property
    def in_groups(self) -> bool:
        """It compares the responses to one prompt, and needs two of them."""
        return "group_ids" in self.needs

    @property
    def keys(self) -> tuple[str, ...]:
        read = (key for name in self.needs if name in EXTRAS for key in EXTRAS[name].keys)
        return tuple(dict.fromkeys([*self.options, *read]))


@dataclass(frozen=True)
class LossSpec(Spec):
    """A policy loss. `options` are keys of `actor_rollout_ref.actor`."""

    clip_range: tuple[float, float] | None = None
    """What null means for (clip_ratio_low, clip_ratio_high): the paper's, where they are no bounds of a token's ratio.
    verl keeps PPO's 0.2, which has another meaning there. None: `clip_ratio`."""
    ratio_bound: float = 3.0
    """What null means for clip_ratio_c: of the dual clip 3; of an importance weight a large number."""
    mean: LossAggMode = "token-mean"
    """What null means for loss_agg_mode."""
    has_ratio: bool = True
    """False: nothing in it corrects for a policy that has moved since the batch was sampled."""
    idle_at_ratio_one: str = "clip"
    """What does nothing while the policy has not moved."""
    pointless_in_one_update: bool = False
    """With one update a step nothing is left of it but the plain policy gradient."""
    widest_clip: float | None = None
    """A clip range wider than this hardly ever acts."""
    draws: bool = False
    """It draws tokens at random, by `data_loader_seed`."""


SpecT = TypeVar("SpecT", bound=Spec)


class Specs(Generic[SpecT]):
    """The statements of one kind, by name."""

    def __init__(self, kind: type[SpecT], *specs: SpecT) -> None:
        self.kind = kind
        self._specs = {spec.name: spec for spec in specs}

    def names(self) -> tuple[str, ...]:
        return tuple(self._specs)

    def find(self, name: str) -> SpecT | None:
        """The statement of a built-in. None: `name` is code of the user's own.

        The configuration is loaded before torch, and the user's file may import it. So what such a function states is
        not known until the run begins (`core.registration.Algorithms.get`), and here it may take any option.
        """
        return self._specs.get(name)

    def assume(self, name: str) -> SpecT:
        """The statement of a built-in, else one with the defaults: what rules and warnings take for granted."""
        return self._specs.get(name) or self.kind(name)

    def options(self) -> dict[str, str]:
        """Key -> keyword, of all built-ins together."""
        return {key: keyword for spec in self._specs.values() for key, keyword in spec.options.items()}

    def option_keys(self) -> tuple[str, ...]:
        """Every key that has an effect with at least one of them."""
        return tuple(dict.fromkeys(key for spec in self._specs.values() for key in spec.keys))

    def takers(self, key: str) -> tuple[str, ...]:
        """The built-ins with which `key` has an effect."""
        return tuple(name for name, spec in self._specs.items() if key in spec.keys)

    def takes(self, name: str, key: str) -> bool:
        """Whether `key` has an effect with `name`."""
        spec = self.find(name)
        return spec is None or key in spec.keys

    @contextmanager
    def temporarily(self, *specs: SpecT) -> Iterator[None]:
        """`specs` are built-ins in the `with` block."""
        before = dict(self._specs)
        try:
            self._specs.update({spec.name: spec for spec in specs})
            yield
        finally:
            self._specs = before


def option_values(spec: Spec, section: Any) -> dict[str, Any]:
    """Keyword -> the value of its key in a section of the configuration."""
    return {keyword: operator.attrgetter(key)(section) for key, keyword in spec.options.items()}


_BY_STD = {"norm_adv_by_std_in_grpo": "norm_by_std"}

ESTIMATORS = Specs(
    EstimatorSpec,
    EstimatorSpec(
        "gae",
        options=same("gamma", "lam", "lam_critic", "length_adaptive_alpha", "bootstrap_truncated"),
        needs=("values",),
        whitened=True,
        by_row=True,
        kl_by_default=True,
    ),
    EstimatorSpec(
        "gdpo",
        options={**_BY_STD, "gdpo_reward_weights": "weights"},
        constants=("eps",),
        needs=("group_ids", "named_rewards"),
        reads_scores=False,
        several_rewards=True,
    ),
    EstimatorSpec("gpg", needs=("group_ids",)),
    EstimatorSpec("grpo", options=_BY_STD, constants=("eps",), needs=("group_ids",)),
    EstimatorSpec("grpo_passk", options=_BY_STD, constants=("eps",), needs=("group_ids",)),
    EstimatorSpec("opo", needs=("group_ids",)),
    EstimatorSpec("optimal_token_baseline", constants=("eps",), needs=("group_ids", "old_log_probs", "sum_pi_squared")),
    EstimatorSpec("reinforce_plus_plus", options=same("gamma"), whitened=True),
    EstimatorSpec("reinforce_plus_plus_baseline", needs=("group_ids",), whitened=True),
    EstimatorSpec("remax", needs=("reward_baselines",)),
    EstimatorSpec("rloo", needs=("group_ids",)),
)
"""The functions are in core/advantages/."""


_CLIP, _BOUND = same("clip_ratio_low", "clip_ratio_high"), same("clip_ratio_c")

LOSSES = Specs(
    LossSpec,
    LossSpec("vanilla", options={**_CLIP, **_BOUND}),
    LossSpec("gspo", options=_CLIP, clip_range=(3e-4, 4e-4), mean="seq-mean-token-mean", widest_clip=0.02),
    LossSpec(
        "sapo",
        options=same("tau_pos", "tau_neg"),
        mean="seq-mean-token-mean",
        idle_at_ratio_one="gate",
    ),
    LossSpec("gpg", has_ratio=False),
    LossSpec(
        "clip_cov",
        options={
            **_CLIP,
            **same("policy_loss.clip_cov_ratio", "policy_loss.clip_cov_lb", "policy_loss.clip_cov_ub"),
        },
        idle_at_ratio_one="clip of the ratio",
        draws=True,
    ),
    LossSpec(
        "kl_cov",
        options=same("policy_loss.kl_cov_ratio", "policy_loss.ppo_kl_coef"),
        idle_at_ratio_one="penalty",
        pointless_in_one_update=True,
    ),
    LossSpec("geo_mean", options=_CLIP, clip_range=(0.4, 0.4), mean="seq-mean-token-mean"),
    LossSpec("cispo", options=_CLIP),
    LossSpec("dppo_tv", options={**_CLIP, **_BOUND}, clip_range=(0.15, 0.15), ratio_bound=20.0),
    LossSpec("dppo_kl", options={**_CLIP, **_BOUND}, clip_range=(0.05, 0.05), ratio_bound=20.0),
)
"""The functions are in core/policy_losses/. The clip range of gspo is narrow, since the geometric mean of a row's
ratios lies near 1; geo_mean's bounds the log-ratio, dppo_tv's the probability, dppo_kl's a divergence."""


AdvEstimatorName = Annotated[str, NameOf("advantage estimator", ESTIMATORS.names)]
PolicyLossName = Annotated[str, NameOf("policy loss", LOSSES.names)]


@dataclass(frozen=True)
class PolicyLossConfig:
    """`actor_rollout_ref.actor.policy_loss`: the name of the loss, and the options that only one of them takes."""

    loss_mode: PolicyLossName = "vanilla"
    """Name of the policy loss: vanilla is PPO's clip with the dual clip; geo_mean is GMPO."""
    clip_cov_ratio: PositiveShare = 2e-4
    """clip_cov: share of a mini-batch's tokens that take no part in its update, one at least."""
    clip_cov_lb: float = 1.0
    """clip_cov: they are drawn from those whose covariance of log-prob and advantage is above this ..."""
    clip_cov_ub: float = 5.0
    """... and below this."""
    kl_cov_ratio: PositiveShare = 2e-4
    """kl_cov: share of a mini-batch's tokens that are penalised, those of largest covariance, one at least."""
    ppo_kl_coef: NonNegativeFloat = 0.1
    """kl_cov: weight of that penalty, |log_prob - old_log_prob|. The paper's runs use 1."""
