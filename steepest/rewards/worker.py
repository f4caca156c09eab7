"""The child side of the pool: `python -m steepest.rewards.worker WIRE_FD LIFELINE_FD PARENT_PID`. Only the pool starts
it.

Wire, parent to child: one `Setup`, then lists of pickled `RewardRequest`s, without what only the parent needs.
Wire, child to parent: JSON, so that the parent never unpickles what a scoring process wrote:
    ["ready", {data_source: [modes]}, [own functions]] or ["refused", [problems]]      once
    ["begun"]                                                         a list has arrived, its first sample starts;
                                                                      again when its preparations are over
    ["preparing"]                                                     a sample waits for them, up to the next "begun"
    ["scored", score, parts, scores] or ["failed", "TypeName: message (file:line)"]
                                                                      once a sample, in order; the next one starts

Standard output is not used: output of reward functions goes to standard error.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from steepest.errors import ConfigError, setting
from steepest.process.stopping import SIGNALS
from steepest.process.streams import protect_streams
from steepest.registry import PACKAGE, Entry, load_file, load_module, nearest
from steepest.rewards.api import REWARDS, RewardRequest, RewardResult, data_source_names, read_outcome
from steepest.rewards.process import Setup
from steepest.rewards.signatures import OURS, definitions, read_signature
from steepest.rewards.weighted import BY_DATA_SOURCE, BoundFunction, bind, preparations, prepare_once, score_one

_MAX_MESSAGE = 500
_PATH, _NAME = setting("custom_reward_path"), setting("custom_reward_name")


class Scorer:
    """The reward functions of one worker, looked up once."""

    def __init__(self, setup: Setup) -> None:
        self._custom = load_custom(*setup.custom, setup.custom_kwargs) if setup.custom else None
        self._functions = bind(setup.functions) if setup.functions else BY_DATA_SOURCE
        self._mode = setup.mode
        self._loop: asyncio.AbstractEventLoop | None = None
        self._source = ""  # file of the function that is running
        self._prepared: set[Callable[[], None]] = set()

    def score(self, payload: bytes, announce: Callable[[str], None]) -> list[Any]:
        """The message about one sample. Any exception of the function, also SystemExit, becomes a "failed" message.

        `announce` gets "preparing" before and "begun" after a preparation, if there is one: the sample's time starts
        then.
        """
        self._source = ""
        try:
            request: RewardRequest = pickle.loads(payload)
            self._prepare(request.data_source, announce)
            result = self._by_custom(request) if self._custom else self._by_functions(request)
        except BaseException as error:
            return ["failed", describe(error, self._source)]
        return ["scored", result.score, result.parts, result.scores]

    def _prepare(self, data_source: str, announce: Callable[[str], None]) -> None:
        wanted = [] if self._custom else preparations(self._functions, data_source)
        new = [prepare for prepare in wanted if prepare not in self._prepared]
        if not new:
            return
        announce("preparing")
        for prepare in new:
            prepare_once(prepare)
            self._prepared.add(prepare)
        announce("begun")

    def _by_custom(self, request: RewardRequest) -> RewardResult:
        custom = self._custom
        assert custom is not None and custom.entry is not None
        value = self._call(custom.entry.value, custom.keywords(custom.entry, request, self._mode))
        return RewardResult(*read_outcome(custom.outcome(value)))

    def own_functions(self) -> list[dict[str, Any]]:
        """How each function of the user's own is called, and the columns that it cannot do without."""
        every = [self._custom] if self._custom else self._functions
        return [
            {"label": one.label, "how": one.signature.describe(one.label), "columns": list(one.signature.columns)}
            for one in every
            if one.signature is not None
        ]

    def _by_functions(self, request: RewardRequest) -> RewardResult:
        return score_one(self._functions, request, mode=self._mode, call=self._call)

    def _call(self, function: Callable[..., Any], keywords: dict[str, Any]) -> Any:
        self._source = source_file(function)
        outcome = function(**keywords)
        return self._run(outcome) if inspect.isawaitable(outcome) else outcome

    def _run(self, outcome: Any) -> Any:
        # One loop for the life of the worker: clients that users keep between calls are bound to their loop,
        # so asyncio.run, which closes the loop, would break the second call.
        async def wait() -> Any:
            return await outcome

        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        return self._loop.run_until_complete(wait())


def load_custom(path: str, name: str, kwargs: Mapping[str, Any] | None = None) -> BoundFunction:
    """Import the user's function and see how it is called, with `kwargs` as further keywords. Raises ConfigError."""
    is_module = path.startswith(PACKAGE)
    if not is_module:
        sys.path.append(str(Path(path).parent))  # for helper modules in the same folder
    try:
        module = load_module(path, _PATH) if is_module else load_file(path, _PATH)
    except ConfigError:
        raise
    except BaseException as error:
        raise ConfigError(f"{_PATH}={path!r}: importing it raised {describe(error, path)}") from error
    function = getattr(module, name, None)
    if function is None:
        guess = nearest(name, vars(module))
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{_NAME}={name!r}: {path} defines no such function.{hint}")
    if not callable(function):
        raise ConfigError(f"{_NAME}={name!r}: in {path} this is {type(function).__name__}, not a function.")
    options = dict(kwargs or {})
    try:
        signature = read_signature(function, options)
    except TypeError as error:
        given = f" and {setting('custom_reward_kwargs')}={options}" if options else ""
        raise ConfigError(
            f"{_NAME}={name!r}: {name}{inspect.signature(function)} in {path} cannot be called with the keywords "
            f"{', '.join(OURS)}{given} ({error}). {definitions(name)}."
        ) from error
    return BoundFunction(name, 1.0, Entry(name, function), options, signature)


def describe(error: BaseException, source: str) -> str:
    """`TypeName: message (file:line)` on one line. The place is the innermost frame in `source`, else the innermost
    frame."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "(its message cannot be shown)"
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + "..."
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    lines = [line for line in lines if line[0] == source] or [line for line in lines if line[0] != __file__]
    place = f" ({Path(lines[-1][0]).name}:{lines[-1][1]})" if lines else ""
    return f"{type(error).__name__}: {message}{place}" if message else f"{type(error).__name__}{place}"


def source_file(function: Callable[..., Any]) -> str:
    """The file that defines a function; empty for one written in C."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_filename if code else ""


def _print_to_stderr() -> None:
    with contextlib.suppress(OSError):  # the parent runs without standard error: nothing to print to
        os.dup2(2, 1)


def _end_with_parent(lifeline: int, parent: int) -> None:
    """End this process and its child processes when the parent is gone, even after kill -9.

    The parent holds the other end of `lifeline` and never writes to it. A thread waits for its end. Because no thread
    can run while a reward is stuck in C code, the kernel also sends SIGIO, which ends the process by default.
    """
    with contextlib.suppress(ImportError, AttributeError, OSError):  # not on every POSIX system
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

    poll = select.poll()
    poll.register(lifeline)

    def watch() -> None:
        # the parent's pid is checked too: a process forked by the parent may keep the pipe open
        while not poll.poll(1000) and os.getppid() == parent:
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def _outlive_signals() -> None:
    """Do nothing on the signals that stop the trainer: it ends its step first, and then this process.

    A scheduler sends them to every process of a job. They are not ignored, which programs that a reward starts would
    inherit, so that it could not terminate them.
    """
    for signum in SIGNALS:
        signal.signal(signum, _do_nothing)
    os.register_at_fork(after_in_child=lambda: [signal.signal(signum, signal.SIG_DFL) for signum in SIGNALS])


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    pass


def serve(wire: Connection) -> None:
    """Answer requests until the parent closes the wire."""

    def send(message: list[Any]) -> None:
        wire.send_bytes(json.dumps(message).encode())

    setup: Setup = wire.recv()
    setup.apply()
    try:
        scorer = Scorer(setup)
    except ConfigError as error:
        send(["refused", error.marked_problems])
        return
    sources = {name: list(REWARDS.get(name).facts.get("modes", ())) for name in data_source_names()}
    send(["ready", sources, scorer.own_functions()])
    while True:
        chunk: list[bytes] = wire.recv()
        send(["begun"])
        for payload in chunk:
            send(scorer.score(payload, lambda kind: send([kind])))


def main() -> None:
    _outlive_signals()
    wire_fd, lifeline, parent = (int(argument) for argument in sys.argv[1:4])
    for fd in (wire_fd, lifeline):
        os.set_inheritable(fd, False)  # programs that a reward starts must not hold our wire open
    _print_to_stderr()
    protect_streams()  # a reward that prints does not fail when the reader is gone
    _end_with_parent(lifeline, parent)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the wire
        serve(Connection(wire_fd))


if __name__ == "__main__":
    main()
