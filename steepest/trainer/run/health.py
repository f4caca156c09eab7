"""Health checks: what a curve would show an expert, as sentences. Each is printed once, and again after it passed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from steepest.learner.metrics import Metrics

Check = Callable[[Metrics, "Limits"], "str | None"]


@dataclass(frozen=True)
class Limits:
    """Where a number becomes a warning. `ratio` and `mismatch` depend on the compute dtype."""

    ratio: float = 1e-3
    mismatch: float = 1e-3
    clipped: float = 0.5
    rejected: float = 0.5
    entropy: float = 0.01
    dead_critic: float = 0.0
    warmup_steps: int = 20

    @classmethod
    def for_dtype(cls, dtype: str) -> Limits:
        """bfloat16 rounds log-probs at about 1e-2, float32 at 1e-5."""
        return cls() if dtype == "float32" else cls(ratio=0.2, mismatch=1e-2)


def ratio(m: Metrics, limits: Limits) -> str | None:
    value = m.get("actor/ratio_max_dev_first", 0.0)
    if value <= limits.ratio:
        return None
    return (
        f"the probability ratio differs from 1 by {value:.2g} before the first update (limit {limits.ratio:.2g}): "
        "log-probs of the same weights disagree between two passes"
    )


def mismatch(m: Metrics, limits: Limits) -> str | None:
    value = m.get("mismatch/k3_kl", 0.0)
    if abs(value) <= limits.mismatch:
        return None
    return (
        f"the rollout engine and the trainer disagree: KL {value:.2g} (limit {limits.mismatch:.2g}). "
        "Weights that were not published, another temperature, or another dtype"
    )


def clipped(m: Metrics, limits: Limits) -> str | None:
    value = m.get("response_length/clip_ratio", 0.0)
    if value <= limits.clipped:
        return None
    return (
        f"{value:.0%} of the responses were cut at data.max_response_length and never ended: "
        "raise it, or the reward sees unfinished answers"
    )


def rejected(m: Metrics, limits: Limits) -> str | None:
    value = m.get("rollout_corr/rollout_rs_masked_fraction", 0.0)
    if value <= limits.rejected:
        return None
    return (
        f"{value:.0%} of the tokens were rejected by algorithm.rollout_correction.rollout_rs: little is learnt from. "
        "Wider bounds, or an engine that is nearer to the trainer"
    )


def equal_groups(m: Metrics, limits: Limits) -> str | None:
    if m.get("group/equal_ratio", 0.0) < 1.0 or no_signal(m, limits) is not None:  # which says more
        return None
    return "within every prompt all responses have the same score: a group-relative estimator learns nothing this step"


def no_signal(m: Metrics, limits: Limits) -> str | None:
    if "critic/score/max" not in m or m["critic/score/max"] != m["critic/score/min"]:
        return None
    return f"every response scored {m['critic/score/max']:.3g}: this step has no reward signal"


def entropy_collapse(m: Metrics, limits: Limits) -> str | None:
    value = m.get("actor/entropy")
    if value is None or value >= limits.entropy:
        return None
    return f"the policy's entropy fell to {value:.2g} nats a token: it hardly explores any more"


def reward_errors(m: Metrics, limits: Limits) -> str | None:
    value = m.get("reward/error_rate", 0.0)
    return f"{value:.1%} of the rewards failed; those responses were left out of the step" if value > 0 else None


def dead_critic(m: Metrics, limits: Limits) -> str | None:
    value = m.get("critic/vf_explained_var")
    if no_signal(m, limits) is not None:  # equal scores: what is left of the variance is rounding and the KL
        return None
    if value is None or m.get("training/global_step", 0) < limits.warmup_steps or value >= limits.dead_critic:
        return None
    return (
        f"the critic explains none of the returns (explained variance {value:.2g}): "
        "advantages are no better than without it"
    )


def skipped_updates(m: Metrics, limits: Limits) -> str | None:
    count = m.get("actor/skipped_steps", 0.0) + m.get("critic/skipped_steps", 0.0)
    return f"{count:.0f} update(s) skipped because a gradient was NaN or inf" if count > 0 else None


CHECKS: tuple[Check, ...] = (
    ratio,
    mismatch,
    clipped,
    rejected,
    equal_groups,
    no_signal,
    entropy_collapse,
    reward_errors,
    dead_critic,
    skipped_updates,
)


@dataclass
class Health:
    """Runs every check each step. A check speaks when it starts to fail and is silent until it has passed again."""

    limits: Limits = field(default_factory=Limits)
    failing: set[str] = field(default_factory=set)

    def __call__(self, metrics: Metrics) -> list[str]:
        said = []
        for check in CHECKS:
            message = check(metrics, self.limits)
            if message is None:
                self.failing.discard(check.__name__)
            elif check.__name__ not in self.failing:
                self.failing.add(check.__name__)
                said.append(message)
        return said
