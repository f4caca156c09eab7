"""The engine's log-probs for old ones: equal to a pass of their own up to rounding, refused beyond the bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.loggers.jsonl import read_metrics
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.trainer.algorithm.old_log_probs import BOUND, ActorOfEngineLogProbs, sample_rows
from steepest.trainer.jobs.ppo import run_ppo
from tests.learner.helpers import left_out, make_actor, make_batch, same_bits, weights, with_log_probs
from tests.trainer.toy import make_toy, toy_overrides

ACTOR = "actor_rollout_ref.actor"
# A KL in the reward, of a size that tells; lucky guesses of one token score, so that no step divides by noise alone.
RUN = (
    "trainer.total_training_steps=2", "trainer.save_freq=2", "trainer.val_before_train=False", "algorithm.lam=0.9",
    "data.train_batch_size=128", "algorithm.kl_ctrl.kl_coef=0.5",
)  # fmt: skip
TWO, ONE = f"{ACTOR}.ppo_mini_batch_size=64", f"{ACTOR}.ppo_mini_batch_size=128"
NOTE = "the rollout engine's log-probs differ from the actor's by"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def run(toy, folder, *more: str):
    """(metrics by step, weights of actor and critic after the last step)."""
    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *more)))
    names = ("actor", "critic")
    tensors = {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in load_file(folder / f"global_step_2/{name}/model.safetensors").items()
    }
    return read_metrics(folder / "metrics.jsonl"), tensors


def difference(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """Rows of every log-prob pass of the actor."""
    from steepest.learner.actor import Actor

    rows, plain = [], Actor.log_probs

    def counting(self, batch):
        rows.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(Actor, "log_probs", counting)
    return rows


@pytest.mark.parametrize("updates", [TWO, ONE])
def test_auto_is_recompute_up_to_rounding_for_a_sixteenth_of_the_pass(toy, tmp_path, updates, passes, capsys):
    rows, auto = run(toy, tmp_path / "auto", updates)
    assert passes == [128, 8], "of 128 rows eight are computed, once the policy is no longer the reference"
    assert "The engine's log-probs" in capsys.readouterr().out
    full_rows, full = run(toy, tmp_path / "full", updates, f"{ACTOR}.old_log_probs=recompute")
    assert passes == [128, 8, 128, 128]
    assert difference(auto, full) < 2e-5  # lr is 3e-3, and Adam's first steps are as long
    for step in (1, 2):
        for name in ("actor/pg_loss", "actor/reward_kl_penalty", "actor/grad_norm", "critic/vf_loss"):
            assert rows[step][name] == pytest.approx(full_rows[step][name], abs=2e-5, rel=1e-3), name
        assert full_rows[step]["mismatch/rows_compared"] == 1.0
        assert rows[step]["mismatch/rows_compared"] == (8 / 128 if updates == TWO and step == 2 else 1.0)
        assert 0.0 < rows[step]["mismatch/max_abs_diff"] < 1e-4
        limit = 1e-4 if updates == TWO or step == 1 else 0.0
        assert rows[step]["actor/ratio_max_dev_first"] <= limit, "one update's own log-probs are the old ones"
        # without a pass it is measured on the first of two mini-batches, before anything has moved
        sampled = 0.05 if updates == TWO else 1e-4
        assert rows[step]["actor/entropy"] == pytest.approx(full_rows[step]["actor/entropy"], abs=sampled)


@pytest.mark.parametrize("updates", [TWO, ONE])
def test_an_engine_that_is_wrong_is_found_out_and_changes_nothing(toy, tmp_path, updates, passes, monkeypatch, capsys):
    _, right = run(toy, tmp_path / "full", updates, f"{ACTOR}.old_log_probs=recompute")
    plain = BuiltinEngine.generate

    def wrong(self, requests):
        groups = plain(self, requests)
        return [[replace(c, log_probs=[x - 2 * BOUND for x in c.log_probs]) for c in group] for group in groups]

    monkeypatch.setattr(BuiltinEngine, "generate", wrong)
    passes.clear()
    capsys.readouterr()
    rows, found = run(toy, tmp_path / "wrong", updates)
    assert passes == [128, 8, 120], "the rows of the check are not computed again"
    assert difference(found, right) < 2e-5
    assert [rows[step]["mismatch/rows_compared"] for step in (1, 2)] == [1.0, 1.0]
    assert rows[2]["mismatch/max_abs_diff"] == pytest.approx(2 * BOUND, rel=0.01)
    assert capsys.readouterr().out.count(NOTE) == 1, "told once, not in each step"


def test_without_a_reward_nothing_moves(toy, tmp_path):
    """The engine's log-probs differ from the reference's by rounding, of which Adam would make whole steps."""
    silent = tmp_path / "silent.py"
    silent.write_text("def digit(data_source, solution_str, ground_truth, extra_info=None):\n    return 0.0\n")
    words = (f"custom_reward_function.path={silent}", f"{ACTOR}.optim.weight_decay=0")
    rows, tensors = run(toy, tmp_path / "silent", TWO, *words)
    started = load_file(toy["model"] / "model.safetensors")
    assert [rows[step]["actor/reward_kl_penalty"] for step in (1, 2)] == [0.0, 0.0]
    assert [rows[step]["actor/grad_norm"] for step in (1, 2)] == [0.0, 0.0]
    assert all(torch.equal(tensors[f"actor.{name}"], tensor) for name, tensor in started.items())


def engine_batch(actor, moved: float = 0.0):
    """The hand-made batch with the engine's log-probs, all of them off by `moved`."""
    made = with_log_probs(make_batch(), actor)
    rollout = (made.old_log_probs - moved).masked_fill(~made.trained_mask, 0.0)
    return replace(made, rollout_log_probs=rollout, old_log_probs=None, entropies=None)


@pytest.mark.parametrize(("moved", "stands_in"), [(0.9 * BOUND, True), (1.1 * BOUND, False), (float("nan"), False)])
def test_the_bound_is_one_of_the_largest_difference(moved, stands_in):
    actor, said = make_actor(), []
    batch = engine_batch(actor, moved)
    old, entropies = ActorOfEngineLogProbs(actor, one_update=False, say=said.append).log_probs(batch)
    own, own_entropies = actor.log_probs(batch)
    rows = sample_rows(batch)
    assert torch.allclose(old[rows], own[rows], atol=1e-6), "checked rows keep the actor's own"
    if stands_in:
        others = [i for i in range(8) if i not in rows.tolist()]
        assert torch.equal(old[others], batch.rollout_log_probs[others]) and entropies is None
        assert batch.recomputed.nonzero()[:, 0].tolist() == rows.tolist() and said == []
    else:
        assert torch.allclose(old, own, atol=1e-6) and torch.allclose(entropies, own_entropies, atol=1e-6)
        assert batch.recomputed is None and len(said) == 1 and said[0].startswith(NOTE)


def test_the_rows_of_a_check_follow_from_the_responses():
    batch = make_batch()
    assert sample_rows(batch).tolist() == sample_rows(replace(batch)).tolist()
    assert 2 not in {int(sample_rows(make_batch(seed))) for seed in range(40)}, "row 2 has no policy token"
    assert len({int(sample_rows(make_batch(seed))) for seed in range(40)}) == 7, "each other row has its turn"
    assert sample_rows(left_out(batch)).tolist() == []


def test_a_batch_without_a_trained_row_is_no_reason_to_compute_anything():
    actor = make_actor()
    batch = engine_batch(actor)
    batch = replace(left_out(batch), rollout_log_probs=torch.zeros(8, 9))
    old, entropies = ActorOfEngineLogProbs(actor, one_update=False, say=print).log_probs(batch)
    assert torch.equal(old, torch.zeros(8, 9)) and entropies is None


def test_one_update_takes_its_own_log_probs_and_equals_the_skipped_pass():
    results = []
    for wrap in (False, True):
        actor = make_actor()
        batch = engine_batch(actor, 0.9 * BOUND)
        if wrap:
            wrapped = ActorOfEngineLogProbs(actor, one_update=True, say=print)
            batch.old_log_probs, batch.entropies = wrapped.log_probs(batch)
            metrics = wrapped.update(batch, step=1)
            assert batch.recomputed is None and metrics["actor/ratio_max_dev_first"] == 0.0
        else:
            actor.update(batch, step=1)
        results.append(weights(actor))
    assert same_bits(*results)
