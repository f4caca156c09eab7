"""The schema itself: documented, in step with the page, the registries and its consumers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from steepest.config import describe, tree
from steepest.config.algorithms import ESTIMATORS, LOSSES
from steepest.config.schema import Config, SFTConfig

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs" / "configuration.md"


@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_every_field_says_what_it_does(schema: type) -> None:
    docs = describe.field_docs(schema)
    assert set(docs) == set(tree.leaves(schema)) | {"provenance.sources", "provenance.notes", "provenance.warnings"}
    assert [key for key, text in docs.items() if len(text) < 8 or not text.endswith((".", "`"))] == []


def test_every_default_passes_its_own_checks() -> None:
    for schema in (Config, SFTConfig):
        for leaf in tree.leaves(schema).values():
            assert tree.value_problem(leaf, leaf.default) is None, leaf.key


def test_the_page_holds_the_tables_of_the_schema() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == describe.fill_tables(page), "run: python -m steepest.config.describe docs/configuration.md"


def test_names_in_the_schema_are_those_of_the_registries() -> None:
    pytest.importorskip("torch")
    from steepest.config.types import NameOf
    from steepest.core.advantages import ADVANTAGE_ESTIMATORS
    from steepest.core.aggregation import LOSS_AGG_MODES
    from steepest.core.policy_losses import POLICY_LOSSES

    leaves = tree.leaves(Config)
    assert sorted(leaves["algorithm.adv_estimator"].mark(NameOf).known) == ADVANTAGE_ESTIMATORS.names()
    assert sorted(leaves["actor_rollout_ref.actor.policy_loss.loss_mode"].mark(NameOf).known) == POLICY_LOSSES.names()
    assert set(leaves["actor_rollout_ref.actor.loss_agg_mode"].choices) == set(LOSS_AGG_MODES)


CONSUMED_IN_CONFIG = {
    "data.tokenizer",  # becomes actor_rollout_ref.model.tokenizer_path
    "actor_rollout_ref.actor.clip_ratio",  # becomes clip_ratio_low and clip_ratio_high
    "actor_rollout_ref.rollout.val_kwargs.do_sample",  # its section: must agree with temperature
    "actor_rollout_ref.actor.ppo_mini_batch_size",  # plan: mini_batch_rows
    "critic.ppo_mini_batch_size",
    *(
        f"{section}optim.{name}"  # plan: warm-up in steps
        for section in ("actor_rollout_ref.actor.", "critic.", "")
        for name in ("lr_warmup_steps", "lr_warmup_steps_ratio")
    ),
    "actor_rollout_ref.actor.old_log_probs",  # plan
    "critic.enable",  # plan
    "algorithm.gdpo_reward_keys",  # sections/advantages.py: named_rewards
    "algorithm.gdpo_reward_weights",
    "reward.reward_model.enable",  # its section: becomes reward.functions
    "trainer.max_critic_ckpt_to_keep",  # its section: another name of max_actor_ckpt_to_keep
    "trainer.nnodes",  # its section: one process
    "trainer.n_gpus_per_node",
    "trainer.project_name",  # default_local_dir
    "trainer.experiment_name",
    "trainer.total_epochs",  # plan
    "trainer.total_training_steps",
    # keywords of estimators and losses: a function is registered only if it has those that its statement names
    *(f"algorithm.{key}" for key in ESTIMATORS.options()),
    *(f"actor_rollout_ref.actor.{key}" for key in LOSSES.options()),
}
"""Keys whose one consumer is their section, plan.py or an algorithm."""
PASSED_WHOLE = ("optim",)
"""Sections that are handed to a function under another name, so that only `<anything>.field` can be looked for."""


def attribute_reads() -> tuple[set[tuple[str, str]], set[str]]:
    """((owner, field) pairs, fields) of every attribute read in the package outside config/.

    The owner of `config.actor_rollout_ref.actor.optim.lr` is `optim`, of `actor.shuffle` it is `actor`.
    """
    pairs, names = set(), set()
    for file in sorted((REPOSITORY / "steepest").rglob("*.py")):
        if "config" in file.relative_to(REPOSITORY / "steepest").parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                owner = node.value
                name = (
                    owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
                )
                pairs.add((name, node.attr))
                names.add(node.attr)
    return pairs, names


OTHER_OWNERS = {"data": {"config"}, "kl_ctrl": {"control"}, "custom_reward_function": {"custom"},
                "rollout_correction": {"correction"}}  # fmt: skip


@pytest.mark.skipif(
    not (REPOSITORY / "steepest" / "trainer" / "main_ppo.py").exists(),
    reason="the trainer, which reads the keys, is not here",
)
@pytest.mark.parametrize("schema", [Config, SFTConfig])
def test_every_field_is_read(schema: type) -> None:
    pairs, names = attribute_reads()
    unread = []
    for key in tree.leaves(schema):
        if key in CONSUMED_IN_CONFIG:
            continue
        section, name = key.split(".")[-2:]
        owners = {section, *OTHER_OWNERS.get(section, ())}
        is_read = name in names if section in PASSED_WHOLE else any((owner, name) in pairs for owner in owners)
        if not is_read:
            unread.append(key)
    assert unread == [], "a key that nothing reads: give it its consumer, or take it out of the schema"
