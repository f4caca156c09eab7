"""Signals sent to real processes: what they interrupt in each phase, exit codes and messages."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from steepest.process.entry import RESUMES
from steepest.process.stopping import SIGNALS, Stop, Stopped

START = """
import os, signal, sys, time
from steepest.process import stopping
from steepest.process.entry import guarded
from steepest.process.stopping import STOP, Stopped

def ready():
    os.write(1, b"ready" + bytes([10]))  # at once: a signal cannot leave it in a buffer

def until(done):
    while not done():
        time.sleep(0.01)

def forever():
    while True:
        time.sleep(0.01)
"""


def _heed_signals() -> None:
    """Tests that a script runs in the background ignore Ctrl-C, and a process inherits that."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_DFL)


@contextmanager
def process(
    main: str, *, before: str = "", grace: float = 100.0, command: tuple[str, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A command whose main function is `main`; `before` runs first. It is ready when the block begins."""
    code = f"{START}{before}\ndef main():\n    STOP.grace = {grace}\n" + "".join(
        f"    {line}\n" for line in main.strip().splitlines()
    )
    code += "sys.exit(guarded(main))\n"
    started = subprocess.Popen(
        [*command, sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_signals,
    )
    try:
        assert started.stdout is not None and started.stdout.readline() == "ready\n"
        yield started
    finally:
        started.kill()
        started.wait()


@pytest.mark.parametrize(
    ("signum", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGHUP, 129, "SIGHUP"),
        (signal.SIGUSR1, 138, "SIGUSR1"),
        (signal.SIGUSR2, 140, "SIGUSR2"),
    ],
)
def test_before_training_a_signal_ends_at_once(signum: int, code: int, name: str) -> None:
    with process("ready()\nforever()") as run:
        run.send_signal(signum)
        _, err = run.communicate()
    assert run.returncode == code
    assert err == f"\nStopped by {name}. {RESUMES}\n"


STEP = """
with STOP.during("step"):
    ready()
    until(lambda: STOP.requested is not None)
print("the step has ended", flush=True)
raise Stopped(STOP.requested, "Saved.")
"""


def test_a_step_is_ended_first() -> None:
    with process(STEP) as run:
        run.send_signal(signal.SIGTERM)
        out, err = run.communicate()
    assert (run.returncode, out) == (143, "the step has ended\n")
    assert err == (
        "\nSIGTERM: the run ends its step, saves it and stops, within 100 s. A second signal stops it at once.\n"
        "\nStopped by SIGTERM. Saved.\n"
    )


def test_a_second_signal_ends_at_once() -> None:
    before = "stopping.TOGETHER_SECONDS = 0.0"
    with process('with STOP.during("step"):\n    ready()\n    forever()', before=before) as run:
        assert run.stderr is not None
        run.send_signal(signal.SIGTERM)
        assert run.stderr.readline() == "\n" and run.stderr.readline().startswith("SIGTERM: the run ends its step")
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert run.returncode == 143 and "Stopped by SIGTERM." in err


def test_the_same_signal_twice_in_a_moment_is_one() -> None:
    """A terminal signals the group, and the launcher in it passes the signal on."""
    before = "stopping.TOGETHER_SECONDS = 1000.0"
    with process(STEP, before=before) as run:
        run.send_signal(signal.SIGINT)
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate()
    assert out == "the step has ended\n" and run.returncode in (130, 143)


def test_a_step_that_has_no_time_left_is_interrupted() -> None:
    main = 'try:\n    with STOP.during("step"):\n        ready()\n        forever()\nexcept Stopped:\n    print(STOP.out_of_time, STOP.at_once)\n    raise'  # noqa: E501
    with process(main, grace=0.0) as run:
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate()
    assert (run.returncode, out) == (143, "True False\n")


def test_saving_has_no_limit() -> None:
    main = (
        'with STOP.during("hold"):\n    ready()\n    until(lambda: STOP.requested)\n    time.sleep(0.2)\nprint("saved")'
    )
    with process(main, grace=0.0) as run:
        run.send_signal(signal.SIGTERM)
        out, _ = run.communicate()
    assert (run.returncode, out) == (0, "saved\n")


STUCK = """
import ctypes
read, write = os.pipe()
os.set_inheritable(read, True)
# C code that waits, whatever signals come, until this process ends
ctypes.CDLL(None).system(f"echo ready; exec cat <&{read} >/dev/null 2>&1".encode())
"""


def test_c_code_that_does_not_return_cannot_keep_the_process() -> None:
    with process(STUCK, before="stopping.UNWIND_SECONDS = 0.1") as run:
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate()
    assert (run.returncode, err) == (143, "\nSIGTERM: the process does not answer and is ended.\n")


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    with process("ready()\nuntil(lambda: STOP.requested)", command=("nohup",)) as run:
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate()
    assert run.returncode == 143 and "Stopped by SIGTERM" in err


def test_a_terminal_that_is_gone_changes_no_exit_code() -> None:
    with process("os.close(2)\nready()\nforever()") as run:
        run.send_signal(signal.SIGHUP)
        run.communicate()
    assert run.returncode == 129


def test_handlers_are_put_back_and_a_block_within_a_block_does_nothing() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop()
    with stop.watch():
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
        with stop.watch():
            pass
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_weights_are_left_alone_when_the_time_is_too_short_to_change_them() -> None:
    now = [0.0]
    stop = Stop(clock=lambda: now[0])
    stop.grace, stop.reserve = 30.0, 10.0
    stop.give_up_unless(1e9)  # no signal came
    stop.requested, now[0] = signal.SIGTERM, 12.0  # 20 seconds for the step, of which 12 are over
    stop.give_up_unless(8.0)
    with pytest.raises(Stopped):
        stop.give_up_unless(8.5)
    assert stop.out_of_time
