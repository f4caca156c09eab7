"""Worker processes: what they print, hold and leave behind, however either side ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from steepest.errors import RewardError
from steepest.rewards import RewardResult
from steepest.rewards.process import describe_exit
from tests.support.processes import alive, gone_within
from tests.support.reward_pools import FUNCTIONS, custom_pool, requests

ROOT = Path(__file__).parents[2]


def test_prints_of_a_reward_go_to_standard_error(capfd):
    with custom_pool() as pool:
        assert pool.score(requests("print")) == [RewardResult(1.0)]
    out, err = capfd.readouterr()
    assert out == "" and "and you" in err and "to you" in err


def test_workers_stay_between_calls_and_a_dead_idle_one_is_replaced(pool):
    for _ in range(2):
        pids = {result.score for result in pool.score(requests(*["pid"] * 8))}
    assert pids == set(map(float, pool.worker_pids())) and len(pids) == 2
    for pid in pool.worker_pids():
        os.kill(pid, 9)
    assert gone_within(list(pool.worker_pids()), 60)
    assert pool.score(requests("1", "2", "3")) == [RewardResult(1.0), RewardResult(2.0), RewardResult(3.0)]
    assert pids.isdisjoint(map(float, pool.worker_pids()))


def test_close_leaves_no_process_and_can_be_called_twice():
    pool = custom_pool()
    pool.check([])
    pids = pool.worker_pids()
    assert len(pids) == 2 and all(map(alive, pids))
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # reaped, no zombie
    with pytest.raises(RewardError, match="closed"):
        pool.score(requests("1"))


def test_a_forgotten_pool_ends_its_workers():
    pool = custom_pool()
    pool.check([])
    pids = pool.worker_pids()
    del pool
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_hung_reward_is_killed_with_what_it_started(tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_PID_FILE", str(tmp_path / "pid"))
    with custom_pool(timeout_s=1.0) as pool:
        assert pool.score(requests("child"))[0].error == "timeout after 1 s"
    assert gone_within([int((tmp_path / "pid").read_text())], 60)


def test_no_file_descriptor_is_left_open():
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with custom_pool() as pool:
        pool.score(requests("1", "die", "segfault", "2"))
    assert count() == before


SCRIPT = """
import sys, time
from steepest.rewards import RewardPool, RewardRequest
print("main imported", file=sys.stderr)
pool = RewardPool(custom=({functions!r}, "compute_score"), num_workers=2, timeout_s=30)
pool.check([])
print(*pool.worker_pids(), flush=True)
{then}
"""


def heed_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_parent(then: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A parent without `if __name__ == "__main__"`, as scripts and notebooks are."""
    code = textwrap.dedent(SCRIPT).format(functions=FUNCTIONS, then=then)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_ctrl_c
    )
    assert parent.stdout is not None
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


@pytest.mark.parametrize("doing", ["one", "sleep", "regex"])
def test_kill_9_of_the_parent_leaves_no_worker(doing):
    # idle, in Python code that waits, and in C code that holds the interpreter lock
    then = f"pool.score([RewardRequest('a', 'd', {doing!r}, '', {{}})] * 2)\nprint('done', flush=True)\ntime.sleep(60)"
    parent, pids = start_parent(then)
    time.sleep(0.3)
    assert len(pids) == 2 and all(map(alive, pids))
    parent.kill()
    parent.communicate()
    assert gone_within(pids, 60)


def test_kill_9_of_the_parent_leaves_no_worker_when_a_fork_of_it_lives_on():
    # the fork holds copies of the parent's ends of socket and pipe, so neither of them ends
    fork = "import os\nchild = os.fork()\nif child: print(child, flush=True)\ntime.sleep(60)"
    parent, pids = start_parent(fork)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone_within(pids, 60) and alive(child)
    os.kill(child, 9)
    parent.communicate()


@pytest.mark.parametrize("then", ["", "raise SystemExit(0)", "pool.score([RewardRequest('a', 'd', '1', '', {})])"])
def test_a_parent_that_ends_without_close_leaves_no_worker_and_no_noise(then):
    parent, pids = start_parent(then)
    _, err = parent.communicate(timeout=120)
    assert parent.returncode == 0 and err == "main imported\n"
    assert len(pids) == 2 and not any(map(alive, pids))


def test_ctrl_c_ends_the_call_and_the_workers_that_were_on_it():
    parent, pids = start_parent("pool.score([RewardRequest('a', 'd', 'sleep', '', {})] * 2)")
    time.sleep(0.3)
    parent.send_signal(2)
    _, err = parent.communicate(timeout=120)
    assert err.rstrip().endswith("KeyboardInterrupt") and not any(map(alive, pids))


def test_a_fork_of_the_owner_may_not_score_and_does_not_harm_it(pool):
    child = os.fork()
    if child == 0:
        try:
            pool.score(requests("1"))
        except RewardError:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert pool.score(requests("1")) == [RewardResult(1.0)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (3, "exited with code 3"),
        (-9, "was killed by SIGKILL (out of memory?)"),
        (-11, "was killed by SIGSEGV"),
        (-250, "was killed by signal 250"),
    ],
)
def test_ends_in_words(code, words):
    assert describe_exit(code) == words
