"""Run a command and watch its process tree: memory, processor time, and what others used meanwhile. Linux only."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GIB = 2**30
_TICK = os.sysconf("SC_CLK_TCK")
_PSS_GROWTH = 1.01
"""The proportional size is read if the resident size has grown by this factor, because the kernel walks every page."""


class BenchError(Exception):
    """A problem that the user has to fix before a benchmark can run."""


@dataclass(frozen=True)
class Sample:
    """The process tree at one moment."""

    time: float
    """Seconds since 1970."""
    cpu: float
    """Processor seconds used so far, by living processes and by those they waited for."""
    machine: float
    """Processor seconds that all processes of this machine have used so far."""
    rss: int
    """Resident bytes, summed; a page that several processes share counts for each of them."""


@dataclass
class Measured:
    """What a command used."""

    returncode: int
    timed_out: bool
    began: float
    seconds: float
    peak_rss: int
    peak_pss: int
    """Like peak_rss, but a shared page counts once."""
    processes: int
    samples: list[Sample] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Peak memory in bytes: the sampled proportional size if processes share pages, else the resident size."""
        return self.peak_rss if self.processes == 1 else max(self.peak_pss, 1)

    def cpu_between(self, start: float, end: float) -> tuple[float, float]:
        """(processor seconds of the tree, of all other processes) between two times, as exact as the samples."""
        one, other = self._at(start), self._at(end)
        own = other.cpu - one.cpu
        return own, max(0.0, other.machine - one.machine - own)

    def _at(self, moment: float) -> Sample:
        index = bisect_left([sample.time for sample in self.samples], moment)
        return self.samples[min(index, len(self.samples) - 1)]


def run_measured(
    command: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str | None] | None = None,
    cwd: Path | None = None,
    timeout: float = 3600,
    interval: float = 0.25,
) -> Measured:
    """Run `command` with its output in `log`. After `timeout` seconds it is ended, and `timed_out` is true.

    `env` changes this process's environment; None removes a variable.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.time()
    samples: list[Sample] = []
    peak_rss = peak_pss = rss_at_pss = processes = 0
    timed_out = False
    environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    with log.open("w") as output:
        child = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd,
            start_new_session=True,
        )  # fmt: skip
        try:
            while child.poll() is None:
                pids = tree(child.pid)
                samples.append(_sample(pids))
                highest = max((_kib(f"/proc/{pid}/status", "VmHWM:") for pid in pids), default=0)
                peak_rss = max(peak_rss, samples[-1].rss, highest)
                processes = max(processes, len(pids))
                if samples[-1].rss > _PSS_GROWTH * rss_at_pss:
                    rss_at_pss = samples[-1].rss
                    peak_pss = max(peak_pss, sum(_kib(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in pids))
                if time.time() - began > timeout:
                    timed_out = True
                    break
                time.sleep(interval)
        finally:
            _end(child)
    return Measured(child.returncode, timed_out, began, time.time() - began, peak_rss, peak_pss, processes, samples)


def tree(root: int) -> list[int]:
    """`root` and every living process below it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def machine_seconds() -> float:
    """Processor seconds that everybody on this machine has used since it started."""
    with open("/proc/stat") as file:
        values = [int(word) for word in file.readline().split()[1:9]]
    return (sum(values) - values[3] - values[4]) / _TICK  # without idle and waiting for discs


def _sample(pids: Sequence[int]) -> Sample:
    cpu = 0.0
    for pid in pids:
        if fields := _stat(pid):
            cpu += sum(int(word) for word in fields[11:15]) / _TICK  # own and waited-for children's, user and system
    rss = sum(_kib(f"/proc/{pid}/status", "VmRSS:") for pid in pids)
    return Sample(time.time(), cpu, machine_seconds(), rss)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name, which may hold blanks; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kib(path: str, key: str) -> int:
    """The bytes of a `Key:  123 kB` line; 0 when the process is gone."""
    try:
        with open(path) as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(key)), 0)
    except OSError:
        return 0


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the remaining processes of the child's process group to end, then kill them."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 30.0)):
        if child.poll() is None:
            os.killpg(child.pid, sign)
            try:
                child.wait(patience)
            except subprocess.TimeoutExpired:
                continue
