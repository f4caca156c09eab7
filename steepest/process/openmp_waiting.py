"""OpenMP threads that wait for work spin for a moment, and sleep at once while others use the cores.

Waking a thread that sleeps is dear, on a virtual machine above all; a thread that spins holds a core that others want.
GNU's OpenMP library knows both: it spins as often as GOMP_SPINCOUNT says, but with OMP_WAIT_POLICY=PASSIVE not at all
while there are more OpenMP threads than cores. `entry.py` sets both variables before torch is imported. An idle team of
threads then makes all others sleep while they wait. What is computed, and by how many threads, stays as it is.
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
"""Looks are EVERY so many seconds. Above CROWDED waiting threads sleep; below FREE in PATIENCE looks in a row they spin
again. Both are shares of time: that of the thread which waited longest for a core. On 2 cores, 2 threads that decode,
multiply matrices or run Python: 0.002 to 0.023 alone, 0.29 to 0.76 beside one busy process, spinning or sleeping."""


def adaptive_waiting() -> AbstractContextManager[object]:
    """Looks after waiting threads while a job runs, where that can be done. After `set_threads`."""
    return Waiting() if adapts() else nullcontext()


class Waiting:
    """Makes waiting threads sleep while others use the cores. Its own threads end with the process."""

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
        """From now on waiting threads sleep at once."""
        if self._team is None:
            made = threading.Event()
            self._release.clear()
            team = threading.Thread(target=self._hold, args=(made,), name="idle team", daemon=True)
            team.start()
            made.wait()
            self._team = team

    def spin(self) -> None:
        """From now on waiting threads spin for a moment first."""
        if self._team is not None:
            self._release.set()
            self._team.join()
            self._team = None

    def _hold(self, made: threading.Event) -> None:
        # A team of this thread's own, which ends with it, for a function that does nothing. torch.set_num_threads would
        # reach further: the matrix products of all threads, and the number that threads started later begin with.
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
            say(f"warning: nobody looks any more whether others use the cores ({error}); waiting threads spin.")
        finally:
            self.spin()


class Crowd:
    """Whether others use the cores, from one look after the other."""

    def __init__(self) -> None:
        self._crowded, self._quiet = False, 0

    def look(self, share: float) -> bool:
        self._quiet = self._quiet + 1 if share < FREE else 0
        self._crowded = share > CROWDED or (self._crowded and self._quiet < PATIENCE)
        return self._crowded


def waits(tasks: Path = Path("/proc/self/task")) -> dict[str, int]:
    """Thread -> nanoseconds that it wanted to run and had no core. A thread that ends meanwhile is left out."""
    found = {}
    for task in os.listdir(tasks):
        with suppress(FileNotFoundError, ProcessLookupError):
            found[task] = int((tasks / task / "schedstat").read_text().split()[1])
    return found


def longest(before: Mapping[str, int], now: Mapping[str, int]) -> int:
    """The most that one thread waited in between. A new thread, also under an old one's number, counts from 0."""
    return max((n - old if (old := before.get(task, 0)) <= n else n for task, n in now.items()), default=0)
