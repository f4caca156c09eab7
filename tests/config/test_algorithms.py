"""What is known of an algorithm stands in its statement: no other code asks for its name."""

from __future__ import annotations

import ast
from pathlib import Path

import steepest
from steepest.config.algorithms import ESTIMATORS, EXTRAS, LOSSES, EstimatorSpec, same
from steepest.config.load import load_config
from tests.support.commands import REQUIRED

PACKAGE = Path(steepest.__file__).parent
NAMES = {*ESTIMATORS.names(), *LOSSES.names()}


def comparisons(source: str) -> list[int]:
    """Lines that compare something with the name of an algorithm, or look for the colon of the user's own code."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            sides += [item for side in sides if isinstance(side, (ast.Tuple, ast.List, ast.Set)) for item in side.elts]
            values = [side.value for side in sides if isinstance(side, ast.Constant)]
            is_colon = ":" in values and isinstance(node.ops[0], (ast.In, ast.NotIn))
            if is_colon or NAMES.intersection(value for value in values if isinstance(value, str)):
                lines.append(node.lineno)
    return lines


def test_no_code_asks_for_the_name_of_an_algorithm() -> None:
    asked = 'a == "gae"\nb in ("grpo", c)\n":" not in d\ne == "other"\n'
    assert comparisons(asked) == [1, 2, 3]
    found = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := comparisons(file.read_text(encoding="utf-8")))
    }
    assert found.keys() == {"registry.py"}, found
    assert len(found["registry.py"]) == 1, "is_own_code"


def test_every_option_is_a_key() -> None:
    config = load_config(REQUIRED)
    for section, keys in (
        (config.algorithm, ESTIMATORS.option_keys()),
        (config.actor_rollout_ref.actor, LOSSES.option_keys()),
    ):
        for key in keys:
            value = section
            for part in key.split("."):
                assert hasattr(value, part), key
                value = getattr(value, part)


def test_keys_are_those_of_the_options_and_of_what_is_needed() -> None:
    spec = EstimatorSpec("one", options={"gamma": "decay", **same("lam")}, needs=("group_ids", "named_rewards"))
    assert spec.keys == ("gamma", "lam", *EXTRAS["named_rewards"].keys)
    assert spec.in_groups and not spec.needs_critic and not spec.whitened
