"""Waiting threads spin alone and sleep beside others, in processes of their own with two threads; numbers stay."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from steepest.config.load import load_config, load_sft_config
from steepest.process import openmp_waiting
from steepest.process.cores import cores_by_affinity
from steepest.process.entry import SPIN_COUNT, waiting_defaults
from steepest.process.openmp_waiting import Crowd, Waiting, longest, waits
from steepest.process.threads import gnu_openmp
from steepest.trainer.jobs import ppo, sft
from tests.support.toy_run import make_toy, toy_overrides

ROOT = Path(__file__).parents[2]
needs_two_cores = pytest.mark.skipif(
    cores_by_affinity() < 2 or SPIN_COUNT not in waiting_defaults({}) or gnu_openmp() is None,
    reason="needs two cores, a kernel that counts how long threads wait for them, and GNU's OpenMP library",
)

START = """
import json, os, resource, subprocess, sys, threading, time
import steepest.process.entry
import torch
from steepest.process import threads
from steepest.process import openmp_waiting

def shows(habit):
    '''Whether the threads next to this one are seen to `sleep` or to `spin` between parallel operations.

    Other programs disturb single rounds in both directions: a thread that spins goes to sleep when work comes late, and
    one that is late itself does not wait at all. So one clear round is enough, and the next one is tried without it.
    '''
    return any(sleeps(20) <= 2 if habit == "spin" else sleeps(20) >= 15 for _ in range(300))

def sleeps(operations):
    '''How often the threads next to this one went to sleep meanwhile; they run on other cores than this one.'''
    x = torch.ones(2**16)
    x.exp_()
    tasks = [int(task) for task in os.listdir("/proc/self/task")]
    for task in tasks:
        os.sched_setaffinity(task, {CORES[task != os.getpid()]})
    count = lambda: sum(voluntary(task) for task in tasks if task != os.getpid())
    before = count()
    for _ in range(operations):
        x.exp_()
    return count() - before

CORES = sorted(os.sched_getaffinity(0))
def voluntary(task):
    return int(open(f"/proc/self/task/{task}/status").read().split("\\nvoluntary_ctxt_switches:")[1].split()[0])

def until(true, seconds):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        torch.ones(2**20).exp_()
    return true()
"""


def run(code: str, **variables: str) -> Any:
    """What `code` prints last, as JSON, after START and in an environment in which nobody set how threads wait."""
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, "-c", START + code], env=env, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *said, last = done.stdout.splitlines()
    return {**json.loads(last), "said": "\n".join(said), "errors": done.stderr}


@needs_two_cores
def test_threads_sleep_and_spin_as_told_and_nothing_else_changes():
    found = run("""
x, y = torch.randn(700, 701), torch.randn(701, 703)
made, seen, seen_as_set = [], [], []

def look():
    numbers = [row for row in torch.__config__.parallel_info().splitlines() if "max_threads" in row]
    seen.append([torch.get_num_threads(), *numbers])
    made.append([torch.get_num_threads(), (x @ y).sum().item(), x.sum().item(), x.exp().mean().item()])

watched, told = openmp_waiting.Waiting(), {"adapts": threads.adapts(), "says": threads.describe_threads()}
for habit in ("spin", "sleep", "sleep", "spin", "sleep", "spin"):
    getattr(watched, habit)()
    look()
    later = threading.Thread(target=look)
    later.start()
    later.join()
    time.sleep(0.3)  # a team ends a moment after its thread
    seen_as_set.append(shows(habit))
print(json.dumps({"as set": seen_as_set, "made": made, "seen": seen, **told}))
""")
    assert found["adapts"] and found["says"].endswith(
        "; waiting threads spin for a moment, and sleep where others use the cores (our default)"
    )
    assert found["as set"] == 6 * [True]
    assert found["seen"] == 12 * [[2, "\tomp_get_max_threads() : 2", *found["seen"][0][2:]]]
    assert found["made"] == 12 * [[2, *found["made"][0][1:]]]


@needs_two_cores
@pytest.mark.parametrize(
    "variables",
    [
        {"OMP_WAIT_POLICY": "PASSIVE"},
        pytest.param({"GOMP_SPINCOUNT": "20000"}, marks=pytest.mark.slow),
        pytest.param({"OMP_NUM_THREADS": "1"}, marks=pytest.mark.slow),
    ],
)
def test_where_the_user_chose_or_nothing_waits_nobody_looks(variables: dict[str, str]):
    found = run(
        "with openmp_waiting.adaptive_waiting() as made:\n"
        "    print(json.dumps({'adapts': threads.adapts(), 'made': made, 'python': threading.active_count()}))",
        **variables,
    )
    assert (found["adapts"], found["made"], found["python"]) == (False, None, 1)


@needs_two_cores
def test_a_process_that_cannot_open_files_is_warned_and_goes_on():
    found = run("""
with openmp_waiting.adaptive_waiting() as watched:
    watched.sleep()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    watched._watch.join(20)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
time.sleep(0.3)
print(json.dumps({"asleep": watched.asleep, "python": threading.active_count(), "spins": shows("spin")}))
""")
    warning = "warning: the use of the cores can no longer be measured ([Errno 24] Too many open files"
    assert found["said"].startswith(warning) and found["said"].endswith("; waiting threads spin.")
    assert (found["asleep"], found["python"], found["errors"]) == (False, 1, "") and found["spins"] is True


@needs_two_cores
def test_a_process_ends_in_the_midst_of_it():
    found = run("""
watched = openmp_waiting.Waiting().__enter__()
watched.sleep()
print(json.dumps({"asleep": watched.asleep, "python": threading.active_count()}), flush=True)
""")
    assert (found["asleep"], found["python"], found["errors"]) == (True, 3, "")


@pytest.mark.slow
@needs_two_cores
def test_beside_a_busy_process_threads_sleep_and_after_it_they_spin():
    """As many busy processes as cores, so that each thread has to share."""
    found = run("""
with openmp_waiting.adaptive_waiting() as watched:
    awake, asleep = (lambda: not watched.asleep), (lambda: watched.asleep)
    told = {"quiet": any(until(awake, 5) and not until(asleep, 3) for _ in range(6))}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    told["crowded"], told["stays"] = until(asleep, 30), not until(awake, 5)
    for process in busy:
        process.kill()
        process.wait()
    told["free"] = until(awake, 60)
print(json.dumps({**told, "python": threading.active_count()}))
""")
    assert found["crowded"] and found["stays"] and found["python"] == 1
    if not (found["quiet"] and found["free"]):
        pytest.skip("others use the cores of this machine, so waiting threads rightly slept without the test's doing")


def test_what_the_kernel_counts_is_read_and_a_thread_that_ended_is_left_out(tmp_path: Path):
    for task, text in {"7": "123456789 2500 31\n", "8": "5 0 1\n", "9": None}.items():
        (tmp_path / task).mkdir()
        if text:
            (tmp_path / task / "schedstat").write_text(text)
    assert waits(tmp_path) == {"7": 2500, "8": 0}
    assert str(os.getpid()) in waits()


@pytest.mark.parametrize(
    ("before", "now", "most"),
    [
        ({"1": 100, "2": 50}, {"1": 130, "2": 90}, 40),
        ({"1": 100, "2": 50}, {"1": 130}, 30),  # ended
        ({"1": 100}, {"1": 110, "3": 25}, 25),  # new
        ({"1": 100, "2": 900}, {"1": 110, "2": 8}, 10),  # new, with the number of one that ended
        ({}, {}, 0),
    ],
)
def test_the_thread_that_waited_longest_counts(before: dict[str, int], now: dict[str, int], most: int):
    assert longest(before, now) == most


def test_a_crowd_is_seen_at_once_and_its_end_after_four_quiet_looks():
    crowd = Crowd()
    shares = [0.0, 0.09, 0.11, 0.09, 0.02, 0.02, 0.02, 0.05, 0.02, 0.02, 0.02, 0.029, 0.09, 0.5]
    crowded = [False, False, True, True, True, True, True, True, True, True, True, False, False, True]
    assert [crowd.look(share) for share in shares] == crowded


def names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_every_job_looks_while_it_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also when it fails: what a job calls on its way sees which threads there are, and fails."""
    seen: list[set[str]] = []

    def fail(*args: object) -> int:
        seen.append(names())
        raise ZeroDivisionError

    class Watched(io.StringIO):
        """Standard output that fails at the summary of the start."""

        def write(self, text: str) -> int:
            return fail() if "run folder" in text else super().write(text)

    toy = make_toy(tmp_path / "toy", num_rows=128)
    monkeypatch.setattr(openmp_waiting, "adapts", lambda: True)
    with pytest.raises(ZeroDivisionError):
        if kind == "ppo":
            words = toy_overrides(toy, tmp_path / "run", "trainer.val_before_train=False")
            ppo.run_ppo(load_config(words), observers=[fail])
        else:
            rows = tmp_path / "rows.jsonl"
            rows.write_text(json.dumps({"prompt": "say 1", "response": " 1"}) + "\n")
            words = [
                f"data.train_files={rows}",
                "data.train_batch_size=1",
                "data.max_length=32",
                f"model.path={toy['model']}",
            ]
            words += [f"trainer.default_local_dir={tmp_path}/run", "trainer.total_training_steps=1"]
            with contextlib.redirect_stdout(Watched()):
                sft.run_sft(load_sft_config([*words, "trainer.logger=jsonl"]))
    assert [found & {"waiting threads"} for found in seen] == [{"waiting threads"}]
    assert not names() & {"waiting threads", "idle team"}


def test_the_team_is_large_enough_for_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch):
    # the main thread's team and the idle one share nothing: threads + size - 1 must be above the cores
    for threads, cores, size in ((2, 2, 2), (4, 8, 6), (8, 8, 2)):
        monkeypatch.setattr(openmp_waiting.torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(openmp_waiting, "cores_by_affinity", lambda cores=cores: cores)
        assert Waiting()._size == size and threads + size - 1 == cores + 1
