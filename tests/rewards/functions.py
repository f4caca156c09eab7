"""Reward functions that misbehave on demand: `solution_str` says how. Loaded by path into worker processes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Point:  # a dataclass needs its module in sys.modules
    x: float


class Rude(Exception):
    def __str__(self):
        raise RuntimeError("no message for you")


def _alarm():
    def ring(*_):
        raise TimeoutError("alarm")

    signal.signal(signal.SIGALRM, ring)  # raises off the main thread
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        time.sleep(5)
    except TimeoutError:
        return 0.5
    return 0.0


def _leave_child():
    child = subprocess.Popen(["sleep", "60"])
    Path(os.environ["CHILD_PID_FILE"]).write_text(str(child.pid))
    time.sleep(60)


def _raise(error):
    raise error


ACTIONS = {
    "one": lambda: 1.0,
    "zero": lambda: 0.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "true": lambda: True,
    "none": lambda: None,
    "text": lambda: "1.0",
    "no score": lambda: {"acc": 1.0},
    "parts": lambda: {"score": 0.25, "acc": True, "note": "x"},
    "raise": lambda: _raise(ValueError("bad\nanswer")),
    "rude": lambda: _raise(Rude()),
    "exit": lambda: sys.exit(3),
    "interrupt": lambda: _raise(KeyboardInterrupt()),
    "recurse": lambda: ACTIONS["recurse"](),
    "die": lambda: os._exit(7),
    "segfault": lambda: ctypes.string_at(0),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(60),
    "regex": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),  # holds the interpreter lock for ever
    "alarm": _alarm,
    "print": lambda: print("to you") or (os.write(1, b"and you\n") and 1.0),
    "child": _leave_child,
    "pid": lambda: time.sleep(0.05) or os.getpid(),  # long enough that every worker gets some
    "threads": lambda: float(os.environ["OMP_NUM_THREADS"]),
    "torch": lambda: float("torch" in sys.modules),
    "path": lambda: float("PYTHONPATH" in os.environ),
    "dataclass": lambda: Point(2.0).x,
}


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str in ACTIONS:
        return ACTIONS[solution_str]()
    return float(solution_str)


LOCK: list[asyncio.Lock] = []


async def async_score(data_source, solution_str, ground_truth, extra_info=None):
    if not LOCK:
        LOCK.append(asyncio.Lock())  # like a client that is kept between calls
    async with LOCK[0]:
        await asyncio.sleep(60 if solution_str == "sleep" else 0.001)
    return compute_score(data_source, solution_str, ground_truth, extra_info)


def see(**keywords):
    return float(keywords == {"data_source": "d", "solution_str": "s", "ground_truth": [1], "extra_info": {"k": "v"}})


def positional(response, truth):
    return 0.0


not_callable = 3


def slow_score(data_source, solution_str, ground_truth, extra_info=None):
    time.sleep(float(solution_str))
    return float(solution_str)
