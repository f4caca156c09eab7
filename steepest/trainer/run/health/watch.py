"""Runs the checks after each step: metrics, sentences, and whether the run ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from steepest.config.schema import Config
from steepest.learner.metrics import Metrics
from steepest.trainer.run.health.checks import Check, Seen
from steepest.trainer.run.health.engine import EndToken, Ratio, Rejected, StaleEngine, Temperature
from steepest.trainer.run.health.learning import (
    DeadCritic,
    EntropyCollapse,
    KLRunaway,
    LearningRate,
    NaN,
    SkippedUpdates,
)
from steepest.trainer.run.health.rewards import (
    ConstantReward,
    CutAnswers,
    EqualGroups,
    LengthHacking,
    RewardErrors,
    Validation,
)

REPEAT_STEPS = 50
"""A check that has spoken is silent for so many steps, whatever it finds."""
TOKEN_MEANS = ("token-mean", "seq-mean-token-mean")
"""Aggregations by which `actor/kl_loss` is a mean over tokens."""


def build_checks(config: Config, dtype: str) -> list[Check]:
    """All checks, with the limits of the dtype that log-probs are computed in: bfloat16 rounds them at about 1e-2,
    float32 at 1e-5."""
    exact = dtype == "float32"
    distance = 1e-3 if exact else 1e-2
    kl = ["actor/reward_kl_penalty"]
    if config.actor_rollout_ref.actor.loss_agg_mode in TOKEN_MEANS:
        kl.append("actor/kl_loss")
    return [
        Ratio(1e-3 if exact else 0.2),
        Temperature(distance),
        StaleEngine(distance),
        Rejected(),
        EndToken(),
        CutAnswers(),
        EqualGroups(),
        ConstantReward(),
        RewardErrors(),
        LengthHacking(),
        Validation(),
        EntropyCollapse(),
        DeadCritic(),
        KLRunaway(tuple(kl)),
        SkippedUpdates(),
        NaN(),
        LearningRate(),
    ]


@dataclass
class Health:
    """All checks of a run. What they know of earlier steps is part of the run's state."""

    checks: Iterable[Check]
    repeat: int = REPEAT_STEPS
    spoke: dict[str, int] = field(default_factory=dict)
    """Name of a check -> the last step in which it spoke."""
    said: list[str] = field(default_factory=list)
    """The sentences of the last step."""
    problems: list[str] = field(default_factory=list)
    """Those of them that come from a check that counts as a problem."""

    def examine(self, seen: Seen) -> Metrics:
        """Run every check on a step; the metrics `health/<name>` of its row."""
        self.said, self.problems, metrics = [], [], Metrics()
        for check in self.checks:
            sentence = check(seen)
            metrics[f"health/{check.name}"] = float(sentence is not None)
            if sentence is None or seen.step < self.spoke.get(check.name, -self.repeat) + self.repeat:
                continue
            self.spoke[check.name] = seen.step
            self.said.append(sentence)
            if check.is_problem:
                self.problems.append(sentence)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped; plain values."""
        kept = {check.name: {name: list(x) for name, x in check.kept.items()} for check in self.checks if check.kept}
        return {"spoke": dict(self.spoke), "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.spoke = dict(state["spoke"])
        for check in self.checks:
            check.kept = {name: list(values) for name, values in state["kept"].get(check.name, {}).items()}
