"""Two lambdas in a run: the actor's make the advantages, the critic's make its targets."""

from __future__ import annotations

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.advantages import AdvantageInputs, gae
from steepest.core.batch import Batch
from steepest.core.masked import whiten
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

WORDS = ("data.train_batch_size=16", "data.max_response_length=6", "trainer.total_training_steps=2",
         "trainer.val_before_train=False", "trainer.test_freq=-1", "algorithm.kl_ctrl.kl_coef=0",
         "algorithm.lam=0.6")  # fmt: skip


@pytest.mark.parametrize("updates", [1, 2], ids=["values in the update", "values before it"])
def test_a_run_has_an_actors_and_a_critics_lambda(tmp_path, capsys, updates):
    batches: list[Batch] = []
    run_ppo(load_config(toy_overrides(
        make_toy(tmp_path / "toy"), tmp_path / "run", *WORDS,
        f"actor_rollout_ref.actor.ppo_mini_batch_size={16 // updates}",
        "algorithm.lam_critic=0.9", "algorithm.length_adaptive_alpha=0.5",
    )), observers=[lambda step, experience: batches.append(experience.batch)])  # fmt: skip
    assert len(batches) == 2
    assert ("The critic's one update computes the values too" in capsys.readouterr().out) == (updates == 1)
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
