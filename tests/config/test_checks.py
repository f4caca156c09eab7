"""The sections of a job: all of them are asked, and their order decides the order of texts only."""

from __future__ import annotations

import ast
import importlib
import random
from pathlib import Path

import pytest

from steepest.config import checks, tree
from steepest.config import load as load_module
from steepest.config.checks import Deriver, NoEffect, Section
from steepest.config.load import PPO_JOB, SFT_JOB, load_config
from tests.config.test_errors import WARNINGS
from tests.support.commands import GRPO, REQUIRED

PACKAGE = Path(checks.__file__).parents[1]
ACTOR, ROLLOUT, MODEL = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "actor_rollout_ref.model"


def in_other_orders(sections: tuple[Section, ...]) -> list[tuple[Section, ...]]:
    """Ten orders in which the critic's section still stands before that of the advantages."""
    critic, advantages = (
        importlib.import_module(f"steepest.config.sections.{name}").SECTION for name in ("critic", "advantages")
    )
    found, draw = [], random.Random(0)
    while len(found) < 10:
        order = tuple(draw.sample(sections, len(sections)))
        if [id(s) for s in order if s in (critic, advantages)] == [id(critic), id(advantages)]:
            found.append(order)
    return found


def test_every_section_is_listed_in_one_job() -> None:
    files = sorted((PACKAGE / "config" / "sections").glob("[a-z]*.py"))
    made = [importlib.import_module(f"steepest.config.sections.{file.stem}").SECTION for file in files]
    listed = [id(section) for job in (PPO_JOB, SFT_JOB) for section in job.sections]
    assert sorted(listed) == sorted(id(section) for section in made) and len(files) > 10


def test_problems_are_the_same_in_any_order_of_the_sections() -> None:
    words = [
        *("data.train_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=24", "data.train_max_samples=8"),
        *(f"{ROLLOUT}.temperature=0", f"{ROLLOUT}.val_kwargs.n=4", f"{MODEL}.target_modules=[]"),
        *("trainer.nnodes=2", "trainer.resume_mode=resume_path", "trainer.critic_warmup=5"),
        *("trainer.total_training_steps=5", "critic.enable=False", "critic.share_base=head"),
        *("algorithm.mask_equal_groups=True", "reward.functions={judge: 1}", "reward.overlong_buffer.enable=True"),
        *("algorithm.kl_ctrl.type=adaptive", "algorithm.kl_ctrl.kl_coef=0"),
        *("algorithm.rollout_correction.bypass_mode=True", f"{ACTOR}.old_log_probs=recompute"),
        f"{ACTOR}.loss_agg_mode=seq-mean-token-sum-norm",
    ]
    config, problems = load_module._Loading(PPO_JOB, load_module.read_arguments([*REQUIRED, *words])).run()
    assert len(problems) > 15
    given = {word.partition("=")[0] for word in words}
    for sections in in_other_orders(PPO_JOB.sections):
        rules = [rule for section in sections for rule in section.rules]
        found = [text for rule in rules for text in rule.check(config, given.__contains__)]
        assert sorted(found) == sorted(problems)


@pytest.mark.parametrize("words", [words for words, texts in WARNINGS if texts])
def test_warnings_are_the_same_in_any_order_of_the_sections(words: list[str]) -> None:
    config = load_config([*REQUIRED, *words])
    values, sources = tree.thaw(config), config.provenance.sources
    asked = {key: tree.get(values, key) for key, source in sources.items() if source == "command line"}
    want = sorted(checks.warnings_of(PPO_JOB.sections, config, asked))
    for sections in in_other_orders(PPO_JOB.sections):
        assert sorted(checks.warnings_of(sections, config, asked)) == want


def test_the_missing_critic_is_reported_before_what_else_leaves_its_keys_without_effect() -> None:
    words = ["critic.optim.lr=1e-5", "algorithm.bootstrap_truncated=True", "algorithm.mask_truncated=True"]
    assert load_config([*GRPO, *words]).provenance.warnings == (
        "critic.optim.lr, algorithm.bootstrap_truncated have no effect: this run has no critic "
        "(algorithm.adv_estimator).",
    )


def test_a_key_without_effect_is_reported_with_the_first_reason_that_holds() -> None:
    section = Section()
    section.no_effect(
        lambda: [
            NoEffect(("a.b",), lambda c: c == "never", "never"),
            NoEffect(("a",), lambda c: True, "first"),
            NoEffect(("a.b",), lambda c: True, "second"),
            NoEffect(("ab",), lambda c: True, "third"),
        ]
    )
    section.warning(lambda given, c: iter([f"{len(given)} keys of {c}"]))
    assert list(checks.warnings_of((section,), "run", {"a.b": 1, "ab": 2, "a.c": 3, "z": 4})) == [
        "a.b, a.c have no effect: first.",
        "ab has no effect: third.",
        "4 keys of run",
    ]


def test_a_null_key_is_filled_once_and_the_origin_is_kept() -> None:
    section = Section()

    @section.null
    def first(d: Deriver) -> None:
        d.copy("a.x", "a.y", "a.z")
        d.fill("a.y", 9, "nothing")

    @section.null
    def second(d: Deriver) -> None:
        d.replace("a.x", None, "b" if d.is_set("b") else "c")

    values = {"a": {"x": 1, "y": None, "z": 3}}
    assert checks.resolve((section,), values, {"b"}.__contains__) == {"a.y": "a.x", "a.x": "b"}
    assert values == {"a": {"x": None, "y": 1, "z": 3}}


def test_no_one_outside_config_asks_the_checks_what_a_run_needs() -> None:
    """What a run needs is a field of the plan."""
    offences = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] == "config":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [item.name for item in node.names] if isinstance(node, ast.ImportFrom) else []
            if module in ("steepest.config.needs", "steepest.config.checks") or "SECTION" in names:
                offences.append(f"{file}:{node.lineno}")
    assert offences == []
