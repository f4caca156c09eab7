from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from steepest.errors import ModelError
from steepest.learner.actor import Actor, ActorLossSettings
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.mini_batches import UpdateSettings
from steepest.learner.optim import OptimSettings
from steepest.learner.reference import Reference
from steepest.learner.trainable import ComputeSettings
from steepest.models.causal_lm import CausalLM
from tests.support.architectures import tiny_config, tiny_model
from tests.support.learner_parts import (
    CPU,
    make_actor,
    make_batch,
    policy,
    record_gradients,
    same_bits,
    weights,
    with_log_probs,
)


def test_log_probs_lie_in_their_places_and_zeros_elsewhere():
    """Token by token from the plain model; tool tokens, padding and the masked row hold 0 (traps 1, 2)."""
    actor, batch = make_actor(temperature=0.7, forward=MicroBatches(tokens=15)), make_batch()
    log_probs, entropies = actor.log_probs(batch)
    hf = policy().hf
    hf.set_attn_implementation("eager")
    assert log_probs.dtype == torch.float32 and log_probs.shape == batch.responses.shape
    for i in range(len(batch)):
        prompt = batch.prompts[i, batch.prompts.shape[1] - int(batch.prompt_lengths[i]) :].tolist()
        for t in range(batch.responses.shape[1]):
            if not batch.loss_mask[i, t]:
                assert log_probs[i, t] == 0.0 and entropies[i, t] == 0.0
                continue
            prefix = torch.tensor([prompt + batch.responses[i, :t].tolist()])
            logp = (hf(input_ids=prefix).logits[0, -1] / 0.7).log_softmax(-1)
            assert log_probs[i, t].item() == pytest.approx(logp[batch.responses[i, t]].item(), abs=1e-5)
            assert entropies[i, t].item() == pytest.approx(-(logp.exp() * logp).sum().item(), abs=1e-5)
    assert not log_probs.requires_grad


def test_train_and_eval_mode_give_the_same_log_probs():
    """Trap 17."""
    actor, batch = make_actor(), make_batch()
    first = actor.log_probs(batch)[0]
    actor.model.train()
    assert torch.equal(actor.log_probs(batch)[0], first)


def test_first_ratio_is_one_and_later_ones_are_not():
    """Trap 18: exactly 1 with both passes cut alike, 1 to 1e-5 with other cuts, and a wrong old pass is seen."""
    alike = make_actor(mini=4, micro=MicroBatches(rows=4))
    batch = with_log_probs(make_batch(), alike)
    metrics = alike.update(batch, step=1)
    assert metrics["actor/ratio_max_dev_first"] < 1e-6
    other = make_actor(mini=4, micro=MicroBatches(rows=1), forward=MicroBatches(tokens=100))
    metrics = other.update(with_log_probs(make_batch(), other), step=1)
    assert metrics["actor/ratio_max_dev_first"] < 1e-5
    # the weights have moved: the same old log-probs are not those of this policy any more
    assert other.update(with_log_probs(make_batch(), make_actor()), step=2)["actor/ratio_max_dev_first"] > 1e-4
    late = make_actor(temperature=0.9)
    assert late.update(with_log_probs(make_batch(), make_actor()), step=1)["actor/ratio_max_dev_first"] > 1e-3


def test_metrics_are_token_means_by_hand():
    """One mini-batch, all log-ratios known: rows 0 and 1 hold 7 + 2 tokens."""
    actor = make_actor(lr=0.0, mini=2, micro=MicroBatches(rows=1))
    batch = with_log_probs(make_batch().select(slice(0, 2)), actor)
    old = batch.old_log_probs.clone()
    old[0, :7] -= math.log(1.5)  # ratio 1.5 in row 0, 1 in row 1
    advantages = torch.zeros_like(old)
    advantages[0, :7] = 1.0
    advantages[1, :2] = -2.0
    metrics = actor.update(replace(batch, old_log_probs=old, advantages=advantages), step=1)
    # row 0: clipped at 1.2, loss -1.2 on 7 tokens; row 1: ratio 1, loss 2 on 2 tokens
    assert metrics["actor/pg_loss"] == pytest.approx((7 * -1.2 + 2 * 2.0) / 9, abs=1e-5)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(7 / 9)
    assert metrics["actor/pg_clipfrac_lower"] == 0.0
    assert metrics["actor/ppo_kl"] == pytest.approx(-7 / 9 * math.log(1.5), abs=1e-5)
    assert metrics["actor/ratio_max_dev_first"] == pytest.approx(0.5, abs=1e-5)
    entropies = batch.entropies[batch.loss_mask]
    assert metrics["actor/entropy"] == pytest.approx(entropies.mean().item(), abs=1e-6)
    assert set(metrics) == {
        *(f"actor/{name}" for name in ("pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "entropy", "lr")),
        *(f"actor/{name}" for name in ("grad_norm", "skipped_steps", "ratio_max_dev_first")),
    }
    assert metrics["actor/skipped_steps"] == 0.0


def test_metrics_of_a_step_are_means_over_its_mini_batches():
    def run(rows):
        actor = make_actor(lr=0.0, mini=4)
        return actor.update(with_log_probs(make_batch(), actor, shift=0.3).select(rows), step=1)

    whole, first, second = run(slice(0, 8)), run(slice(0, 4)), run(slice(4, 8))
    for name in ("actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac", "actor/grad_norm"):
        assert whole[name] == pytest.approx((first[name] + second[name]) / 2, abs=1e-5), name
    assert whole["actor/ratio_max_dev_first"] == first["actor/ratio_max_dev_first"] > 0.1


def test_optional_metrics_appear_with_their_terms():
    loss = ActorLossSettings(use_kl_loss=True, kl_loss_coef=0.25, kl_loss_type="k1", entropy_coeff=0.1)
    actor = make_actor(lr=0.0, loss=loss)
    batch = with_log_probs(make_batch(), actor)
    batch = replace(batch, ref_log_probs=batch.old_log_probs - 0.5 * batch.loss_mask)
    metrics = actor.update(batch, step=1)
    assert metrics["actor/kl_loss"] == pytest.approx(0.5, abs=1e-5)  # without its coefficient
    assert metrics["actor/kl_coef"] == 0.25
    assert metrics["actor/entropy_loss"] == pytest.approx(metrics["actor/entropy"], abs=1e-5)
    plain = make_actor()
    metrics = plain.update(with_log_probs(make_batch(), plain), step=1)
    assert not {"actor/kl_loss", "actor/kl_coef", "actor/entropy_loss"} & metrics.keys()


def test_an_entropy_bonus_raises_the_entropy():
    actor = make_actor(lr=3e-2, loss=ActorLossSettings(entropy_coeff=1.0))
    batch = with_log_probs(make_batch(), actor)
    batch = replace(batch, advantages=torch.zeros_like(batch.advantages))
    before = actor.log_probs(batch)[1].sum()
    for step in range(3):
        actor.update(with_log_probs(batch, actor), step=step)
    assert actor.log_probs(batch)[1].sum() > before


@pytest.mark.parametrize("kind", ["k2", "low_var_kl", "k1+"])
def test_the_kl_loss_has_a_gradient_and_pulls_toward_the_reference(kind):
    """Trap 14: zero reward, coefficient 1."""
    loss = ActorLossSettings(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=kind)
    actor = make_actor(lr=3e-3, loss=loss)
    reference = Reference(policy(seed=5), compute=CPU)

    def prepared():
        batch = with_log_probs(make_batch(), actor)
        return replace(batch, ref_log_probs=reference.log_probs(batch), advantages=torch.zeros_like(batch.advantages))

    def distance():
        batch = prepared()
        return (batch.old_log_probs - batch.ref_log_probs).square().sum().item()

    before = distance()
    for step in range(15):
        metrics = actor.update(prepared(), step=step)
        assert metrics["actor/grad_norm"] > 1e-3 and metrics["actor/pg_loss"] == 0.0
    assert distance() < 0.6 * before


def test_one_step_of_learning_rate_1e_6_changes_weights():
    """Trap 26."""
    actor = make_actor(lr=1e-6)
    before = weights(actor)
    actor.update(with_log_probs(make_batch(), actor), step=1)
    after = weights(actor)
    changed = sum((after[name] != before[name]).sum().item() for name in before)
    total = sum(value.numel() for value in before.values())
    assert changed > 0.5 * total
    assert max((after[name] - before[name]).abs().max().item() for name in before) < 3e-6


def test_learning_rate_zero_changes_no_weight():
    actor = make_actor(lr=0.0, mini=4, epochs=2)
    before = weights(actor)
    actor.update(with_log_probs(make_batch(), actor), step=1)
    assert same_bits(weights(actor), before)


def test_the_pass_before_a_single_update_is_redundant():
    """With one optimizer step, old_log_probs=None gives the update that the recomputed ones give."""
    passed, skipped = make_actor(), make_actor()
    assert passed.may_skip_log_probs(8) and not make_actor(mini=4).may_skip_log_probs(8)
    assert not make_actor(epochs=2).may_skip_log_probs(8)
    batch = with_log_probs(make_batch(), passed)
    want = passed.update(batch, step=1)
    without = replace(batch, old_log_probs=None, entropies=None)
    found = skipped.update(without, step=1)
    assert (without.old_log_probs - batch.old_log_probs).abs().max() < 1e-5, "the update's own stand there afterwards"
    assert found.keys() == want.keys()
    for name in want:
        assert found[name] == pytest.approx(want[name], abs=1e-5), name
    assert found["actor/ratio_max_dev_first"] == 0.0
    pairs = zip(passed.model.parameters(), skipped.model.parameters(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-6


def test_own_log_probs_land_on_their_rows_when_the_rows_are_shuffled_and_cut():
    shuffled = UpdateSettings(mini_batch_rows=8, micro=MicroBatches(rows=3), shuffle=True)
    plain, skipped = make_actor(), make_actor(update=shuffled)
    batch = with_log_probs(make_batch(), plain)
    without = replace(batch, old_log_probs=None)
    skipped.update(without, step=1)
    assert (without.old_log_probs - batch.old_log_probs).abs().max() < 1e-5


def test_missing_fields_are_named():
    actor = make_actor(mini=4)
    batch = with_log_probs(make_batch(), actor)
    with pytest.raises(ValueError, match="old_log_probs is None, but 2 optimizer steps"):
        actor.update(replace(batch, old_log_probs=None), step=1)
    with pytest.raises(ValueError, match="advantages is None"):
        actor.update(replace(batch, advantages=None), step=1)
    with pytest.raises(ValueError, match="ref_log_probs is None"):
        make_actor(loss=ActorLossSettings(use_kl_loss=True)).update(replace(batch, ref_log_probs=None), step=1)


def test_an_infinite_gradient_skips_its_mini_batch_only():
    actor = make_actor(mini=4, micro=MicroBatches(rows=2))
    batch = with_log_probs(make_batch(), actor)
    bad = replace(batch, advantages=batch.advantages.clone())
    bad.advantages[1, 0] = float("inf")
    metrics = actor.update(bad, step=1)
    assert metrics["actor/skipped_steps"] == 1.0
    assert math.isfinite(metrics["actor/grad_norm"])
    assert all(p.isfinite().all() for p in actor.model.parameters())
    # what is left is the update on the second half, with moments that never saw the first
    half = make_actor(mini=4, micro=MicroBatches(rows=2))
    half.update(batch.select(slice(4, 8)), step=1)
    assert same_bits(weights(actor), weights(half))


def test_shuffle_follows_seed_and_step():
    def update(seed, step):
        settings = UpdateSettings(mini_batch_rows=3, shuffle=True, seed=seed)
        actor = make_actor(update=settings)
        actor.update(with_log_probs(make_batch(), actor), step=step)
        return weights(actor)

    first = update(1, 1)
    assert same_bits(update(1, 1), first)
    assert not same_bits(update(1, 2), first) and not same_bits(update(2, 1), first)


def test_the_schedule_moves_once_an_update():
    actor = make_actor(mini=2, epochs=2, optim=OptimSettings(lr=1.0e-3, warmup_steps=2))
    batch = with_log_probs(make_batch(), actor)
    assert [actor.update(batch, step=s)["actor/lr"] for s in range(1, 5)] == [0.0, 0.5e-3, 1e-3, 1e-3]
    assert actor.optimizer.tensors()["hf.model.norm.weight.step"].item() == 4 * 2 * 4


def test_gradient_checkpointing_changes_no_gradient_and_is_off_between_updates():
    def run(compute):
        actor = make_actor(compute=compute, micro=MicroBatches(rows=2))
        gradients = record_gradients(actor)
        actor.update(with_log_probs(make_batch(), actor, shift=0.1), step=1)
        return actor, gradients[0]

    (_, want), (actor, found) = run(CPU), run(ComputeSettings(gradient_checkpointing=True))
    assert max((found[name] - want[name]).abs().max().item() for name in want) < 1e-7
    assert not actor.model.training
    assert not any(getattr(m, "gradient_checkpointing", False) for m in actor.model.modules())


def test_gradient_checkpointing_of_a_family_without_it_is_refused():
    model = CausalLM(tiny_model(tiny_config("jetmoe")))
    with pytest.raises(ModelError, match="=true: transformers has none for JetMoeForCausalLM. Set it to false"):
        make_actor(
            kind=lambda _, *rest, **more: Actor(model, *rest, **more),
            compute=ComputeSettings(gradient_checkpointing=True),
        )


def test_gradient_checkpointing_computes_layers_twice():
    actor = make_actor(compute=ComputeSettings(gradient_checkpointing=True))
    batch = with_log_probs(make_batch(), actor)
    calls = []
    actor.model.hf.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    actor.update(batch, step=1)
    assert len(calls) == 2


def test_bfloat16_compute_keeps_float32_masters_and_a_ratio_of_one():
    compute = ComputeSettings(dtype="bfloat16")
    low, full = make_actor(compute=compute, mini=4, micro=MicroBatches(rows=4)), make_actor(mini=4)
    batch = with_log_probs(make_batch(), low)
    difference = (batch.old_log_probs - full.log_probs(batch)[0]).abs().max().item()
    assert 1e-4 < difference < 0.1
    assert batch.old_log_probs.dtype == torch.float32
    metrics = low.update(batch, step=1)
    assert metrics["actor/ratio_max_dev_first"] < 0.05
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    assert {t.dtype for t in low.optimizer.tensors().values()} == {torch.float32}


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="'float16': float32 or bfloat16"):
        ComputeSettings(dtype="float16")


def test_squares_are_those_of_the_distribution_and_log_probs_stay():
    """Token by token from the plain model, at the temperature of sampling; 0 where masked."""
    actor, batch = make_actor(temperature=0.7, forward=MicroBatches(tokens=15)), make_batch()
    log_probs, entropies, squares = actor.log_probs_and_squares(batch)
    want, want_entropies = actor.log_probs(batch)
    assert torch.equal(log_probs, want) and torch.equal(entropies, want_entropies)
    hf = policy().hf
    hf.set_attn_implementation("eager")
    for i in range(len(batch)):
        prompt = batch.prompts[i, batch.prompts.shape[1] - int(batch.prompt_lengths[i]) :].tolist()
        for t in range(batch.responses.shape[1]):
            prefix = torch.tensor([prompt + batch.responses[i, :t].tolist()])
            p = (hf(input_ids=prefix).logits[0, -1] / 0.7).softmax(-1) if batch.loss_mask[i, t] else torch.zeros(1)
            assert squares[i, t].item() == pytest.approx((p**2).sum().item(), rel=1e-4)
    assert not squares.requires_grad


def test_the_first_ratio_is_that_of_the_tokens_of_the_loss():
    """The engine's log-probs stand in tokens and rows that the loss leaves out; there is no ratio there."""
    actor = make_actor()
    batch = with_log_probs(make_batch(), actor)
    batch.loss_mask = batch.loss_mask & (torch.arange(batch.loss_mask.shape[1]) != 1)
    old = torch.where(batch.loss_mask, batch.old_log_probs, -9.0)
    assert actor.update(replace(batch, old_log_probs=old), step=1)["actor/ratio_max_dev_first"] < 1e-5
