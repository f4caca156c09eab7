"""Which object stands in each place of the step, for which configuration."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from steepest.config.load import load_config
from steepest.config.plan import Plan, make_plan
from steepest.config.schema import Config
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.batch import Batch
from steepest.core.kl import AdaptiveKLController, FixedKLController
from steepest.core.rollout_correction import Rejection, Weighting
from steepest.data.sampler import PromptSampler
from steepest.devices.backends.cpu import CPUDevice
from steepest.process.stopping import Stop
from steepest.trainer import build_step
from steepest.trainer.algorithm.correction import CorrectedRewards
from steepest.trainer.algorithm.critic_values import NoCritic, ValuesFromPass, ValuesFromUpdate
from steepest.trainer.algorithm.kl_rewards import KLShapedRewards, plain_rewards
from steepest.trainer.algorithm.old_log_probs import FromEngine, FromPass, FromRollout, FromUpdate
from steepest.trainer.algorithm.row_selection import DrawnRows, PretrainingReturns, all_rows, estimated_returns
from steepest.trainer.experience.api import Collector, Experience
from steepest.trainer.experience.dynamic_sampling import DynamicSampling, PromptPosition
from steepest.trainer.experience.extras import NamedRewards
from steepest.trainer.experience.greedy_baseline import GreedyBaseline
from steepest.trainer.experience.scoring import Finished, Scorer
from steepest.trainer.experience.single_turn import SingleTurn, StepRollouts
from steepest.trainer.loop import Timer
from tests.support.commands import REQUIRED
from tests.support.fake_parts import EchoEngine, FakeCluster, FakePool, NumberTokenizer, exact, prompt

ACTOR, CORRECTION = "actor_rollout_ref.actor", "algorithm.rollout_correction"
ONE = ("data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=8", "critic.ppo_mini_batch_size=8")
TWO = ("data.train_batch_size=8", f"{ACTOR}.ppo_mini_batch_size=4", "critic.ppo_mini_batch_size=4")
GRPO = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")
REMAX, FILTER = "algorithm.adv_estimator=remax", "algorithm.filter_groups.enable=True"
DEVICE = CPUDevice()


def made(*words: str) -> tuple[Config, Plan]:
    config = load_config([*REQUIRED, *words])
    return config, make_plan(config, 64, ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator).spec)


def collector(
    *words: str, cluster: FakeCluster | None = None, engine: EchoEngine | None = None, **more
) -> tuple[Collector, FakeCluster, EchoEngine]:
    config, plan = made(*words)
    cluster, engine, sampling = cluster or FakeCluster(), engine or EchoEngine(), build_step.train_sampling(config)
    rollouts = StepRollouts(engine, [prompt(k) for k in range(64)], PromptSampler(64, 8, shuffle=False), sampling, 0)
    scorer = Scorer(FakePool(exact), NumberTokenizer(), lambda: {"reward_model/seconds": 1.0})
    position = PromptPosition()
    return (
        build_step.build_collector(config, plan, cluster, rollouts, scorer, position, device=DEVICE, **more),
        cluster,
        engine,
    )


def kinds(collect: object) -> list[type]:
    """From the outside to the inside."""
    return [type(collect), *(kinds(collect.collect) if hasattr(collect, "collect") else [])]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (GRPO, [Finished, SingleTurn]),
        ((REMAX,), [Finished, GreedyBaseline, SingleTurn]),
        ((*GRPO, FILTER), [Finished, DynamicSampling, SingleTurn]),
        ((REMAX, FILTER, "actor_rollout_ref.rollout.n=2"), [Finished, DynamicSampling, GreedyBaseline, SingleTurn]),
    ],
    ids=["plain", "greedy", "dynamic", "both"],
)
def test_collectors_are_wrapped_and_the_one_that_generates_last_releases_the_engine(words, wanted):
    answered: list[int] = []
    collect, cluster, engine = collector(*TWO, *words)
    cluster.release_engine = lambda: answered.append(len(engine.calls))
    collect, cluster, engine = collector(*TWO, *words, cluster=cluster, engine=engine)
    assert kinds(collect) == wanted
    found = collect(1)
    assert answered == [len(engine.calls)] == [2 if GreedyBaseline in wanted else 1], "once, after the last call"
    assert set(found.seconds) == {"gen", "reward"}
    assert len(found.batch) == 8 * (1 if words == (REMAX,) else 2)
    assert found.metrics["reward_model/seconds"] == 1.0 and found.flops["gen"] > 0
    assert ("reward_baselines" in found.batch.extras) == (GreedyBaseline in wanted)
    assert (found.prompts_taken is None) == (DynamicSampling not in wanted)


def test_what_a_configuration_says_of_dynamic_sampling_reaches_it():
    words = ("algorithm.filter_groups.metric=acc", "algorithm.filter_groups.max_num_gen_batches=3")
    dynamic = collector(*TWO, *GRPO, FILTER, *words)[0].collect
    assert (dynamic.num_groups, dynamic.metric, dynamic.max_rounds, dynamic.pad_id) == (8, "acc", 3, 0)
    assert [dynamic.epoch(number) for number in (0, 7, 8)] == [0, 0, 1]


def test_extras_are_filled_for_the_estimator_that_needs_them_and_rows_left_out_and_written():
    written: list[tuple[int, int]] = []
    words = (
        "algorithm.adv_estimator=gdpo",
        "algorithm.gdpo_reward_keys=[format,score]",
        "algorithm.mask_truncated=True",
    )
    collect, _, _ = collector(
        *TWO, *words, "actor_rollout_ref.rollout.n=2", write=lambda step, rows: written.append((step, len(rows)))
    )
    assert collect.collect.scorer.fills == [NamedRewards(("format", "score"))]
    found = collect(3)
    assert found.batch.extras["named_rewards"].tolist() == [[1.0, 1.0], [1.0, 0.0]] * 8
    assert found.metrics["mask_truncated/ratio"] == 0.0 and written == [(3, 16)]
    assert collector(*TWO, *GRPO)[0].collect.scorer.fills == []


CLUSTER = FakeCluster()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (TWO, ("engine", False, True)),
        ((*TWO, "algorithm.use_kl_in_reward=False"), ("engine", False, False)),
        (ONE, ("engine", True, True)),
        ((*ONE, "algorithm.use_kl_in_reward=False"), FromUpdate()),
        ((*TWO, f"{ACTOR}.old_log_probs=recompute"), FromPass(CLUSTER)),
        ((*TWO, *GRPO, "algorithm.adv_estimator=optimal_token_baseline"), FromPass(CLUSTER, squares=True)),
        ((*TWO, f"{CORRECTION}.rollout_is=token"), FromPass(CLUSTER)),
        ((*TWO, f"{CORRECTION}.bypass_mode=True"), FromRollout()),
    ],
)
def test_where_old_log_probs_come_from(words, wanted):
    config, plan = made(*words)
    found = build_step.build_old_log_probs(config, plan, CLUSTER)
    if isinstance(wanted, tuple):
        assert isinstance(found, FromEngine) and found.actor is CLUSTER
        assert (plan.old_log_probs, found.one_update, found.checks_reference) == wanted
    else:
        assert found == wanted


def test_an_engine_that_differs_is_reported_once(capsys):
    config, plan = made(*TWO, "algorithm.use_kl_in_reward=False")
    old_log_probs = build_step.build_old_log_probs(config, plan, CLUSTER)
    batch = Batch.from_sequences([[1]], [[2]], group_ids=[0], truncated=[False], rollout_log_probs=[[-9.0]])
    old_log_probs(batch), old_log_probs(batch)
    assert capsys.readouterr().out.count("the rollout engine's log-probs differ") == 1


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (TWO, True),
        ((*TWO, "algorithm.use_kl_in_reward=False"), False),
        ((*TWO, *GRPO, f"{ACTOR}.use_kl_loss=True"), True),
        ((*TWO, *GRPO, f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_type=full"), False),
    ],
    ids=["KL in the reward", "none", "KL loss", "exact KL"],
)
def test_who_reads_the_reference_s_log_probs(words, passes):
    cluster = FakeCluster()
    ref_log_probs = build_step.build_ref_log_probs(made(*words)[1], cluster)
    batch = Batch.from_sequences([[1]], [[2]], group_ids=[0], truncated=[False])
    found = ref_log_probs(batch)
    assert (found is not None, cluster.calls) == (passes, ["ref_log_probs"] * passes)


def test_which_critic_there_is():
    cluster = FakeCluster()

    def part(*words: str):
        config, plan = made(*words)
        return build_step.build_critic_part(config, plan, cluster), build_step.estimator_call(config)

    assert part(*TWO, *GRPO)[0] == NoCritic()
    assert part(*TWO)[0] == ValuesFromPass(cluster)
    found, call = part(*ONE)
    assert found == ValuesFromUpdate(cluster, call) and call.name == "gae" and call.options["gamma"] == 1.0
    assert part(*ONE, "algorithm.use_pf_ppo=True")[0] == ValuesFromPass(cluster)


def test_how_scores_become_rewards():
    def shaping(*words: str):
        config, plan = made(*TWO, *words)
        controller = build_step.build_controller(config)
        return build_step.build_reward_shaping(config, plan, controller), controller

    found, controller = shaping("algorithm.kl_penalty=k3", "algorithm.kl_ctrl.kl_coef=0.25")
    assert found == KLShapedRewards(controller, "k3") and isinstance(controller, FixedKLController)
    assert controller.value == 0.25
    assert isinstance(shaping("algorithm.kl_ctrl.type=adaptive")[1], AdaptiveKLController)
    assert shaping("algorithm.use_kl_in_reward=False")[0] is plain_rewards
    words = (f"{CORRECTION}.rollout_is=token", f"{CORRECTION}.rollout_is_threshold=3.0")
    words = (*words, f"{CORRECTION}.rollout_rs=token_k1", f"{CORRECTION}.rollout_rs_threshold=0.5_2.0")
    found, controller = shaping(*words)
    weighting, rejection = Weighting("token", 3.0), Rejection("token_k1", 2.0, 0.5)
    assert found == CorrectedRewards(weighting, (rejection,), KLShapedRewards(controller, "kl"))


@pytest.mark.parametrize(
    ("words", "compared"),
    [
        ((), True),
        (("actor_rollout_ref.rollout.top_p=0.9",), False),
        (("actor_rollout_ref.rollout.top_k=5",), False),
        ((f"{CORRECTION}.bypass_mode=True",), False),
        ((f"{CORRECTION}.rollout_is=token",), False),
    ],
)
def test_when_the_finished_batch_compares_engine_and_trainer(words, compared):
    assert build_step.compares_engines(*made(*TWO, *words)) is compared


def test_the_comparison_is_over_the_rows_that_the_trainer_computed():
    batch = Batch.from_sequences(
        [[1]] * 2, [[2, 3]] * 2, group_ids=[0, 1], truncated=[False] * 2, rollout_log_probs=[[-1.0, -1.0], [-7.0, -7.0]]
    )
    batch.old_log_probs, batch.token_level_scores = torch.full((2, 2), -1.5), torch.zeros(2, 2)

    def described(compare_engines: bool) -> dict[str, float]:
        return build_step.describe_batch(batch, device=DEVICE, compare_engines=compare_engines)

    assert described(True)["mismatch/max_abs_diff"] == 5.5 and described(True)["mismatch/rows_compared"] == 1.0
    batch.recomputed = torch.tensor([True, False])
    assert described(True)["mismatch/max_abs_diff"] == 0.5 and described(True)["mismatch/rows_compared"] == 0.5
    assert not [name for name in described(False) if name.startswith("mismatch/")]
    assert described(False)["perf/total_num_tokens"] == 6.0
    assert described(False)["perf/total_num_response_tokens"] == 4.0
    batch.old_log_probs = None
    assert "mismatch/rows_compared" not in described(True), "nothing to compare with"


def test_the_learning_half_has_the_parts_of_the_configuration():
    cluster = FakeCluster()
    config, plan = made(
        *TWO, "algorithm.use_pf_ppo=True", "trainer.critic_warmup=2", "trainer.critic_warmup_returns=monte_carlo",
        "algorithm.gamma=0.5", "actor_rollout_ref.rollout.seed=3",
    )  # fmt: skip
    controller = build_step.build_controller(config)
    learn = build_step.build_learn(config, plan, cluster, controller, device=DEVICE, limit=2.0)
    assert isinstance(learn.select_rows, DrawnRows) and learn.select_rows.seed == 3
    assert learn.critic_targets == PretrainingReturns(2, 0.5)
    assert learn.shape_rewards.controller is controller and learn.critic == ValuesFromPass(cluster)
    batch = Batch.from_sequences([[1]], [[2]], group_ids=[0], truncated=[False])
    assert [learn.update_actor(batch, step) for step in (1, 2, 3)] == [{}, {}, {"actor/pg_loss": 1.0}]
    learn.publish_weights(3)
    assert cluster.calls == ["update_actor 3", "publish 3"]
    cluster.flops = 8.0
    with learn.timed("update_actor"):
        pass
    learn.timed.seconds = {"update_actor": 2.0}
    assert learn.timed.flush()["perf/mfu/actor"] == 8.0 / (2.0 * 2.0), "operations are the cluster's, of the limit"
    plain = build_step.build_learn(*made(*TWO), cluster, controller, device=DEVICE, limit=2.0)
    assert plain.select_rows is all_rows and plain.critic_targets is estimated_returns


def test_a_whole_step_over_a_cluster_without_a_model():
    """Everything a step does, by fakes: what is in the batch after it, and which calls the cluster had."""
    collect, cluster, _ = collector(*TWO)
    config, plan = made(*TWO)
    learn = build_step.build_learn(config, plan, cluster, build_step.build_controller(config), device=DEVICE, limit=1.0)
    seen: list[tuple[int, Experience]] = []
    step = build_step.build_step(
        collect, learn, PromptPosition(), [lambda number, found: seen.append((number, found))], Stop()
    )
    metrics = step(1)
    assert cluster.calls == [
        "release_engine", "policy_is_reference", "log_probs", "ref_log_probs", "values", "update_critic 1",
        "update_actor 1", "publish 1",
    ]  # fmt: skip
    ((number, found),) = seen
    batch = found.batch
    # an actor at -1, the engine at -1 too, a reference at -2: KL 1 at each token, of coefficient 0.001
    assert number == 1 and torch.allclose(batch.token_level_rewards, batch.token_level_scores - 0.001)
    assert metrics["actor/reward_kl_penalty"] == 1.0 and metrics["critic/vf_loss"] == 2.0
    assert torch.allclose(batch.returns, torch.tensor(1.0 - 0.001)) and bool((batch.values == 4.0).all())
    times = learn.timed.flush()
    assert times["timing_s/gen"] > 0 and times["timing_s/reward"] > 0 and "perf/mfu" in times


def test_the_position_follows_what_is_learnt_before_any_observer_looks():
    position, looked = PromptPosition(taken=9, learnt=2), []
    learn = build_step.build_learn(*made(*TWO), FakeCluster(), FixedKLController(0.0), device=DEVICE, limit=1.0)
    batch = Batch.from_sequences([[1]], [[2]], group_ids=[0], truncated=[False], rollout_log_probs=[[-1.0]])
    batch.token_level_scores = torch.zeros(1, 1)

    def collect(step: int) -> Experience:
        assert position.state_dict()["taken"] == 2, "collecting is not learning"
        return Experience(batch, [], prompts_taken=5)

    step = build_step.build_step(
        collect, learn, position, [lambda number, found: looked.append(position.state_dict())], Stop()
    )
    step(1)
    assert looked == [{"taken": 5}] and position.taken == 9


def test_half_precision_is_the_actor_s_or_the_engine_s():
    def half(*words: str) -> bool:
        return build_step.half_precision(made(*TWO, f"{ACTOR}.fsdp_config.dtype=float32", *words)[0], DEVICE)

    assert not half("actor_rollout_ref.rollout.dtype=float32")
    assert half("actor_rollout_ref.rollout.dtype=bfloat16")
    assert half("actor_rollout_ref.rollout.dtype=float32", f"{ACTOR}.fsdp_config.dtype=bfloat16")


def test_each_call_of_a_collector_has_a_timer_of_its_own_that_waits_for_the_device():
    waited: list[int] = []

    class Slow(CPUDevice):
        def synchronize(self) -> None:
            waited.append(1)

    config, plan = made(*TWO)
    scorer = Scorer(FakePool(exact), NumberTokenizer())
    rollouts = StepRollouts(
        EchoEngine(), [prompt(k) for k in range(64)], PromptSampler(64, 8), build_step.train_sampling(config), 0
    )
    collect = build_step.build_collector(config, plan, FakeCluster(), rollouts, scorer, PromptPosition(), device=Slow())
    assert isinstance(collect.collect.timer, partial) and isinstance(collect.collect.timer(), Timer)
    first, second = collect(1), collect(2)
    assert len(waited) == 6, "gen, reward and what the outermost collector adds, of two steps"
    assert first.seconds is not second.seconds and first.flops == second.flops == {"gen": 8.0, "reward": 0.0}
