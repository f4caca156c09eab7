"""The pool's side of one worker process: it starts the process, exchanges messages with it and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from steepest.config.sections.reward import WeightedFunction

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
_WIRE_SECONDS = 10  # no read or write on the wire takes longer: a worker that was stopped cannot stop the trainer
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Setup:
    """The settings that a worker gets at its start."""

    custom: tuple[str, str] | None  # absolute path and name of the user's function
    functions: tuple[WeightedFunction, ...]  # of reward.functions; none: by data_source
    mode: str  # reward.mode, for the functions that have modes
    import_path: tuple[str, ...]  # sys.path of the parent
    python_path: str | None  # PYTHONPATH as the user has it, for programs that a reward starts
    custom_kwargs: Mapping[str, Any] = field(default_factory=dict)  # further keywords of the user's function

    def apply(self) -> None:
        """Set this process's import path to the parent's, and restore the user's PYTHONPATH for child processes."""
        sys.path[:] = self.import_path
        os.environ.pop("PYTHONPATH", None)
        if self.python_path is not None:
            os.environ["PYTHONPATH"] = self.python_path


class WorkerProcess:
    """A running `steepest.rewards.worker`.

    A worker is a new interpreter, neither a fork nor a multiprocessing child: a fork of a process that runs torch
    threads can deadlock, and multiprocessing's spawn imports the user's main module again. So a worker can be started
    from any thread, any main module and any notebook.
    """

    def __init__(self, setup: Setup) -> None:
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        command = [sys.executable, "-m", "steepest.rewards.worker"]
        command += [str(theirs.fileno()), str(lifeline), str(os.getpid())]
        try:
            self.process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), lifeline),
                stdin=subprocess.DEVNULL,
                env=_environment(),
                # its own process group: Ctrl-C reaches only the trainer, and `kill` also ends what the reward started
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(lifeline)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", _WIRE_SECONDS, 0))
        self.wire = Connection(ours.detach())
        with contextlib.suppress(OSError):  # the worker is gone: the next read reports it
            self.wire.send(setup)
        self.ready = False
        self.begun = False  # True after the worker's message that it works on chunk[0]
        self.preparing = False  # it imports what chunk[0] needs, which is not on the sample's time
        self.chunk: deque[int] = deque()  # numbers of the samples it has and has not answered, in order
        self.since = time.monotonic()  # start of the process, then of the sample it works on

    @property
    def idle(self) -> bool:
        return self.ready and not self.chunk

    def send(self, numbers: Sequence[int], payloads: Sequence[bytes]) -> None:
        """Send work to an idle worker. Raises OSError if it is gone."""
        self.wire.send(list(payloads))
        self.chunk.extend(numbers)
        self.begun, self.preparing, self.since = False, False, time.monotonic()

    def messages(self) -> list[list[Any]]:
        """All messages that can be read now. Raises EOFError or OSError if none was read and no more will come."""
        read: list[list[Any]] = []
        try:
            while self.wire.poll():
                read.append(json.loads(self.wire.recv_bytes()))
        except (EOFError, OSError, ValueError) as error:
            if not read:
                raise EOFError("the worker's wire ended") from error
        return read

    def end(self, patience: float = 0.0) -> str:
        """Give the worker `patience` seconds to end by itself, then kill it and all that it started; reap it.

        Returns how it ended, in words: "was killed by SIGSEGV", "exited with code 3".
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, patience))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.close()
        return describe_exit(code)

    def close(self) -> None:
        """Close our ends of wire and lifeline."""
        self.wire.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def end_all(workers: list[WorkerProcess], owner: int) -> None:
    """End every worker and reap it; idle ones end by themselves. In a fork of the owner only our copies are closed."""
    ending, workers[:] = list(workers), []
    for worker in ending:
        worker.wire.close()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in ending:
        if os.getpid() != owner:
            worker.close()
        else:
            worker.end(0.0 if worker.chunk else deadline - time.monotonic())


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # one thread per worker, unless the user has set it: all threads of all workers would be more than the cores
    environment.setdefault("OMP_NUM_THREADS", "1")
    # A source tree reached by sys.path alone is not on the child's path. An installed package is, and putting
    # site-packages first would let it shadow the standard library.
    if Path(_PACKAGE_PARENT).name not in ("site-packages", "dist-packages"):
        old = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = _PACKAGE_PARENT + (os.pathsep + old if old else "")
    return environment
