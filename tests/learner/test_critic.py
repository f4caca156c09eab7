from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steepest.learner.critic import CriticLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from tests.support.learner_parts import make_batch, make_critic, same_bits, value_model, weights


def test_values_start_at_zero():
    """Trap 24."""
    values, final = make_critic().values(make_batch())
    assert values.shape == make_batch().responses.shape and final.shape == (8,)
    assert not values.any() and not final.any()


def test_values_are_read_before_each_token():
    """Trap 25: prefix by prefix from the plain model; final values after the last token, for the masked row too."""
    critic, batch = make_critic(zero_head=False, forward=MicroBatches(tokens=15)), make_batch()
    values, final = critic.values(batch)
    hf = value_model(zero_head=False).hf.eval()
    hf.set_attn_implementation("eager")
    for i in range(len(batch)):
        prompt = batch.prompts[i, batch.prompts.shape[1] - int(batch.prompt_lengths[i]) :].tolist()
        length = int(batch.response_lengths[i])
        for t in range(batch.responses.shape[1]):
            if not batch.loss_mask[i, t]:
                assert values[i, t] == 0.0
                continue
            prefix = torch.tensor([prompt + batch.responses[i, :t].tolist()])
            assert values[i, t].item() == pytest.approx(hf(input_ids=prefix).logits[0, -1, 0].item(), abs=1e-5)
        whole = torch.tensor([prompt + batch.responses[i, :length].tolist()])
        assert final[i].item() == pytest.approx(hf(input_ids=whole).logits[0, -1, 0].item(), abs=1e-5)
    assert not values.requires_grad and not final.requires_grad


def test_metrics_by_hand():
    """Values are 0 (new head). Old values 1, returns 0.2, clip 0.5: near = 0.5, so (0.3)^2 beats (0.2)^2."""
    critic, batch = make_critic(lr=0.0, mini=2, micro=MicroBatches(rows=1)), make_batch().select(slice(0, 2))
    ones = batch.loss_mask.float()
    old = ones.clone()
    old[1] = 0.0  # row 1, 2 of 9 tokens: not clipped, 0.2^2
    metrics = critic.update(replace(batch, values=old, returns=0.2 * ones), step=1)
    assert metrics["critic/vf_loss"] == pytest.approx(0.5 * (7 * 0.09 + 2 * 0.04) / 9)
    assert metrics["critic/vf_clipfrac"] == pytest.approx(7 / 9)
    assert metrics["critic/vpred_mean"] == 0.0
    # all returns are equal: nothing to explain, so no number
    names = ("vf_loss", "vf_clipfrac", "vpred_mean", "grad_norm", "skipped_steps", "lr")
    assert set(metrics) == {f"critic/{name}" for name in names}


def test_explained_variance_is_that_of_the_values_before_the_update():
    critic, batch = make_critic(lr=0.5), make_batch()
    perfect = critic.update(replace(batch, values=batch.returns), step=1)
    assert perfect["critic/vf_explained_var"] == pytest.approx(1.0)
    constant = critic.update(replace(batch, values=torch.ones_like(batch.returns)), step=2)
    assert constant["critic/vf_explained_var"] == pytest.approx(0.0, abs=1e-6)


def test_the_critic_learns_the_returns():
    critic = make_critic(lr=1e-2, mini=8, loss=CriticLossSettings(cliprange_value=10.0))
    batch = make_batch()
    losses = []
    for step in range(60):
        values, _ = critic.values(batch)
        losses.append(critic.update(replace(batch, values=values), step=step)["critic/vf_loss"])
    assert losses[-1] < 0.2 * losses[0]


def test_missing_fields_and_infinite_returns():
    critic, batch = make_critic(), make_batch()
    with pytest.raises(ValueError, match="batch.values and batch.returns are needed"):
        critic.update(replace(batch, values=None), step=1)
    before = weights(critic)
    wild = replace(batch, returns=batch.returns.clone())
    wild.returns[0, 0] = float("inf")
    assert critic.update(wild, step=1)["critic/skipped_steps"] == 1.0
    assert same_bits(weights(critic), before)


def test_each_mini_batch_has_its_own_denominator_and_each_step_its_own_shuffle():
    """Two mini-batches of one row each: the loss is the mean of the rows' losses, however many tokens each has."""
    batch = make_batch().select(slice(0, 2))
    alone = [make_critic(lr=0.0, zero_head=False).update(batch.select([row]), step=1) for row in (0, 1)]
    both = make_critic(lr=0.0, zero_head=False, mini=1).update(batch, step=1)
    want = sum(metrics["critic/vf_loss"] for metrics in alone) / 2
    assert both["critic/vf_loss"] == pytest.approx(want, rel=1e-5)

    def after(step: int) -> dict[str, torch.Tensor]:
        critic = make_critic(zero_head=False)
        critic.settings = UpdateSettings(mini_batch_rows=3, shuffle=True)
        critic.update(make_batch(), step=step)
        return weights(critic)

    assert same_bits(after(1), after(1)) and not same_bits(after(1), after(2))


def test_what_is_explained_is_the_tokens_of_the_loss():
    batch = make_batch()
    values, returns = (torch.where(batch.loss_mask, x, torch.randn(x.shape)) for x in (batch.values, batch.returns))
    noisy = replace(batch, values=values, returns=returns)
    found, want = (make_critic().update(one, step=1)["critic/vf_explained_var"] for one in (noisy, batch))
    assert found == want
