"""OpenMP threads that wait for work spin for a moment, and sleep at once while other processes use the cores.

Waking a sleeping thread is expensive, most of all on a virtual machine; a spinning thread holds a core that another
process may need. GNU's OpenMP library can do both: a thread spins GOMP_SPINCOUNT times, but with
OMP_WAIT_POLICY=PASSIVE it does not spin while there are more OpenMP threads than cores. `entry.py` sets both variables
before torch is imported. To make all threads sleep while they wait, this module starts an idle team of threads. The
numbers computed, and the number of threads that compute them, do not change.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from steepest.console import say
from steepest.process.cores import cores_by_affinity
from steepest.process.threads import adapts, gnu_openmp

EVERY, CROWDED, FREE, PATIENCE = 0.5, 0.1, 0.03, 4
"""Every EVERY seconds the module measures which share of the time a thread waited for a core (the thread that waited
longest counts). Above CROWDED waiting threads sleep; below FREE in PATIENCE measurements in a row they spin again.
Example, on 2 cores with 2 threads that decode, multiply matrices or run Python: the share is 0.002 to 0.023 alone, and
0.29 to 0.76 next to one busy process, spinning or sleeping."""


def adaptive_waiting() -> AbstractContextManager[object]:
    """Control waiting threads in the `with` block, where the libraries allow it. Call it after `set_threads`."""
    return Waiting() if adapts() else nullcontext()


class Waiting:
    """Makes waiting threads sleep while other processes use the cores. Its own threads end with this process."""

    def __init__(self) -> None:
        self._library, self._size = gnu_openmp(), max(2, cores_by_affinity() - torch.get_num_threads() + 2)
        self._stop, self._release = threading.Event(), threading.Event()
        self._team: threading.Thread | None = None
        self._watch = threading.Thread(target=self._run, name="waiting threads", daemon=True)

    def __enter__(self) -> Waiting:
        self._watch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._watch.join()

    @property
    def asleep(self) -> bool:
        return self._team is not None

    def sleep(self) -> None:
        """Make waiting threads sleep at once from now on."""
        if self._team is None:
            made = threading.Event()
            self._release.clear()
            team = threading.Thread(target=self._hold, args=(made,), name="idle team", daemon=True)
            team.start()
            made.wait()
            self._team = team

    def spin(self) -> None:
        """Make waiting threads spin for a moment before they sleep, from now on."""
        if self._team is not None:
            self._release.set()
            self._team.join()
            self._team = None

    def _hold(self, made: threading.Event) -> None:
        # This thread starts a team of its own, for a function that does nothing; the team ends with the thread.
        # torch.set_num_threads would change more: the matrix products of all threads, and the number of threads that
        # threads started later begin with.
        assert self._library is not None
        self._library.GOMP_parallel(self._library.omp_get_num_threads, None, self._size, 0)
        made.set()
        self._release.wait()

    def _run(self) -> None:
        crowd = Crowd()
        try:
            before, then = waits(), time.monotonic_ns()
            while not self._stop.wait(EVERY):
                now, at = waits(), time.monotonic_ns()
                (self.sleep if crowd.look(longest(before, now) / (at - then)) else self.spin)()
                before, then = now, at
        except (OSError, RuntimeError) as error:  # no file can be opened, no thread started
            say(f"warning: the use of the cores can no longer be measured ({error}); waiting threads spin.")
        finally:
            self.spin()


class Crowd:
    """Decides from successive measurements whether other processes use the cores."""

    def __init__(self) -> None:
        self._crowded, self._quiet = False, 0

    def look(self, share: float) -> bool:
        self._quiet = self._quiet + 1 if share < FREE else 0
        self._crowded = share > CROWDED or (self._crowded and self._quiet < PATIENCE)
        return self._crowded


def waits(tasks: Path = Path("/proc/self/task")) -> dict[str, int]:
    """Mapping from thread to the nanoseconds that it waited for a core. A thread that ends meanwhile is left out."""
    found = {}
    for task in os.listdir(tasks):
        with suppress(FileNotFoundError, ProcessLookupError):
            found[task] = int((tasks / task / "schedstat").read_text().split()[1])
    return found


def longest(before: Mapping[str, int], now: Mapping[str, int]) -> int:
    """The longest wait of one thread between two calls of `waits`. A new thread counts from 0, also one that reuses an
    id."""
    return max((n - old if (old := before.get(task, 0)) <= n else n for task, n in now.items()), default=0)
