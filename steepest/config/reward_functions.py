"""`reward.functions`: the rewards whose weighted sum is a response's score. Read here, for rules and for the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steepest.registry import is_own_code, nearest

KEY = "reward.functions"
GRADER = "grader"
"""The name that stands for the reward which a row's data_source chooses."""
REWARD_MODEL = "reward_model"
JUDGE = "judge"
IN_WORKERS = ("grader", "exact", "format", "gsm8k", "length", "math", "multiple_choice", "numeric")
"""What runs in the reward's worker processes; rewards/ has the functions, a test compares the two."""
NAMES = (*IN_WORKERS, REWARD_MODEL, JUDGE)


@dataclass(frozen=True)
class WeightedFunction:
    """One reward of the sum."""

    name: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What its score is called in metrics and records: of a function of the user's own, the function's name."""
        return self.name.rpartition(":")[2]


def functions_of(value: Mapping[str, Any]) -> tuple[WeightedFunction, ...]:
    """The rewards of a mapping that `function_problems` finds nothing wrong with."""
    return tuple(
        WeightedFunction(name, float(entry["weight"]), {k: v for k, v in entry.items() if k != "weight"})
        if isinstance(entry, Mapping)
        else WeightedFunction(name, float(entry))
        for name, entry in value.items()
    )


def function_problems(value: Mapping[str, Any]) -> list[str]:
    """What is wrong with `reward.functions`: names, weights, two rewards of one label. Options are checked later, by
    the function itself."""
    problems = [problem for name, entry in value.items() for problem in _entry_problems(str(name), entry)]
    labels = [str(name).rpartition(":")[2] for name in value]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        problems.append(f"{KEY}: two rewards are called {label}, so their scores could not be told apart. Rename one.")
    return problems


def _entry_problems(name: str, entry: Any) -> list[str]:
    if name not in NAMES and not is_own_code(name):
        guess = nearest(name, NAMES)
        hint = f" Did you mean {guess}?" if guess else ""
        return [f"{KEY}: no such reward: {name}.{hint} Known: {', '.join(NAMES)}, or file.py:function of your own."]
    weight = entry.get("weight") if isinstance(entry, Mapping) else entry
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < float("inf"):
        return [f"{KEY}.{name}={entry}: expected its weight, a number, or a mapping {{weight: 1.0, option: value}}."]
    if weight == 0:
        return [f"{KEY}.{name}: weight 0 changes nothing. Remove it, or give another weight."]
    options = sorted(set(entry) - {"weight"}) if isinstance(entry, Mapping) else []
    if options and name in (GRADER, REWARD_MODEL, JUDGE):
        home = "reward.mode" if name == GRADER else f"reward.{name}.*"
        return [f"{KEY}.{name}: takes no option ({', '.join(options)}). What can be set is {home}."]
    return []
