"""Values and gradient from one forward pass, for a critic with one update a step."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steepest.core.advantages import ADVANTAGE_ESTIMATORS, AdvantageInputs, EstimatorCall, gae
from steepest.core.batch import Batch
from steepest.learner.critic import Critic, ValuesAndGradient
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.registry import Entry
from tests.learner.test_lora import adapter_critic, lora_actor
from tests.support.learner_parts import left_out, make_batch, make_critic, weights

SMALL = MicroBatches(tokens=15)


GAE = EstimatorCall("gae", {"gamma": 0.9, "lam": 0.8, "bootstrap_truncated": True})
"""With everything it can read."""


def rewarded() -> Batch:
    """No values and no returns yet; rows 0, 3 and 5 were cut."""
    batch = make_batch()
    rewards = torch.randn(batch.responses.shape, generator=torch.Generator().manual_seed(5))
    truncated = torch.tensor([1, 0, 0, 1, 0, 1, 0, 0], dtype=torch.bool)
    return replace(batch, token_level_rewards=rewards, truncated=truncated, values=None, returns=None)


def in_two_passes(critic: Critic, batch: Batch) -> dict[str, float]:
    batch.values, batch.final_values = critic.values(batch)
    batch.returns = GAE.returns_of(batch)
    return critic.update(batch, step=1)


def in_one_pass(critic: Critic, batch: Batch) -> dict[str, float]:
    found = critic.values_and_gradient(batch, GAE)
    batch.values, batch.final_values = found.values, found.final_values
    batch.returns = GAE.returns_of(batch)
    return critic.step_on_gradient(batch, found)


def make(kind: str, micro: MicroBatches) -> Critic:
    if kind == "own":
        return make_critic(zero_head=False, lr=0.05, micro=micro)
    critic = adapter_critic(lora_actor(), micro=micro, mini=8)
    torch.manual_seed(1)
    for name, parameter in critic.model.saved_parameters():
        if "lora_B" in name or "head" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return critic


@pytest.mark.parametrize("micro", [SMALL, MicroBatches(rows=1), MicroBatches()], ids=["tokens", "rows", "whole"])
@pytest.mark.parametrize("kind", ["own", "adapter"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "loss-mask"])
def test_one_pass_gives_the_values_metrics_and_weights_of_two(kind, micro, masked):
    """Against the pass that reads and the update that follows, cut in another way."""
    batch, other = rewarded(), rewarded()
    if masked:
        keep = torch.rand(batch.responses.shape, generator=torch.Generator().manual_seed(2)) > 0.4
        batch.loss_mask, other.loss_mask = batch.loss_mask & keep, other.loss_mask & keep
    one, two = make(kind, micro), make(kind, MicroBatches(rows=3))
    found, wanted = in_one_pass(one, batch), in_two_passes(two, other)
    assert found["critic/grad_norm"] > 0.05 and found["critic/vf_loss"] > 0.05
    assert found == pytest.approx(wanted, rel=2e-5, abs=1e-7)
    torch.testing.assert_close(batch.values, other.values, atol=1e-6, rtol=1e-5)
    own = rewarded().trained_mask.any(1)
    torch.testing.assert_close(batch.final_values[own], other.final_values[own], atol=1e-6, rtol=1e-5)
    assert (batch.values[own].abs().amax(1) > 0).all() and not batch.values[2].any()
    before, after, expected = weights(make(kind, micro)), weights(one), weights(two)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(moved) > 10
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=0)  # Adam's first step is 0.05


def test_the_whole_batch_has_one_denominator_and_each_row_its_own_returns():
    """A row alone in its micro-batch weighs as in the whole batch, and sees no other row's values."""
    seen: list[Tensor] = []

    def recorded(inputs: AdvantageInputs) -> tuple[Tensor, Tensor]:
        seen.append(inputs.values.clone())
        return gae(inputs, gamma=0.9, lam=0.8)

    critic, batch = make("own", MicroBatches(rows=1)), rewarded()
    with ADVANTAGE_ESTIMATORS.temporarily(Entry("recorded", recorded)):
        values = critic.values_and_gradient(batch, EstimatorCall("recorded")).values
    assert [len(part) for part in seen] == [1] * 7  # row 2 is left out
    own = batch.trained_mask.any(1)
    assert torch.equal(torch.cat(seen), values[own])


def test_a_second_step_starts_from_no_gradient():
    one, two = make("own", SMALL), make("own", SMALL)
    for _ in range(3):
        found, wanted = in_one_pass(one, rewarded()), in_two_passes(two, rewarded())
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_a_batch_without_a_trained_row_steps_nothing():
    critic, batch = make("own", SMALL), left_out(rewarded())
    before = weights(critic)
    metrics = in_one_pass(critic, batch)
    assert set(metrics) == {"critic/lr"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(critic).items())


def test_several_updates_have_no_values_in_common():
    critic = make("own", SMALL)
    critic.settings = UpdateSettings(mini_batch_rows=4)
    assert critic.settings.num_updates(8) == 2
    with pytest.raises(AssertionError):
        critic.values_and_gradient(rewarded(), GAE)


def test_an_estimator_call_is_pickled_and_gives_the_same_bits():
    """A worker of its own process gets the name and the options, and looks the function up (a closure is no pickle)."""
    one, two = make("own", SMALL), make("own", SMALL)
    found = one.values_and_gradient(rewarded(), GAE)
    sent = pickle.loads(pickle.dumps(GAE))
    again = two.values_and_gradient(rewarded(), sent)
    assert sent == GAE and torch.equal(found.values, again.values) and found.metrics == again.metrics
    pairs = zip(one.model.parameters(), two.model.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_an_estimator_of_a_users_file_is_looked_up_by_its_name(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def own(x, *, gamma):\n    return x.token_level_rewards, gamma * x.token_level_rewards\n")
    call = pickle.loads(pickle.dumps(EstimatorCall(f"{file}:own", {"gamma": 0.5, "lam": 1.0})))
    batch = rewarded()
    assert torch.equal(call.returns_of(batch), 0.5 * batch.token_level_rewards)


def test_two_batches_can_be_between_values_and_step():
    """What was found is in the result, not in the critic: the metrics are those of the batch they are asked for."""
    critic, first, second = make("own", SMALL), rewarded(), rewarded()
    second.token_level_rewards = 3 * second.token_level_rewards
    found = [critic.values_and_gradient(batch, GAE) for batch in (first, second)]
    alone = make("own", SMALL).values_and_gradient(rewarded(), GAE)
    first.values, first.returns = found[0].values, GAE.returns_of(replace(first, **_values(found[0])))
    assert found[0].metrics == alone.metrics != found[1].metrics
    assert critic.step_on_gradient(first, found[0])["critic/vf_loss"] == alone.metrics["critic/vf_loss"]


def _values(found: ValuesAndGradient) -> dict[str, Tensor]:
    return {"values": found.values, "final_values": found.final_values}
