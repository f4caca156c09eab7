"""Trap 9: how a batch is cut changes neither gradients nor metrics, for actor and critic, for each aggregation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steepest.core.aggregation import LOSS_AGG_MODES
from steepest.learner.actor import ActorLossSettings
from steepest.learner.critic import CriticLossSettings
from steepest.learner.micro_batches import MicroBatches
from tests.support.learner_parts import left_out, make_actor, make_batch, make_critic, record_gradients, with_log_probs

# micro 1 holds a micro-batch of the fully masked row alone; 15 tokens make bins of unequal size in another order
CUTS = {
    "1": MicroBatches(rows=1),
    "2": MicroBatches(rows=2),
    "4": MicroBatches(rows=4),
    "all": MicroBatches(rows=100),
    "tokens": MicroBatches(tokens=15),
}


def scale(mode):
    return 9.0 if mode == "seq-mean-token-sum-norm" else None


def actor_update(mode, micro, **loss):
    settings = ActorLossSettings(loss_agg_mode=mode, loss_scale_factor=scale(mode), **loss)
    actor = make_actor(mini=8, micro=micro, loss=settings, forward=MicroBatches(rows=8))
    batch = with_log_probs(make_batch(), actor, shift=0.3)
    gradients = record_gradients(actor)
    metrics = actor.update(batch, step=1)
    return gradients[0], metrics


def critic_update(mode, micro):
    settings = CriticLossSettings(loss_agg_mode=mode, loss_scale_factor=scale(mode), cliprange_value=0.2)
    critic = make_critic(micro=micro, loss=settings, zero_head=False)
    gradients = record_gradients(critic)
    metrics = critic.update(make_batch(), step=1)
    return gradients[0], metrics


def assert_same(found, want):
    (gradients, metrics), (want_gradients, want_metrics) = found, want
    assert gradients.keys() == want_gradients.keys()
    # token-sum adds up 30 tokens, so 1e-6 is taken of the largest gradient where that is above 1
    largest = max(1.0, max(g.abs().max().item() for g in want_gradients.values()))
    worst = max((gradients[name] - want_gradients[name]).abs().max().item() for name in gradients)
    assert worst < 1e-6 * largest
    assert metrics.keys() == want_metrics.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(want_metrics[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_actor(mode):
    terms = {"entropy_coeff": 0.3, "use_kl_loss": True, "kl_loss_coef": 0.7}
    want = actor_update(mode, CUTS["all"], **terms)
    assert max(g.abs().max().item() for g in want[0].values()) > 1e-3
    for name in ("1", "2", "4", "tokens"):
        assert_same(actor_update(mode, CUTS[name], **terms), want)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_critic(mode):
    want = critic_update(mode, CUTS["all"])
    assert max(g.abs().max().item() for g in want[0].values()) > 1e-3
    for name in ("1", "2", "4", "tokens"):
        assert_same(critic_update(mode, CUTS[name]), want)


def plain_rows(hf, batch):
    """(log-probs (T,), entropies (T,), hidden states before each response token) of each row, by transformers alone."""
    for i in range(len(batch)):
        p, t = int(batch.prompt_lengths[i]), int(batch.response_lengths[i])
        ids = torch.cat([batch.prompts[i, batch.prompts.shape[1] - p :], batch.responses[i, :t]])[None]
        out = hf(input_ids=ids, use_cache=False, output_hidden_states=True)
        yield i, t, out, ids[0, p:], slice(p - 1, p + t - 1)


def test_actor_gradient_is_that_of_the_formula_written_out():
    """The whole loss by transformers' own padded forward, row by row, without any of our code."""
    temperature, entropy_coeff, kl_coef = 0.7, 0.3, 0.5
    settings = ActorLossSettings(entropy_coeff=entropy_coeff, use_kl_loss=True, kl_loss_coef=kl_coef, kl_loss_type="k2")
    actor = make_actor(mini=8, micro=CUTS["tokens"], loss=settings, temperature=temperature)
    batch = with_log_probs(make_batch(), actor, shift=0.3)
    hf = make_actor().model.hf  # same seed, same weights
    hf.set_attn_implementation("eager")
    total, num_tokens = torch.zeros(()), int(batch.loss_mask.sum())
    for i, t, out, targets, places in plain_rows(hf, batch):
        logp = (out.logits[0, places] / temperature).log_softmax(-1)
        lp, entropy = logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
        a, old, ref, m = (
            x[i, :t] for x in (batch.advantages, batch.old_log_probs, batch.ref_log_probs, batch.loss_mask)
        )
        ratio = (lp - old).exp()
        pg = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
        pg = torch.where(a < 0, torch.minimum(pg, -3.0 * a), pg)
        total = total + ((pg - entropy_coeff * entropy + kl_coef * 0.5 * (lp - ref) ** 2) * m).sum() / num_tokens
    total.backward()
    gradients = record_gradients(actor)
    metrics = actor.update(batch, step=1)
    want = {name: p.grad for name, p in hf.named_parameters()}
    for name, g in gradients[0].items():
        assert (g - want[name.removeprefix("hf.")]).abs().max() < 3e-6, name  # of up to 0.2
    loss = metrics["actor/pg_loss"] - entropy_coeff * metrics["actor/entropy_loss"] + kl_coef * metrics["actor/kl_loss"]
    assert loss == pytest.approx(total.item(), abs=1e-5)
    norm = torch.stack([g.norm() for g in want.values()]).norm().item()
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_critic_gradient_is_that_of_the_formula_written_out():
    critic = make_critic(micro=CUTS["tokens"], zero_head=False, loss=CriticLossSettings(cliprange_value=0.2))
    batch = make_batch()
    hf = make_critic(zero_head=False).model.hf
    hf.set_attn_implementation("eager")
    total, num_tokens = torch.zeros(()), int(batch.loss_mask.sum())
    for i, t, out, _, places in plain_rows(hf, batch):
        v, old, r, m = out.logits[0, places, 0], batch.values[i, :t], batch.returns[i, :t], batch.loss_mask[i, :t]
        near = torch.minimum(torch.maximum(v, old - 0.2), old + 0.2)
        total = total + 0.5 * (torch.maximum((v - r) ** 2, (near - r) ** 2) * m).sum() / num_tokens
    total.backward()
    gradients = record_gradients(critic)
    metrics = critic.update(batch, step=1)
    want = {name: p.grad for name, p in hf.named_parameters()}
    for name, g in gradients[0].items():
        assert (g - want[name.removeprefix("hf.")]).abs().max() < 1e-6, name
    assert metrics["critic/vf_loss"] == pytest.approx(total.item(), rel=1e-5)


def test_a_fully_masked_row_changes_nothing():
    """Trap 10 for the update: the batch without row 2 gives the same gradient, whatever that row holds."""

    def gradient(batch):
        actor = make_actor(mini=8, micro=CUTS["2"])
        gradients = record_gradients(actor)
        actor.update(batch, step=1)
        return gradients[0]

    full = with_log_probs(make_batch(), make_actor(), shift=0.3)
    wild = replace(full, advantages=full.advantages.clone())
    wild.advantages[2] = float("nan")
    want = gradient(full.select(torch.tensor([0, 1, 3, 4, 5, 6, 7])))
    for batch in (full, wild):
        found = gradient(batch)
        assert max((found[name] - want[name]).abs().max().item() for name in want) < 1e-6


def test_a_batch_of_masked_rows_only_leaves_the_weights_alone():
    actor, critic = make_actor(mini=4, micro=CUTS["1"]), make_critic(mini=4)
    batch = with_log_probs(make_batch(), actor)
    batch = left_out(batch)
    before = [p.clone() for m in (actor.model, critic.model) for p in m.parameters()]
    assert actor.update(batch, step=1) == {"actor/lr": 1e-3}
    assert critic.update(batch, step=1) == {"critic/lr": 1e-3}
    after = [p for m in (actor.model, critic.model) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    log_probs, entropies = actor.log_probs(batch)
    assert not log_probs.any() and not entropies.any()
