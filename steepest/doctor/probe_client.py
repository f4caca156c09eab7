"""Starts the probe and reads its answers, also if it crashes or hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steepest.doctor.probe import CHECKS, CHOICE, TORCH

TIME_LIMIT = 60.0
"""Time limit in seconds. On a working machine the probe takes two or three; a driver that hangs never returns."""


@dataclass
class Answers:
    """The answers of the probe: for each stage a mapping with the facts or with `error`."""

    stages: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    died: str | None = None
    """Why the probe did not finish, with the stage and its last output; None if it finished."""
    died_at: str | None = None
    """The stage in which it ended early."""

    @property
    def torch(self) -> Mapping[str, Any]:
        """`version` and `threads`, or `error`."""
        return self.stages.get(TORCH, {"error": self.died or "it was not asked"})

    @property
    def choice(self) -> Mapping[str, Any]:
        """`device` and `why`, or `error`; empty when torch cannot be imported."""
        return self.stages.get(CHOICE, {})

    @property
    def devices(self) -> dict[str, Mapping[str, Any]]:
        """Mapping from the name of a device to its facts, for each device that was asked."""
        return {
            name: stage for name, stage in self.stages.items() if name not in (TORCH, CHOICE) and CHECKS not in name
        }

    def checks(self, kind: str) -> list[Mapping[str, Any]]:
        """The checks of all devices of one kind, `versions` or `setup`."""
        return [check for name, stage in self.stages.items() if name.endswith(CHECKS) for check in stage.get(kind, ())]


class Probe:
    """Starts the probe process when it is made; `answers` waits for it."""

    def __init__(self, command: list[str] | None = None) -> None:
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "steepest.doctor.probe"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that it can be ended together with what it started
        )

    def answers(self, time_limit: float = TIME_LIMIT) -> Answers:
        """Everything that the probe printed until its end, or until the time limit, when it is killed."""
        late = False
        try:
            text, errors = self._process.communicate(timeout=time_limit)
        except subprocess.TimeoutExpired:
            late = True
            self._kill()
            text, errors = self._process.communicate()
        except KeyboardInterrupt:  # which does not reach a session of its own
            self._kill()
            raise
        answers, begun = _read(text.decode(errors="replace"))
        if late:
            answers.died = f"no answer within {time_limit:g} s"
        elif self._process.returncode:
            answers.died = _death(self._process.returncode, _last_line(errors.decode(errors="replace")))
        if answers.died is not None:
            answers.died_at = next((stage for stage in begun if stage not in answers.stages), None)
        return answers

    def _kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _read(text: str) -> tuple[Answers, list[str]]:
    answers, begun = Answers(), []
    for line in text.splitlines():
        try:
            answer = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if "begin" in answer:
            begun.append(answer["begin"])
        else:
            answers.stages[answer.pop("stage")] = answer
    return answers, begun


def _death(code: int, last_words: str) -> str:
    end = f"signal {-code}, {signal.strsignal(-code)}" if code < 0 else f"exit code {code}"
    return f"the process that asked ended with {end}" + (f" ({last_words})" if last_words else "")
