"""What a run says about its own speed: the time split, tokens a second, the share of the limit, threads, the start."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

from steepest.config.load import load_config
from steepest.devices.backends.cpu import CPUDevice
from steepest.devices.gemm_rate import describe_rate, gemm_rate
from steepest.process import threads
from steepest.process.start_timing import Laps
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.loop import Timer
from steepest.trainer.run.metrics import mfu_metrics, speed_metrics
from tests.support.toy_run import make_toy, toy_overrides

PARTS = ["gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic", "update_actor", "update_weights",
         "describe"]  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=256)


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """(rows of metrics.jsonl, what was printed) of three real steps, two mini-batches each."""
    folder = tmp_path_factory.mktemp("speed") / "run"
    words = toy_overrides(toy, folder, "trainer.total_training_steps=3", "trainer.val_before_train=False")
    run_ppo(load_config([*words, "trainer.test_freq=-1", "trainer.logger=jsonl"]))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_parts_of_a_step_fit_into_it(finished):
    assert len(finished) == 3
    for row in finished:
        assert {name for name in row if name.startswith("timing_s/")} == {f"timing_s/{p}" for p in [*PARTS, "step"]}
        assert 0 < sum(row[f"timing_s/{part}"] for part in PARTS) <= row["timing_s/step"]


def test_tokens_a_second_are_those_of_the_timings(finished):
    for row in finished:
        tokens = row["perf/total_num_tokens"]
        assert row["perf/throughput"] == pytest.approx(tokens / row["timing_s/step"])
        update = row["timing_s/update_critic"] + row["timing_s/update_actor"]
        assert row["perf/throughput/update"] == pytest.approx(tokens / update)
        responses = row["perf/throughput/gen"] * row["timing_s/gen"]
        assert responses == pytest.approx(row["perf/total_num_response_tokens"]) and 0 < responses < tokens


def test_the_share_of_the_limit_counts_every_pass(finished):
    for row in finished:
        assert {n for n in row if n.startswith("perf/mfu")} >= {"perf/mfu", "perf/mfu/actor", "perf/mfu/critic"}
        of_updates = sum(row[f"perf/mfu/{r}"] * row[f"timing_s/update_{r}"] for r in ("actor", "critic"))
        assert 0 < of_updates < row["perf/mfu"] * row["timing_s/step"] < 4 * of_updates


def test_shares_by_hand_and_none_of_what_did_not_run():
    seconds = {"step": 4.0, "update_actor": 2.0, "update_critic": 1.0, "old_log_prob": 0.5, "gen": 0.5}
    done = {"step": 40.0, "update_actor": 16.0, "update_critic": 0.0, "old_log_prob": 2.0, "gen": 22.0}
    assert mfu_metrics(seconds, done, limit=20.0) == {
        "perf/mfu": 0.5,
        "perf/mfu/actor": 0.4,
        "perf/mfu/actor_infer": 0.2,
    }


def test_tokens_a_second_by_hand():
    times = {"timing_s/step": 10.0, "timing_s/gen": 4.0, "timing_s/update_critic": 2.0, "timing_s/update_actor": 3.0}
    assert speed_metrics({**times, "perf/total_num_tokens": 1000.0, "perf/total_num_response_tokens": 400.0}) == {
        "perf/time_per_step": 10.0,
        "perf/throughput": 100.0,
        "perf/throughput/gen": 100.0,
        "perf/throughput/update": 200.0,
    }


def test_the_timer_gives_each_part_the_work_done_in_it():
    counted: list[float] = []

    def take() -> float:
        taken = sum(counted)
        counted.clear()
        return taken

    timer = Timer(take_flops=take, rates=lambda seconds, flops: {"found": dict(flops)})
    with timer("step"):
        with timer("a"):
            counted.append(3)
        counted.append(1)
        with timer("a"):
            counted.append(2)
        counted.append(4)
    # what is taken at the end of a part is the part's; "step" is the sum of all, its own remainder included
    assert timer.flush()["found"] == {"a": 6.0, "step": 10.0}
    assert timer.flush()["found"] == {"step": 0}


def test_the_timer_adds_what_another_one_measured():
    timer, other = Timer(), Timer(take_flops=lambda: 2.0)
    with other("gen"):
        pass
    other.add_flops("gen", 5.0)
    timer.add_flops("gen", 1.0)
    timer.add(other.seconds, other.flops)
    timer.add({"gen": 1.0, "reward": 0.5}, {})
    assert timer.flops == {"gen": 8.0} and timer.seconds == {"gen": other.seconds["gen"] + 1.0, "reward": 0.5}


def test_the_limit_is_the_best_rate_of_products_and_measuring_ends_at_its_deadline():
    # read at the start, around the product that warms up, then around three products and before the next three
    now = iter([0.0, 1.0, 2.0, 3.0, 3.0001, 4.0, 5.0, 5.25, 6.0, 7.0, 7.5, 10.0])
    rate = gemm_rate(CPUDevice(), torch.float32, seconds=10.0, clock=lambda: next(now))
    # 0.1 ms for 3 products of 256 rows is short, so the next ones have 512 rows; 0.25 s is long enough to stay there
    assert rate == pytest.approx(3 * 2 * 256**3 / 0.0001) and next(now, None) is None
    now = iter([0.0, 0.1, 0.2, 0.3, 0.8, 1.9, 2.0, 2.25, 99.0])
    rate = gemm_rate(CPUDevice(), torch.float32, seconds=2.0, clock=lambda: next(now))
    assert rate == pytest.approx(3 * 2 * 256**3 / 0.25)
    with_threads = f"measured with {torch.get_num_threads()} thread(s)"
    assert describe_rate(81.25e9, torch.float32, CPUDevice()).startswith(
        f"81.2 GFLOP/s in float32 matrix products, {with_threads}"
    )
    assert describe_rate(2.5e12, torch.bfloat16, CPUDevice()).startswith("2.5 TFLOP/s in bfloat16 matrix products")


def test_the_start_names_where_its_seconds_went():
    now = iter([1.0, 3.0, 3.5, 7.0])
    laps = Laps(clock=lambda: next(now))
    for name in ("imports", "data", "imports"):
        laps.lap(name)
    assert laps.describe() == "6.0 s (imports 5.5, data 0.5)"
    assert Laps(began=time.perf_counter() - 5).began < time.perf_counter() - 4


@pytest.mark.parametrize("given, cores, want", [(None, 2, 2), (None, 8, 4), ("4", 2, 4)])
def test_no_more_threads_than_cores_unless_the_user_says_so(given, cores, want, monkeypatch):
    made = []
    monkeypatch.setattr(threads, "torch", SimpleNamespace(get_num_threads=lambda: 4, set_num_threads=made.append))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    threads.set_threads(cores)
    assert made == ([want] if want != 4 else [])


BOTH = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}


@pytest.mark.parametrize("given, ours, cores, text", [
    ({"OMP_WAIT_POLICY": "PASSIVE"}, {}, 7, "waiting threads sleep (OMP_WAIT_POLICY=PASSIVE)"),
    ({"OMP_WAIT_POLICY": "active"}, {}, 7, "waiting threads keep their core busy (OMP_WAIT_POLICY=active)"),
    ({}, {}, 7, "waiting threads follow the OpenMP library's own default (OMP_WAIT_POLICY is unset)"),
    ({"GOMP_SPINCOUNT": "5"}, {}, 7, "waiting threads follow GOMP_SPINCOUNT=5"),
    (BOTH, {}, 7, "waiting threads follow OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=20000"),
    (BOTH, BOTH, 7, "waiting threads spin for a moment, and sleep where others use the cores (our default)"),
    (BOTH, BOTH, 2, "waiting threads sleep (OMP_WAIT_POLICY=PASSIVE, our default)"),  # more threads than cores
    ({"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "PASSIVE"}, 7,
     "waiting threads sleep (OMP_WAIT_POLICY=PASSIVE, our default)"),
])  # fmt: skip
def test_the_summary_says_threads_and_who_chose(given, ours, cores, text, monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 7)
    monkeypatch.setattr(threads, "cores_by_affinity", lambda: cores)
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "OUR_WAITING", ours)
    for name in BOTH:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**given, "OMP_NUM_THREADS": "3"}.items():
        monkeypatch.setenv(name, value)
    assert threads.describe_threads() == f"3 on 7 usable core(s) (OMP_NUM_THREADS=3); {text}"
    monkeypatch.setattr(threads.torch, "get_num_threads", lambda: 1)
    assert threads.describe_threads().endswith("; none waits for another")


def test_a_run_prints_threads_limit_and_start(toy, tmp_path, capsys):
    words = toy_overrides(toy, tmp_path / "run", "trainer.total_training_steps=1", "trainer.val_before_train=False")
    run_ppo(load_config([*words, "trainer.test_freq=-1", "trainer.logger=jsonl"]), Laps(time.perf_counter() - 7))
    out = capsys.readouterr().out
    assert re.search(r"^  threads +\d+ on \d+ usable core\(s\) \(OMP_NUM_THREADS", out, re.M)
    assert re.search(r"^  limit +[\d.]+ [GT]FLOP/s in float32 matrix products, measured with", out, re.M)
    start = re.search(r"^  start-up +([\d.]+) s \(data [\d.]+, models [\d.]+, engine [\d.]+, limit 0\.\d\)$", out, re.M)
    assert start and float(start[1]) >= 7
