"""How many threads compute, and what they do while they wait; printed at start. What the user has set is left alone."""

from __future__ import annotations

import os

import torch

from steepest.cores import usable_cores
from steepest.trainer.entry import WAIT_POLICY, WAIT_POLICY_IS_OURS

NUM_THREADS = "OMP_NUM_THREADS"


def set_threads(cores: int | None = None) -> None:
    """See to it that torch starts no more threads than this process may use cores.

    torch counts the machine's cores. In a container with a share of them, so many threads would take each other's turn:
    the container's share counts. A number in OMP_NUM_THREADS is the user's and stays.
    """
    cores = usable_cores() if cores is None else cores
    if NUM_THREADS not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def describe_threads() -> str:
    """Threads, cores and what waiting threads do, and who says so; for the summary at start."""
    given = os.environ.get(NUM_THREADS)
    why = f"{NUM_THREADS} is unset" if given is None else f"{NUM_THREADS}={given}"
    return f"{torch.get_num_threads()} on {usable_cores()} usable core(s) ({why}); {_waiting()}"


def _waiting() -> str:
    policy = os.environ.get(WAIT_POLICY)
    if policy is None:
        return f"waiting threads do as the OpenMP library likes ({WAIT_POLICY} is unset)"
    what = {"PASSIVE": "sleep", "ACTIVE": "keep their core busy"}.get(policy.upper(), "do as it says")
    return f"waiting threads {what} ({WAIT_POLICY}={policy}{', our default' if WAIT_POLICY_IS_OURS else ''})"
