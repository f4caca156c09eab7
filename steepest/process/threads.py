"""How many threads compute and what they do while they wait. Settings of the user are kept."""

from __future__ import annotations

import ctypes
import os

import torch

from steepest.process.cores import cores_by_affinity, usable_cores
from steepest.process.entry import OUR_WAITING, SPIN_COUNT, WAIT_POLICY

NUM_THREADS = "OMP_NUM_THREADS"


def set_threads(cores: int | None = None) -> None:
    """Limit torch's threads to the number of cores that this process may use.

    torch counts the machine's cores. In a container with a quota, that many threads would compete for fewer cores, so
    the quota is used. OMP_NUM_THREADS, if the user has set it, is kept.
    """
    cores = usable_cores() if cores is None else cores
    if NUM_THREADS not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def describe_threads() -> str:
    """One sentence for the start summary: threads, cores, what waiting threads do, and which setting decides it."""
    given = os.environ.get(NUM_THREADS)
    why = f"{NUM_THREADS} is unset" if given is None else f"{NUM_THREADS}={given}"
    return f"{torch.get_num_threads()} on {usable_cores()} usable core(s) ({why}); {_waiting()}"


def _waiting() -> str:
    if torch.get_num_threads() == 1:
        return "none waits for another"
    if adapts():
        return "waiting threads spin for a moment, and sleep where others use the cores (our default)"
    policy = os.environ.get(WAIT_POLICY)
    if SPIN_COUNT in os.environ and not OUR_WAITING:
        given = [f"{name}={os.environ[name]}" for name in (WAIT_POLICY, SPIN_COUNT) if name in os.environ]
        return f"waiting threads follow {', '.join(given)}"
    if policy is None:
        return f"waiting threads do as the OpenMP library likes ({WAIT_POLICY} is unset)"
    what = {"PASSIVE": "sleep", "ACTIVE": "keep their core busy"}.get(policy.upper(), "follow it")
    return f"waiting threads {what} ({WAIT_POLICY}={policy}{', our default' if OUR_WAITING else ''})"


def adapts() -> bool:
    """True if `openmp_waiting.py` controls waiting threads: we have set the variables, and the library reads them.

    It is not needed with more threads than cores: then the library lets waiting threads sleep by itself.
    """
    threads = torch.get_num_threads()
    return SPIN_COUNT in OUR_WAITING and 1 < threads <= cores_by_affinity() and gnu_openmp() is not None


def gnu_openmp() -> ctypes.CDLL | None:
    """torch's OpenMP library if it is GNU's, else None. LLVM's and Intel's libraries can replace it and export its
    names."""
    if not torch.backends.openmp.is_available():
        return None
    library = ctypes.CDLL(torch._C.__file__)  # finds names in every library that it is linked with
    if any(hasattr(place, "__kmpc_fork_call") for place in (library, ctypes.CDLL(None))):
        return None
    return library if hasattr(library, "GOMP_parallel") else None
