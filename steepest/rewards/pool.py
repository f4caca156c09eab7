"""Scores responses in worker processes, with a time limit per sample, and counts every failure."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from steepest.config.sections.reward import GRADER, WeightedFunction
from steepest.errors import ConfigError, DataError, RewardError, setting
from steepest.process.cores import usable_cores
from steepest.process.patience import waiting_for
from steepest.registry import is_own_code, nearest
from steepest.rewards.api import RewardRequest, RewardResult, match_name
from steepest.rewards.process import Setup, WorkerProcess, end_all
from steepest.rewards.signatures import missing_columns

_LOG = logging.getLogger("steepest.rewards")
_RATE, _TIMEOUT = setting("max_error_rate", "reward"), setting("timeout_s", "reward")
_MODE, _CUSTOM = setting("mode", "reward"), setting("custom_reward_path")
_MAX_CHUNK = 32
_MAX_WORKERS = 8
_WORKERS_A_CORE = 16  # more only wait for one another; each takes about 50 MB and a second of a core to start
_SILENT_DEATHS = 3  # after so many workers died in one call with work that they had not begun, the call fails
_HEARTBEAT_SECONDS = 0.5  # interval of checks for a dead worker whose child process keeps the wire open
_ENDING_SECONDS = 0.5  # time for a process whose wire has ended to exit, so that its own exit code is reported


class RewardPool:
    """Runs reward functions in worker processes.

    custom:         (path, name) of the user's function (`custom_reward_function.path`, `.name`); it then scores every
                    row, whatever its data_source. None: `functions`
    custom_kwargs:  further keywords of that function
    functions:      the rewards of `reward.functions` that run here; their weighted sum is the score. Empty: the reward
                    that the row's data_source chooses
    mode:           `reward.mode` of the built-in functions that have modes
    num_workers:    None: one per CPU core that this process may use, at most 8
    timeout_s:      seconds that one sample may take, counted from its own start
    max_error_rate: share of failed samples above which a `score` call raises RewardError; see `allowed_failures`
    start_seconds:  seconds a worker may take to import the user's file

    Raises ConfigError for values that cannot be used. Workers start with the first call and stay; they end with
    `close`, with the garbage collection of the pool, with the interpreter, and when this process is killed.
    May be used from any thread, by one call at a time (others wait).
    """

    def __init__(
        self,
        *,
        custom: tuple[str, str] | None = None,
        custom_kwargs: Mapping[str, Any] | None = None,
        functions: Sequence[WeightedFunction] = (),
        mode: str = "strict",
        num_workers: int | None = None,
        timeout_s: float = 10.0,
        max_error_rate: float = 0.1,
        start_seconds: float = 120.0,
    ) -> None:
        self.num_workers = min(_MAX_WORKERS, usable_cores()) if num_workers is None else num_workers
        problems = []
        if self.num_workers < 1:
            problems.append(
                f"{setting('num_workers', 'reward')}={num_workers}: at least 1 is needed, or null for one a core."
            )
        if self.num_workers > (most := _WORKERS_A_CORE * usable_cores()):
            problems.append(
                f"{setting('num_workers', 'reward')}={num_workers}: at most {most} on this machine ({_WORKERS_A_CORE} "
                f"for each of {usable_cores()} usable cores). Use less, or null for one a core."
            )
        if not timeout_s > 0:
            problems.append(f"{_TIMEOUT}={timeout_s}: a time limit in seconds above 0 is needed.")
        if not 0 <= max_error_rate <= 1:
            problems.append(f"{_RATE}={max_error_rate}: a share from 0 to 1 is needed.")
        if problems:
            raise ConfigError(problems)
        self.mode, self.timeout_s, self.max_error_rate = mode, timeout_s, max_error_rate
        self.start_seconds = start_seconds
        self.error_rate = 0.0  # share of failed samples in the last call of `score`
        self._functions = tuple(functions)
        # What takes long in a built-in grader is a text of the policy. In a function or a pattern of the user's own it
        # may be that function.
        own = [one for one in functions if is_own_code(one.name) or "pattern" in one.options]
        self._built_in = custom is None and not own
        self._custom = (str(Path(custom[0]).expanduser().resolve()), custom[1]) if custom else None
        self._custom_kwargs = dict(custom_kwargs or {})
        self._has_own_code = custom is not None or any(is_own_code(function.name) for function in functions)
        self._own: list[dict[str, Any]] = []  # how the user's functions are called, as the workers say
        self._sources: dict[str, list[str]] | None = None  # what the workers can score: data_source -> modes
        self._workers: list[WorkerProcess] = []
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._end = weakref.finalize(self, end_all, self._workers, self._owner)  # runs at exit as well

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, after a `score` call of another thread has ended. A second call does nothing."""
        with self._lock:
            self._end()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [worker.process.pid for worker in self._workers]

    def start(self) -> None:
        """Start the workers without waiting for them. Otherwise the first `check` or `score` starts them."""
        with self._lock:
            self._start_workers(self.num_workers)

    def check(self, data_sources: Iterable[str], columns: Collection[str] | None = None) -> list[str]:
        """Start the workers and check that all rows can be scored, before the run starts. `columns`: what every row
        has in its extra_info. Returns how each function of the user's own is called, one sentence each.

        Raises ConfigError when the user's function cannot be imported or called, or `reward.mode` is not one of the
        modes; DataError when a data_source has no reward, or a function has a parameter that no column fills.
        """
        what = f"the import of {_CUSTOM}={self._custom[0]}" if self._custom else "the reward workers to start"
        patience = waiting_for(f"{what}, at most {self.start_seconds:g} s")
        with self._lock, self._killing_on_error(), patience:
            self._start_workers(self.num_workers)
            while self._sources is None:
                self._read_workers(None)
        self._check_columns(columns)
        notes = [str(one["how"]) for one in self._own]
        if self._custom is not None:
            if self.mode != "strict":
                raise ConfigError(
                    f"{_MODE}={self.mode!r} has no effect with {_CUSTOM}, which scores "
                    "every row. Leave one of the two out."
                )
            return notes
        sources = sorted(set(data_sources))
        if not self._functions:
            self._check_sources(sources, self._sources)
            return notes
        others = [function.name for function in self._functions if function.name in self._sources]
        by_source = any(function.name == GRADER for function in self._functions)
        self._check_sources([*others, *(sources if by_source else [])], self._sources)
        return notes

    def _check_columns(self, columns: Collection[str] | None) -> None:
        if columns is None:
            return
        for one in self._own:
            if missing := [name for name in one["columns"] if name not in columns]:
                raise DataError(missing_columns(one["label"], missing, columns))

    def _check_sources(self, data_sources: list[str], known: dict[str, list[str]]) -> None:
        names = {source: match_name(source, known) for source in data_sources}
        unknown = [source for source, name in names.items() if name is None]
        if unknown:
            guess = nearest(unknown[0], known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise DataError(
                f"data_source {', '.join(map(repr, unknown))}: no reward of this name.{hint} Known: "
                f"{', '.join(known)}. Change the data, or set {_CUSTOM} to a file with your function."
            )
        modes = {mode for name in names.values() for mode in known[str(name)]} or {"strict"}
        if self.mode not in modes:
            guess = nearest(self.mode, modes)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ConfigError(
                f"{_MODE}={self.mode!r}: the rewards of {', '.join(data_sources)} have no such mode.{hint} "
                f"Allowed: {', '.join(sorted(modes))}."
            )

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Score every request; results come in the order of the requests.

        A sample fails when its function raises, returns no finite number, runs longer than `timeout_s` or takes the
        worker down with it. It gets score None and the reason; other samples are not affected. `error_rate` is the
        share of failures, and one warning reports them (logger "steepest.rewards"). A response on which a built-in
        grader runs longer than `timeout_s` is wrong and no failure: it scores 0 and is marked `timed_out`.

        Raises RewardError as soon as more samples have failed than `allowed_failures`, or when workers cannot run.
        """
        if os.getpid() != self._owner:
            raise RewardError("a RewardPool cannot be used in a fork of the process that made it; make one there")
        with self._lock, self._killing_on_error():
            call = _Call(requests, allowed_failures(len(requests), self.max_error_rate), self._has_own_code)
            self.error_rate = 0.0
            try:
                while call.num_left and not call.hopeless:
                    self._start_workers(sum(bool(worker.chunk) for worker in self._workers) + len(call.waiting))
                    self._hand_out(call)
                    self._read_workers(call)
            finally:
                self.error_rate = len(call.failed) / max(1, len(requests))
            if call.hopeless:
                raise RewardError(
                    f"{call.failure_text()} That is more than {_RATE}={self.max_error_rate:g} allows "
                    f"({call.allowed} of {len(requests)}), so the run ends; {call.num_left} samples were left "
                    f"unscored. Fix the reward function; or raise {_TIMEOUT} (now {self.timeout_s:g}) or "
                    f"{_RATE}."
                )
        if call.failed:
            _LOG.warning("%s These rows get no score.", call.failure_text())
        slow = [
            one.sample_id for one, result in zip(requests, call.results, strict=True) if result and result.timed_out
        ]
        if slow:
            _LOG.warning(
                "reward: %d of %d responses took more than %g s to grade and score 0. First: sample %s.",
                len(slow), len(requests), self.timeout_s, slow[0],
            )  # fmt: skip
        return [result for result in call.results if result is not None]

    @contextlib.contextmanager
    def _killing_on_error(self) -> Iterator[None]:
        """If the block ends early, also by Ctrl-C, end every worker that still works on the call."""
        try:
            yield
        except BaseException:
            busy = [worker for worker in self._workers if worker.chunk]
            self._workers[:] = [worker for worker in self._workers if not worker.chunk]
            for worker in busy:
                worker.end()
            raise

    def _start_workers(self, wanted: int) -> None:
        if not self._end.alive:
            raise RewardError("this RewardPool is closed")
        while len(self._workers) < min(wanted, self.num_workers):
            import_path = tuple(entry for entry in sys.path if isinstance(entry, str))
            python_path = os.environ.get("PYTHONPATH")
            setup = Setup(
                self._custom, self._functions, self.mode, import_path, python_path, custom_kwargs=self._custom_kwargs
            )
            self._workers.append(WorkerProcess(setup))

    def _hand_out(self, call: _Call) -> None:
        for worker in [worker for worker in self._workers if worker.idle]:
            numbers = call.take(self.num_workers)
            if not numbers:
                return
            try:
                worker.send(numbers, [call.payloads[number] for number in numbers])
            except OSError:
                worker.chunk.clear()
                call.put_back(numbers)
                self._bury(worker, call)

    def _read_workers(self, call: _Call | None) -> None:
        """Wait for messages from the workers or for the next deadline, and handle them."""
        waiting_for = [worker for worker in self._workers if worker.chunk or not worker.ready]
        nearest_deadline = min((self._deadline(worker) for worker in waiting_for), default=0.0)
        patience = min(_HEARTBEAT_SECONDS, max(0.0, nearest_deadline - time.monotonic()))
        news = wait([worker.wire for worker in waiting_for], patience)
        for worker in waiting_for:
            if worker.wire in news:
                self._read(worker, call)
            elif worker.process.poll() is not None and not worker.wire.poll():
                self._bury(worker, call)
            elif time.monotonic() > self._deadline(worker) and not worker.wire.poll():
                self._give_up(worker, call)

    def _deadline(self, worker: WorkerProcess) -> float:
        return worker.since + (self.timeout_s if worker.begun and not worker.preparing else self.start_seconds)

    def _read(self, worker: WorkerProcess, call: _Call | None) -> None:
        try:
            messages = worker.messages()
        except EOFError:
            self._bury(worker, call)
            return
        for kind, *rest in messages:
            worker.since = time.monotonic()
            if kind == "refused":
                worker.end()
                self._workers.remove(worker)
                raise ConfigError(rest[0])
            if kind == "ready":
                worker.ready, self._sources, self._own = True, rest[0], rest[1]
            elif kind in ("begun", "preparing"):
                worker.begun, worker.preparing = True, kind == "preparing"
            elif call is not None:
                call.finish(worker.chunk.popleft(), _result(kind, rest))

    def _bury(self, worker: WorkerProcess, call: _Call | None) -> None:
        """Handle a dead worker: its current sample has failed; samples that it had not begun go to other workers."""
        self._workers.remove(worker)
        how = worker.end(_ENDING_SECONDS)
        if not worker.ready:
            raise RewardError(f"a reward worker {how} before it was ready; see its message on standard error")
        if call is None or not worker.chunk:
            return
        self._take_back(worker, call, f"the worker process {how}")

    def _give_up(self, worker: WorkerProcess, call: _Call | None) -> None:
        self._workers.remove(worker)
        worker.end()
        if not worker.ready:
            what = f"{_CUSTOM}={self._custom[0]!r}: importing it" if self._custom else "a reward worker"
            raise ConfigError(f"{what} took more than {self.start_seconds:g} s to start.")
        if call is not None:
            if worker.preparing:
                self._take_back(worker, call, f"its preparation took more than {self.start_seconds:g} s")
                return
            wrong = {function.label: 0.0 for function in self._functions}
            result = RewardResult(0.0, {"acc": 0.0}, scores=wrong, timed_out=True) if self._built_in else None
            self._take_back(worker, call, f"timeout after {self.timeout_s:g} s", result)

    def _take_back(self, worker: WorkerProcess, call: _Call, why: str, result: RewardResult | None = None) -> None:
        if worker.begun:
            call.finish(worker.chunk.popleft(), result or RewardResult(None, error=why))
        else:
            call.num_silent_deaths += 1
            if call.num_silent_deaths >= _SILENT_DEATHS:
                raise RewardError(f"reward workers end before they begin to score; the last one: {why}")
        call.put_back(worker.chunk)
        worker.chunk.clear()


class _Call:
    """The state of one `score` call."""

    def __init__(self, requests: Sequence[RewardRequest], allowed: int, with_messages: bool) -> None:
        self.requests, self.allowed = requests, allowed
        self.results: list[RewardResult | None] = [None] * len(requests)
        self.num_left = len(requests)
        self.failed: list[int] = []
        self.num_silent_deaths = 0
        self.payloads: list[bytes] = []
        self.waiting: deque[int] = deque()
        for number, request in enumerate(requests):
            try:
                sent = request if with_messages else replace(request, messages=())
                self.payloads.append(pickle.dumps(sent, protocol=pickle.HIGHEST_PROTOCOL))
                self.waiting.append(number)
            except Exception as error:  # pickling runs foreign code, which may raise anything
                self.payloads.append(b"")
                text = f"{type(error).__name__}: the row cannot be sent to a worker: {error}"
                self.finish(number, RewardResult(None, error=text))

    @property
    def hopeless(self) -> bool:
        return len(self.failed) > self.allowed

    def take(self, num_workers: int) -> list[int]:
        """The next chunk of samples. Chunks get smaller towards the end, so that all workers finish at about the same
        time."""
        size = max(1, min(_MAX_CHUNK, len(self.waiting) // (2 * num_workers)))
        return [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]

    def put_back(self, numbers: Iterable[int]) -> None:
        self.waiting.extendleft(reversed(list(numbers)))

    def finish(self, number: int, result: RewardResult) -> None:
        self.results[number] = result
        self.num_left -= 1
        if result.error is not None:
            self.failed.append(number)

    def failure_text(self) -> str:
        first = min(self.failed)
        result = self.results[first]
        assert result is not None
        share = 100 * len(self.failed) / len(self.requests)
        return (
            f"reward: {len(self.failed)} of {len(self.requests)} samples failed ({share:.1f} %). "
            f"First: sample {self.requests[first].sample_id}: {result.error}."
        )


def allowed_failures(num_samples: int, max_error_rate: float) -> int:
    """How many of `num_samples` may fail: floor(max_error_rate * num_samples), with two exceptions for small calls.

    With a rate above 0 one failure is always allowed: 1 of 8 is more than 10 %, but no reason to end a run. With a rate
    below 1 it is never allowed that all samples fail.
    """
    if max_error_rate in (0, 1):
        return num_samples if max_error_rate == 1 else 0
    # the small term corrects rounding: 0.29 * 100 is 28.999999999999996
    return max(0, min(max(1, int(max_error_rate * num_samples + 1e-9)), num_samples - 1))


def _result(kind: str, rest: list[Any]) -> RewardResult:
    if kind == "scored":
        parts, scores = ({str(name): float(value) for name, value in numbers.items()} for numbers in rest[1:])
        return RewardResult(float(rest[0]), parts, scores=scores)
    return RewardResult(None, error=str(rest[0]))
