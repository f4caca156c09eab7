"""From the configuration to the policy loss: every option reaches the losses that take it."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch

from steepest.assembly.policy_loss import build_policy_loss
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.core.batch import Batch
from steepest.core.policy_losses import POLICY_LOSSES, LossInputs
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.commands import REQUIRED
from tests.support.toy_run import make_toy, toy_overrides

ACTOR = "actor_rollout_ref.actor"
MODE = f"{ACTOR}.policy_loss.loss_mode"
GIVEN = {
    "clip_ratio_low": 0.11,
    "clip_ratio_high": 0.12,
    "clip_ratio_c": 7.0,
    "tau_pos": 1.3,
    "tau_neg": 1.4,
    "policy_loss.clip_cov_ratio": 0.15,
    "policy_loss.clip_cov_lb": 1.6,
    "policy_loss.clip_cov_ub": 1.7,
    "policy_loss.kl_cov_ratio": 0.18,
    "policy_loss.ppo_kl_coef": 0.19,
}
WORDS = [f"{ACTOR}.{name}={value}" for name, value in GIVEN.items()]


def bound(function: partial) -> dict[str, float]:
    keywords = {p.name for p in inspect.signature(function.func).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert function.keywords.keys() == keywords
    return function.keywords


@pytest.mark.parametrize("name", POLICY_LOSSES.names())
def test_each_loss_gets_its_options(name: str) -> None:
    loss, choose = build_policy_loss(load_config([*REQUIRED, *WORDS, f"{MODE}={name}"]))
    entry, given = POLICY_LOSSES.get(name), {key.removeprefix("policy_loss."): value for key, value in GIVEN.items()}
    assert loss.func is entry.value
    assert bound(loss) == {key: given[key] for key in bound(loss)}
    assert (choose is not None) == (name in ("clip_cov", "kl_cov"))
    if choose is not None:
        assert choose.func is entry.facts["choose"] and bound(choose) == {key: given[key] for key in bound(choose)}


def test_a_loss_of_the_users_own_may_choose_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from steepest.core.policy_losses import POLICY_LOSSES\n"
        "def choose(x, *, kl_cov_ratio):\n"
        "    return x.advantages > kl_cov_ratio\n"
        "@POLICY_LOSSES.register('mine', choose=choose)\n"
        "def mine(x, *, tau_pos):\n"
        "    return -x.advantages * x.log_probs * tau_pos, {}\n"
    )
    with POLICY_LOSSES.temporarily():
        loss, choose = build_policy_loss(load_config([*REQUIRED, *WORDS, f"{MODE}={file}:mine"]))
    mask = torch.ones(1, 2, dtype=torch.bool)
    x = LossInputs(torch.tensor([[-1.0, -1.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 0.1]]), mask)
    assert torch.allclose(loss(x)[0], torch.tensor([[1.3, 0.13]]))
    assert choose(x).tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("name", "idle"),
    [("vanilla", "clip"), ("gspo", "clip"), ("sapo", "gate"), ("kl_cov", "penalty"), ("clip_cov", "clip of the ratio")],
)
def test_the_plan_says_what_stands_idle_in_one_update(name: str, idle: str) -> None:
    words = ["data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8", f"{MODE}={name}"]
    notes = make_plan(load_config([*REQUIRED, *words]), 100).notes
    assert f"One update a step: the ratio is 1 throughout, so the {idle} never acts." in notes
    gpg = make_plan(load_config([*REQUIRED, *words[:2], f"{MODE}=gpg"]), 100).notes
    assert not any("the ratio is 1" in note for note in gpg)


def test_a_run_with_the_exact_kl_reads_no_log_probs_of_the_reference(
    tmp_path: Path,
) -> None:
    """From keys to metrics: the first update stands at the reference, the second does not; no pass of its own."""
    batches: list[Batch] = []
    words = (
        "trainer.total_training_steps=2",
        "data.train_batch_size=128",
        "data.train_max_samples=256",
        f"{ACTOR}.ppo_mini_batch_size=128",
        f"{ACTOR}.use_kl_loss=True",
        f"{ACTOR}.kl_loss_type=full",
        f"{MODE}=kl_cov",
        "algorithm.use_kl_in_reward=False",
    )
    config = load_config(toy_overrides(make_toy(tmp_path / "toy"), tmp_path / "run", *words))
    run_ppo(config, observers=[lambda step, experience: batches.append(experience.batch)])
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    first, second = metrics[1], metrics[2]
    assert first["actor/kl_loss"] == 0.0 < second["actor/kl_loss"]
    assert first["actor/cov_klfrac"] > 0 and [batch.ref_log_probs for batch in batches] == [None, None]
