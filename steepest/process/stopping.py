"""Signals that stop a command: what each phase of a run does with them, and the limit on how long that may take.

A thread reads the signals, since the main thread cannot while it computes in C code. `run_entry` opens `STOP.watch()`
around every command; where it is not open (a notebook, a program of the user's), signals do what Python does with them.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those by which people and schedulers stop a program. One that is ignored (`nohup`) or has a handler is left alone."""

Phase = Literal["now", "step", "hold"]
"""now: the main thread is interrupted at once. step: it may go on, until the time is over. hold: it may go on."""

TOGETHER_SECONDS = 0.3
"""Signals that come within this time count as one: a terminal signals the whole group, and a launcher passes it on."""
UNWIND_SECONDS = 5.0
"""Time for an interrupted main thread to notice it. Afterwards the process ends without it."""
_END = 0


class Stopped(KeyboardInterrupt):
    """A signal ended the command. Code that handles Ctrl-C handles it too. `note`: what is left of the work."""

    def __init__(self, signum: int, note: str = "") -> None:
        super().__init__(signum, note)
        self.signum, self.note = signum, note

    @property
    def name(self) -> str:
        return name_of(self.signum)

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


def name_of(signum: int) -> str:
    """How messages call a signal."""
    return "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name


class Stop:
    """The state of the one command of this process: whether a signal came, and what it may interrupt.

    `clock` is that of the time limits.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._watched = False
        self._reset()

    def _reset(self) -> None:
        self.requested: int | None = None
        """The signal that came, if one did."""
        self.at_once = False
        """A second signal came: nothing is finished any more."""
        self.out_of_time = False
        """The step did not end in time and was interrupted."""
        self.phase: Phase = "now"
        self.grace, self.reserve = 0.0, 0.0
        """Seconds from the signal to the end of the process, and those of them that saving needs."""
        self._since, self._quiet_until = 0.0, 0.0
        self._interrupted, self._over = False, False
        self._ends_process = True

    # -- for the main thread --------------------------------------------------------------------------------

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """The phase of the block. A caller that leaves the last block looks at `requested` afterwards."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def seconds_left(self) -> float:
        """Seconds that a step may still take after a signal; saving comes after them."""
        return self._since + self.grace - self.reserve - self._clock()

    def give_up_unless(self, seconds: float) -> None:
        """Raises Stopped if a signal came and fewer than these seconds are left."""
        if self.requested is not None and self.seconds_left() < seconds:
            self.out_of_time = True
            raise Stopped(self.requested)

    @contextmanager
    def watch(self, *, ends_process: bool = True) -> Iterator[None]:
        """Handle the signals within the block. Does nothing within another such block and outside the main thread.

        `ends_process` False: a main thread that does not answer is waited for, since a notebook would be lost with it.
        """
        if self._watched or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._reset()
        self._ends_process = ends_process
        taken = [s for s in SIGNALS if signal.getsignal(s) in (signal.SIG_DFL, signal.default_int_handler)]
        before = {signum: signal.signal(signum, self._on_signal) for signum in taken}
        read, write = os.pipe()
        os.set_blocking(write, False)
        other = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True)
        self._watched = True
        thread.start()
        try:
            yield
        finally:
            self._over = True
            os.write(write, bytes([_END]))
            thread.join()  # it sends no signal any more, so the handlers can go
            signal.set_wakeup_fd(other)
            for signum, handler in before.items():
                signal.signal(signum, handler)
            os.close(write)
            os.close(read)
            self._watched = False
            self._reset()  # a program that runs another job is not stopped again

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Runs in the main thread, after a signal of the user's and after those of `_interrupt`."""
        if self.requested is not None and not self._over and self._may_interrupt():
            self._interrupted = True
            raise Stopped(self.requested)

    def _may_interrupt(self) -> bool:
        due = self.phase == "now" or (self.phase == "step" and self.out_of_time)
        return self.at_once or (due and not self._interrupted)

    # -- for the thread -------------------------------------------------------------------------------------

    def _listen(self, pipe: int) -> None:
        signum = self._read(pipe, None)
        if signum is None or signum == _END:
            return
        self._since, self._quiet_until = self._clock(), self._clock() + TOGETHER_SECONDS
        self.requested = signum  # before the phase is read: the main thread writes that first and reads this afterwards
        due: float | None
        sent = self.phase == "now"
        if sent:
            due = self._interrupt(signum)
        else:
            tell(
                f"{name_of(signum)}: the run ends its step, saves it and stops, within {self.grace:g} s. A second "
                "signal stops it at once."
            )
            due = self._since + self.grace - self.reserve
        while (found := self._read(pipe, due)) != _END:
            if found is not None:
                self.at_once = sent = True
                due = self._interrupt(signum)
            elif sent and self._may_interrupt() and self._ends_process:
                tell(f"{name_of(signum)}: the process does not answer and is ended.")
                os._exit(128 + signum)
            elif self.phase == "step" and not self.out_of_time:
                self.out_of_time = sent = True
                due = self._interrupt(signum)
            else:
                due = None

    def _interrupt(self, signum: int) -> float:
        """Run `_on_signal` in the main thread, also if it waits for something. Returns when it has to be done."""
        self._quiet_until = self._clock() + TOGETHER_SECONDS
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
        return self._clock() + UNWIND_SECONDS

    def _read(self, pipe: int, due: float | None) -> int | None:
        """The next signal, or _END when the block ends, or None at the time `due`."""
        while True:
            patience = None if due is None else max(0.0, due - self._clock())
            if not select.select([pipe], [], [], patience)[0]:
                return None
            (signum,) = os.read(pipe, 1)
            if signum == _END or (signum in SIGNALS and self._clock() >= self._quiet_until):
                return signum


def tell(text: str) -> None:
    """Print on standard error, which may be a terminal that is gone."""
    with suppress(OSError, ValueError):
        print(f"\n{text}", file=sys.stderr, flush=True)


STOP = Stop()
"""The one of this process."""
