"""`use_prefix_sharing` in a run: who shares, the same numbers as without, micro-batches that keep groups together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steepest.assembly.compute import check_attention, shares_prompts
from steepest.config.load import load_config
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import ConfigError
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.trainable import ComputeSettings
from steepest.loggers.jsonl import read_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.models.test_shared_prompts import make_batch
from tests.support.learner_parts import make_actor, make_critic, record_gradients
from tests.support.toy_run import make_toy, toy_overrides

KEY = "actor_rollout_ref.actor.use_prefix_sharing"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


class OtherDevice(CPUDevice):
    def torch_device(self):
        return torch.device("meta")


def test_prompts_are_shared_where_there_are_several_responses_and_the_attention_can(toy, tmp_path):
    def config(*more: str):
        return load_config(toy_overrides(toy, tmp_path, *more))

    several = "actor_rollout_ref.rollout.n=2"
    assert shares_prompts(config(several), CPUDevice())
    assert shares_prompts(config(several, f"{KEY}=True"), CPUDevice())
    assert not shares_prompts(config(several, f"{KEY}=False"), CPUDevice())
    assert not shares_prompts(config(), CPUDevice())
    assert not shares_prompts(config(several), OtherDevice())
    with pytest.raises(ConfigError, match=rf"^{KEY}=True: attention over a shared prompt runs on the CPU only"):
        check_attention(config(several, f"{KEY}=True"), OtherDevice())


def test_the_key_without_groups_is_told_to_have_no_effect(toy, tmp_path):
    warnings = load_config(toy_overrides(toy, tmp_path, f"{KEY}=True")).provenance.warnings
    assert f"{KEY} has no effect: actor_rollout_ref.rollout.n=1: no two responses have one prompt." in warnings


@pytest.mark.parametrize("estimator", ["grpo", "gae"])
def test_a_run_that_shares_prompts_is_one_that_does_not_up_to_rounding(toy, tmp_path, estimator, capsys):
    """Actor, reference and critic: each has a number in the metrics that would tell."""
    rows = {}
    for asked in ("null", "False"):
        folder = tmp_path / asked
        words = (
            "trainer.total_training_steps=2", "trainer.val_before_train=False", f"algorithm.adv_estimator={estimator}",
            "data.train_batch_size=32", "actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.use_kl_loss=True",
            "data.max_response_length=3", "actor_rollout_ref.actor.ppo_mini_batch_size=16", f"{KEY}={asked}",
            "algorithm.use_kl_in_reward=False", "actor_rollout_ref.actor.optim.lr=1e-4", "critic.optim.lr=1e-4",
        )  # fmt: skip
        run_ppo(load_config(toy_overrides(toy, folder, *words)))
        rows[asked] = read_metrics(folder / "metrics.jsonl")
        said = "the prompt of 4 responses once" if asked == "null" else "each row by itself"
        assert f"packed tokens without padding, {said}" in capsys.readouterr().out
    names = ["actor/pg_loss", "actor/kl_loss", "actor/entropy", "actor/ppo_kl", "mismatch/kl"]
    names += ["critic/vf_loss", "critic/vpred_mean"] if estimator == "gae" else []
    for step in (1, 2):
        for name in names:
            limit = 1e-5 if step == 1 else 1e-3  # Adam makes whole steps of what is rounding only
            assert rows["null"][step][name] == pytest.approx(rows["False"][step][name], abs=limit), name


SIZES = [(5, (4, 9)), (3, (6,)), (8, (3, 3, 3))]


@pytest.mark.parametrize("micro", [MicroBatches(), MicroBatches(tokens=15), MicroBatches(rows=2, tokens=None)])
@pytest.mark.parametrize("make", [make_actor, make_critic])
def test_gradients_are_those_of_rows_by_themselves_however_the_groups_are_cut(make, micro):
    batch = make_batch(SIZES, vocabulary=23)
    g = torch.Generator().manual_seed(3)
    noise = [torch.randn(batch.responses.shape, generator=g).masked_fill(~batch.response_mask, 0.0) for _ in range(3)]
    batch = replace(batch, advantages=noise[0], returns=noise[1], values=noise[2])
    found = []
    for shares in (False, True):
        part = make(micro=micro, compute=ComputeSettings(shares_prompts=shares))
        if make is make_critic:
            torch.nn.init.normal_(part.model.score.weight, std=0.3, generator=torch.Generator().manual_seed(0))
        gradients = record_gradients(part)
        part.update(replace(batch), step=1)
        found.append(gradients[0])
    plain, shared = found
    assert len(plain) > 20 and max(float(x.abs().max()) for x in plain.values()) > 1e-2
    for name, gradient in plain.items():
        torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4)


def test_a_pass_holds_the_prompt_of_a_group_once():
    actor = make_actor(compute=ComputeSettings(shares_prompts=True))
    batch = make_batch(SIZES, vocabulary=23)
    (part,) = actor.micro_batches(batch, actor.cut(batch, MicroBatches(), batch.loss_mask), batch.loss_mask)
    assert len(part.packed.input_ids) == (5 + 13) + (3 + 6) + (8 + 9)
    assert part.packed.lengths == (9, 14, 9, 11, 11, 11)
