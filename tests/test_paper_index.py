"""docs/paper_index.md and docs/algorithms/ leave no algorithm out, and name functions, tests and curves that exist."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.policy_losses import POLICY_LOSSES
from tests.support.toy_policy import CASES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "paper_index.md").read_text(encoding="utf-8")
ROWS = [row.strip("|").split("|") for row in PAGE.splitlines() if row.startswith("| [")]
FOLDER = ROOT / "docs" / "algorithms"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page.name != "README.md")


@pytest.mark.parametrize(
    ("key", "registry"),
    [("algorithm.adv_estimator", ADVANTAGE_ESTIMATORS), ("actor.policy_loss.loss_mode", POLICY_LOSSES)],
    ids=["estimators", "losses"],
)
def test_every_registered_name_has_a_row_with_its_function(key, registry) -> None:  # type: ignore[no-untyped-def]
    rows = {row[2].strip(" `"): row[3].strip(" `") for row in ROWS}
    for name in registry.names():
        module, _, function = rows[f"{key}={name}"].partition(":")
        assert getattr(importlib.import_module(module), function) is registry.get(name).value


def test_every_function_exists() -> None:
    for row in ROWS:
        module, _, function = row[3].strip(" `").partition(":")
        assert hasattr(importlib.import_module(module), function), row[0]


def test_every_test_exists() -> None:
    named = [re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row[4]) for row in ROWS]
    assert all(named), "a row without a test"
    for file, test in {pair for pairs in named for pair in pairs}:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


def test_the_index_and_the_table_lead_to_every_page() -> None:
    contents = (FOLDER / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert f"](algorithms/{page.name})" in PAGE and f"]({page.name})" in contents, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_its_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("https://", "\n    ", "| key | value |", "```bash\nsteepest ppo", "**When.**", "<!-- toy "):
        assert part in text, part


def curves() -> dict[str, list[list[float]]]:
    """Toy case -> (accuracy, with shuffled rewards) as the pages have them."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"<!-- toy (\w+) -->\n(.*?)<!-- /toy -->", text, flags=re.S)
    return {name: [[float(x) for x in re.findall(r"\d\.\d\d", line)] for line in block.splitlines()[2:]]
            for name, block in blocks}  # fmt: skip


def test_every_case_has_its_curve_on_a_page_and_learned() -> None:
    found = curves()
    assert set(found) == {case.name for case in CASES}
    for case in CASES:
        learned, shuffled = found[case.name]
        chance = 1 - (8 / 9) ** case.best_of
        assert learned[0] == shuffled[0] == pytest.approx(chance, abs=0.005), case.name
        assert learned[-1] >= 0.9 and max(shuffled) <= chance + 0.19, case.name
