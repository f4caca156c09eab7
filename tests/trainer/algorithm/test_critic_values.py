"""Where the values come from: three strategies, each with the update that belongs to it."""

from __future__ import annotations

import torch

from steepest.core.advantages import EstimatorCall
from steepest.core.batch import Batch
from steepest.trainer.algorithm.advantages import Advantages
from steepest.trainer.algorithm.critic_values import NoCritic, Values, ValuesFromPass, ValuesFromUpdate
from steepest.trainer.algorithm.kl_rewards import plain_rewards
from tests.support.fake_parts import FakeCluster
from tests.support.learner_parts import make_critic, same_bits, weights

GAE = EstimatorCall("gae", {"gamma": 1.0, "lam": 0.9})


def scored() -> Batch:
    batch = Batch.from_sequences([[1], [1, 2]], [[2, 3], [4]], group_ids=[0, 1], truncated=[False] * 2)
    batch.token_level_scores = torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    plain_rewards(batch)
    return batch


def test_without_a_critic_there_are_no_values_and_no_update():
    part = NoCritic()
    assert part.values(scored()) == Values(None, None, None)
    assert part.update(scored(), Values(), 1) == {}


def test_a_pass_is_followed_by_an_update_of_its_own():
    cluster, batch = FakeCluster(), scored()
    part = ValuesFromPass(cluster)
    found = part.values(batch)
    assert found.values.tolist() == [[4.0, 4.0], [4.0, 0.0]] and found.final_values.tolist() == [5.0, 5.0]
    assert found.gradient is None and part.update(batch, found, 7) == {"critic/vf_loss": 2.0}
    assert cluster.calls == ["values", "update_critic 7"]


def test_one_pass_for_both_hands_its_gradient_to_the_step():
    cluster, batch = FakeCluster(), scored()
    part = ValuesFromUpdate(cluster, GAE)
    first, second = part.values(batch), part.values(batch)
    assert first.values.tolist() == [[4.0, 4.0], [4.0, 0.0]] and first.gradient.metrics == {"the": 1.0}
    assert part.update(batch, first, 7) == part.update(batch, second, 8) == {"critic/vf_loss": 2.0}
    assert cluster.calls == ["values_and_gradient"] * 2 + ["step_critic with {'the': 1.0}"] * 2
    assert part == ValuesFromUpdate(cluster, part.estimator), "it keeps nothing of a step"


class OneCritic:
    """The passes of a real critic, and how often each was asked for."""

    def __init__(self) -> None:
        self.critic, self.calls = make_critic(mini=2, zero_head=False), []

    def values(self, batch):
        self.calls.append("values")
        return self.critic.values(batch)

    def update_critic(self, batch, step):
        self.calls.append("update")
        return self.critic.update(batch, step=step)

    def values_and_gradient(self, batch, estimator):
        self.calls.append("both")
        return self.critic.values_and_gradient(batch, estimator)

    def step_critic(self, batch, found):
        self.calls.append("step")
        return self.critic.step_on_gradient(batch, found)


def test_both_ways_are_one_update_of_the_critic():
    advantages = Advantages(GAE.bind(), whitened=False)
    results = []
    for make in (ValuesFromPass, lambda critic: ValuesFromUpdate(critic, GAE)):
        critic, batch = OneCritic(), scored()
        part = make(critic)
        found = part.values(batch)
        batch.values, batch.final_values = found.values, found.final_values
        advantages(batch)
        metrics = part.update(batch, found, 1)
        results.append((critic.calls, batch.values, metrics["critic/vf_loss"], weights(critic.critic)))
    (calls, values, loss, after), (other_calls, other_values, other_loss, other_after) = results
    assert calls == ["values", "update"] and other_calls == ["both", "step"]
    torch.testing.assert_close(values, other_values, rtol=0, atol=1e-6)
    assert abs(loss - other_loss) < 1e-6
    assert max(float((after[name] - other_after[name]).abs().max()) for name in after) < 3e-6
    assert not same_bits(after, weights(make_critic(mini=2, zero_head=False)))
