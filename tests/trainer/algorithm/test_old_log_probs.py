"""The engine's log-probs for old ones: equal to a pass of their own up to rounding, refused beyond the bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.core.batch import Batch
from steepest.core.kl import FixedKLController
from steepest.loggers.jsonl import read_metrics
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards
from steepest.trainer.algorithm.old_log_probs import (
    BOUND,
    FromEngine,
    FromPass,
    FromRollout,
    FromUpdate,
    OldLogProbs,
    sample_rows,
)
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.fake_parts import FakeCluster
from tests.support.learner_parts import left_out, make_actor, make_batch, same_bits, weights, with_log_probs
from tests.support.toy_run import make_toy, toy_overrides

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


def run(toy, folder, *more: str, batches: list[Batch] | None = None):
    """(metrics by step, weights of actor and critic after the last step); `batches` takes what was learnt from."""
    taken: list[Batch] = [] if batches is None else batches
    config = load_config(toy_overrides(toy, folder, *RUN, *more))
    run_ppo(config, observers=[lambda step, experience: taken.append(experience.batch)])
    names = ("actor", "critic")
    tensors = {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in load_file(folder / f"global_step_2/{name}/model.safetensors").items()
    }
    return read_metrics(folder / "metrics.jsonl"), tensors


def difference(a: dict, b: dict) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def work(row: dict[str, float]) -> float:
    """Operations of the actor's passes before the update, as a share of what the device can do in a second: in one run
    in proportion to the rows that were passed, since prompts and responses of the toy are equally long."""
    return row.get("perf/mfu/actor_infer", 0.0) * row["timing_s/old_log_prob"]


@pytest.mark.parametrize("updates", [TWO, ONE])
def test_auto_is_recompute_up_to_rounding_for_a_sixteenth_of_the_pass(toy, tmp_path, updates, capsys):
    batches: list[Batch] = []
    rows, auto = run(toy, tmp_path / "auto", updates, batches=batches)
    rows_of_pass = "of 128 rows eight are computed, once the policy is no longer the reference"
    assert work(rows[2]) / work(rows[1]) == pytest.approx(8 / 128), rows_of_pass
    same = (batches[1].kl_log_probs == batches[1].rollout_log_probs)[:, 0]
    assert 120 <= int(same.sum()) < 128 and not torch.equal(batches[0].kl_log_probs, batches[0].rollout_log_probs)
    assert "The engine's log-probs" in capsys.readouterr().out
    full_rows, full = run(toy, tmp_path / "full", updates, f"{ACTOR}.old_log_probs=recompute")
    assert work(full_rows[2]) / work(full_rows[1]) == pytest.approx(1.0)
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
def test_an_engine_that_is_wrong_is_found_out_and_changes_nothing(toy, tmp_path, updates, monkeypatch, capsys):
    _, right = run(toy, tmp_path / "full", updates, f"{ACTOR}.old_log_probs=recompute")
    plain = BuiltinEngine.generate

    def wrong(self, requests):
        groups = plain(self, requests)
        return [[replace(c, log_probs=[x - 2 * BOUND for x in c.log_probs]) for c in group] for group in groups]

    monkeypatch.setattr(BuiltinEngine, "generate", wrong)
    capsys.readouterr()
    rows, found = run(toy, tmp_path / "wrong", updates)
    assert work(rows[2]) / work(rows[1]) == pytest.approx(1.0), "the rows of the check are not computed again"
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


class Passes:
    """An actor's passes, of a policy that is not the reference any more."""

    def __init__(self, actor) -> None:
        self.log_probs, self.log_probs_and_squares = actor.log_probs, actor.log_probs_and_squares

    def policy_is_reference(self) -> bool:
        return False


def engine_batch(actor, moved: float = 0.0):
    """The hand-made batch with the engine's log-probs, all of them off by `moved`."""
    made = with_log_probs(make_batch(), actor)
    rollout = (made.old_log_probs - moved).masked_fill(~made.trained_mask, 0.0)
    return replace(made, rollout_log_probs=rollout, old_log_probs=None, entropies=None)


@pytest.mark.parametrize(("moved", "stands_in"), [(0.9 * BOUND, True), (1.1 * BOUND, False), (float("nan"), False)])
def test_the_bound_is_one_of_the_largest_difference(moved, stands_in):
    actor, said = make_actor(), []
    batch = engine_batch(actor, moved)
    found = FromEngine(Passes(actor), one_update=False, warn_once=said.append)(batch)
    old, entropies = found.ratio_log_probs, found.entropies
    own, own_entropies = actor.log_probs(batch)
    assert found.kl_log_probs is old
    rows = sample_rows(batch)
    assert torch.allclose(old[rows], own[rows], atol=1e-6), "checked rows keep the actor's own"
    if stands_in:
        others = [i for i in range(8) if i not in rows.tolist()]
        assert torch.equal(old[others], batch.rollout_log_probs[others]) and entropies is None
        assert found.recomputed.nonzero()[:, 0].tolist() == rows.tolist() and said == []
    else:
        assert torch.allclose(old, own, atol=1e-6) and torch.allclose(entropies, own_entropies, atol=1e-6)
        assert found.recomputed is None and len(said) == 1 and said[0].startswith(NOTE)


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
    found = FromEngine(Passes(actor), one_update=False, warn_once=print)(batch)
    assert torch.equal(found.ratio_log_probs, torch.zeros(8, 9)) and found.entropies is None


def test_one_update_takes_its_own_log_probs_and_equals_the_skipped_pass():
    results = []
    for from_engine in (False, True):
        actor = make_actor()
        batch = engine_batch(actor, 0.9 * BOUND)
        engines = batch.rollout_log_probs
        if from_engine:
            FromEngine(Passes(actor), one_update=True, warn_once=print)(batch).write(batch)
            assert batch.old_log_probs is None and batch.entropies is None and batch.recomputed is None
            rows = sample_rows(batch).tolist()
            others = [i for i in range(8) if i not in rows]
            assert torch.equal(batch.kl_log_probs[others], engines[others]), "the KL reads the engine's"
            assert not torch.equal(batch.kl_log_probs[rows], engines[rows])
        else:
            FromUpdate()(batch).write(batch)
            assert batch.kl_log_probs is None
        own, _ = actor.log_probs(batch)
        metrics = actor.update(batch, step=1)
        assert metrics["actor/ratio_max_dev_first"] == 0.0, "the ratio is of the update's own"
        assert torch.allclose(batch.old_log_probs, own.masked_fill(~batch.loss_mask, 0.0), atol=1e-6)
        results.append(weights(actor))
    assert same_bits(*results)


def by_hand() -> Batch:
    """Two rows of two tokens, engine log-probs -0.5; the second row has one token."""
    return Batch.from_sequences(
        [[1], [1]], [[2, 3], [4]], group_ids=[0, 1], truncated=[False] * 2, rollout_log_probs=[[-0.5, -0.5], [-0.5]]
    )


def test_a_pass_serves_the_kl_and_the_ratio_and_brings_the_entropies():
    cluster, batch = FakeCluster(), by_hand()
    FromPass(cluster)(batch).write(batch)
    assert batch.kl_log_probs.tolist() == batch.old_log_probs.tolist() == [[-1.0, -1.0], [-1.0, 0.0]]
    assert batch.entropies.tolist() == [[3.0, 3.0], [3.0, 3.0]] and batch.recomputed is None and batch.extras == {}
    assert cluster.calls == ["log_probs"]


def test_a_pass_with_squares_writes_them_for_the_estimator_and_keeps_other_extras():
    cluster, batch = FakeCluster(), by_hand()
    batch.extras["reward_baselines"] = torch.zeros(2)
    FromPass(cluster, squares=True)(batch).write(batch)
    assert batch.extras["sum_pi_squared"].tolist() == [[0.5, 0.5], [0.5, 0.0]]
    assert set(batch.extras) == {"reward_baselines", "sum_pi_squared"}
    assert batch.kl_log_probs.tolist() == batch.old_log_probs.tolist() == [[-1.0, -1.0], [-1.0, 0.0]]


def test_the_update_s_own_leave_every_field_for_the_update():
    batch = by_hand()
    found = FromUpdate()(batch)
    found.write(batch)
    assert found == OldLogProbs() and batch.old_log_probs is batch.kl_log_probs is batch.entropies is None


def test_bypass_takes_the_rollout_s_for_both_as_they_are():
    batch = by_hand()
    FromRollout()(batch).write(batch)
    assert batch.kl_log_probs is batch.old_log_probs is batch.rollout_log_probs
    assert batch.entropies is None and batch.recomputed is None


@pytest.mark.parametrize("one_update", [False, True])
def test_the_engine_s_serve_the_kl_always_and_the_ratio_of_several_updates(one_update):
    cluster, batch, said = FakeCluster(), by_hand(), []
    (row,) = sample_rows(batch).tolist()
    FromEngine(cluster, one_update=one_update, warn_once=said.append, bound=0.6)(batch).write(batch)
    wanted = [[-0.5, -0.5], [-0.5, 0.0]]
    wanted[row] = [[-1.0, -1.0], [-1.0, 0.0]][row]  # the checked row has the actor's own
    assert batch.kl_log_probs.tolist() == wanted and said == [] and cluster.calls == ["log_probs"]
    if one_update:
        assert batch.old_log_probs is None and batch.recomputed is None
    else:
        assert batch.old_log_probs.tolist() == wanted and batch.recomputed.tolist() == [row == 0, row == 1]


@pytest.mark.parametrize("one_update", [False, True])
def test_an_engine_beyond_the_bound_leaves_both_to_the_actor(one_update):
    cluster, batch, said = FakeCluster(), by_hand(), []
    FromEngine(cluster, one_update=one_update, warn_once=said.append, bound=0.4)(batch).write(batch)
    assert batch.kl_log_probs.tolist() == batch.old_log_probs.tolist() == [[-1.0, -1.0], [-1.0, 0.0]]
    assert batch.entropies.tolist() == [[3.0, 3.0], [3.0, 3.0]] and batch.recomputed is None
    assert cluster.calls == ["log_probs", "log_probs"] and len(said) == 1


def test_while_the_policy_is_the_reference_the_actor_has_a_pass():
    cluster, batch = FakeCluster(), by_hand()
    FromEngine(cluster, one_update=False, warn_once=print, checks_reference=True, bound=0.6)(batch).write(batch)
    assert cluster.calls == ["policy_is_reference", "log_probs"] and batch.recomputed is not None
    cluster.calls.clear()
    cluster.policy_is_reference = lambda: True
    FromEngine(cluster, one_update=False, warn_once=print, checks_reference=True, bound=0.6)(batch).write(batch)
    assert cluster.calls == ["log_probs"] and batch.recomputed is None, "a pass of all rows"
    assert batch.kl_log_probs.tolist() == [[-1.0, -1.0], [-1.0, 0.0]] == batch.old_log_probs.tolist()


def test_the_kl_penalty_reads_the_engine_s_where_the_ratio_does_not():
    """One update: the penalty of a row that is not checked is that of the engine's log-probs, -0.5 against -2."""
    cluster, batch = FakeCluster(), by_hand()
    batch.token_level_scores = torch.zeros(2, 2)
    FromEngine(cluster, one_update=True, warn_once=print, bound=0.6)(batch).write(batch)
    batch.ref_log_probs = cluster.ref_log_probs(batch)
    KLShapedRewards(FixedKLController(1.0), "k1")(batch)
    (row,) = sample_rows(batch).tolist()
    assert batch.token_level_rewards[1 - row, 0] == -1.5 and batch.token_level_rewards[row, 0] == -1.0
    assert batch.old_log_probs is None
