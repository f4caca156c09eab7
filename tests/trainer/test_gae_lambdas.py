"""Two lambdas in a run: the actor's make the advantages, the critic's make its targets."""

from __future__ import annotations

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.advantages import AdvantageInputs, EstimatorCall, gae
from steepest.core.batch import Batch
from steepest.core.masked import whiten
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.jobs.ppo import run_ppo
from tests.trainer.toy import make_toy, toy_overrides

WORDS = ("data.train_batch_size=16", "data.max_response_length=6", "trainer.total_training_steps=2",
         "trainer.val_before_train=False", "trainer.test_freq=-1", "algorithm.kl_ctrl.kl_coef=0",
         "algorithm.lam=0.6")  # fmt: skip


@pytest.mark.parametrize("updates", [1, 2], ids=["values in the update", "values before it"])
def test_a_run_has_an_actors_and_a_critics_lambda(tmp_path, monkeypatch, updates):
    batches: list[Batch] = []
    estimate = Advantages.__call__

    def recorded(self, batch):
        estimate(self, batch)
        batches.append(batch)

    monkeypatch.setattr(Advantages, "__call__", recorded)
    asked, returns_of = [], EstimatorCall.returns_of
    monkeypatch.setattr(
        EstimatorCall, "returns_of", lambda self, rows: asked.append(len(rows)) or returns_of(self, rows)
    )
    run_ppo(load_config(toy_overrides(
        make_toy(tmp_path / "toy"), tmp_path / "run", *WORDS,
        f"actor_rollout_ref.actor.ppo_mini_batch_size={16 // updates}",
        "algorithm.lam_critic=0.9", "algorithm.length_adaptive_alpha=0.5",
    )))  # fmt: skip
    assert len(batches) == 2 and sum(asked) == (32 if updates == 1 else 0)
    for batch in batches:
        mask, known = batch.response_mask, batch.values
        assert mask.sum(1).float().std() > 0, "answers of several lengths, or nothing would be seen"
        x = AdvantageInputs(batch.token_level_rewards, mask, values=known)
        _, targets = gae(x, gamma=1.0, lam=0.9)
        torch.testing.assert_close(batch.returns, targets, rtol=1e-5, atol=1e-6)
        rows = []
        for row in range(len(batch)):
            one = AdvantageInputs(x.token_level_rewards[[row]], mask[[row]], values=known[[row]])
            rows.append(gae(one, gamma=1.0, lam=max(0.0, 1 - 2 / int(mask[row].sum())))[0])
        torch.testing.assert_close(batch.advantages, whiten(torch.cat(rows), mask), rtol=1e-4, atol=1e-5)
