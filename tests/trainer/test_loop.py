"""The loop around the steps: what is saved and validated when, and what is left when something ends it early."""

from __future__ import annotations

import signal

import pytest

from steepest.errors import RewardError
from steepest.process.stopping import Stop, Stopped
from steepest.trainer.loop import Schedule, Timer, run_steps


class RecordingHooks:
    """Notes its calls; `act` is called with each."""

    def __init__(self, act=lambda call: None) -> None:
        self.calls: list[str] = []
        self.act = act
        self.examined: int | None = None  # no step yet: the start is remembered too

    def _call(self, name: str) -> None:
        self.calls.append(name)
        self.act(name)

    def before_training(self, start_step: int) -> None:
        self._call(f"before {start_step}")

    def examine(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        self.examined = step
        return {"health/looked_at": float(step)}

    def remember(self, step: int) -> None:
        assert self.examined in (None, step)  # what the checks know is part of the state
        self.remembered = step

    def save(self, step: int, metrics: dict[str, float]) -> None:
        assert self.remembered == step
        self._call(f"save {step}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._call(f"log {step}")

    def validate(self, step: int) -> None:
        self._call(f"validate {step}")


class Parts:
    """A step of two halves, "collect N" and "learn N"; `act` is called with each."""

    learning = False

    def __init__(self, act=lambda call: None) -> None:
        self.act = act

    def __call__(self, step: int) -> dict[str, float]:
        self.act(f"collect {step}")
        self.learning = True
        self.act(f"learn {step}")
        self.learning = False
        return {}


def raise_at(where: str, error: BaseException):
    def act(call: str) -> None:
        if call == where:
            raise error

    return act


def run(act=lambda call: None, *, total: int, save: int, test: int = -1, last: bool = True, start: int = 0, stop=None):
    hooks = RecordingHooks(act)
    schedule = Schedule(total, save, test, last)
    try:
        run_steps(Parts(act), Timer(), schedule, hooks, start, Stop() if stop is None else stop)
    finally:
        run.calls = hooks.calls
    return hooks.calls


def test_saving_and_validating_fall_on_their_steps_and_on_the_last():
    assert run(total=5, save=2, test=3) == [
        "before 0",
        "log 1",
        "save 2",
        "log 2",
        "log 3",
        "validate 3",
        "save 4",
        "log 4",
        "save 5",
        "log 5",
        "validate 5",
    ]


@pytest.mark.parametrize(
    ("save", "last", "saved"),
    [(-1, True, [3]), (-1, False, []), (0, True, []), (0, False, []), (2, True, [2, 3]), (2, False, [2])],
)
def test_which_steps_are_saved(save, last, saved):
    assert [call for call in run(total=3, save=save, last=last) if "save" in call] == [f"save {step}" for step in saved]


def test_a_resumed_run_starts_after_its_step():
    assert run(total=4, save=0, start=2) == ["before 2", "log 3", "log 4"]


def test_a_failing_save_still_logs_the_step_and_is_not_tried_again():
    with pytest.raises(OSError, match="save 1"):
        run(raise_at("save 1", OSError("save 1")), total=2, save=1)
    assert run.calls == ["before 0", "save 1", "log 1"]


def test_a_failing_validation_comes_after_the_save():
    with pytest.raises(OSError, match="validate 1"):
        run(raise_at("validate 1", OSError("validate 1")), total=1, save=1, test=1)
    assert run.calls == ["before 0", "save 1", "log 1", "validate 1"]


EARLY = [
    # what ends the run, saved afterwards, what is said
    ("collect 3", ["save 2"], "Step 2 is saved; the same command resumes from it."),
    ("learn 3", [], "Step 3 was cut off while the weights changed. No checkpoint was written: the same command starts again."),  # noqa: E501
    ("log 2", ["save 2"], "Step 2 is saved; the same command resumes from it."),
    ("validate 2", ["save 2"], "Step 2 is saved; the same command resumes from it."),
    ("collect 1", [], "No checkpoint was written: the same command starts again."),
]  # fmt: skip


@pytest.mark.parametrize(("where", "saved", "said"), EARLY)
def test_an_error_leaves_the_last_whole_step(where, saved, said, capsys):
    with pytest.raises(RewardError, match="broken"):
        run(raise_at(where, RewardError("broken")), total=9, save=100, test=2)
    assert [call for call in run.calls if "save" in call] == saved
    assert capsys.readouterr().out == f"the run ends early. {said}\n"


@pytest.mark.parametrize(("where", "saved", "said"), EARLY)
def test_so_does_ctrl_c_without_a_command_around_it(where, saved, said):
    with pytest.raises(KeyboardInterrupt) as caught:
        run(raise_at(where, KeyboardInterrupt()), total=9, save=100, test=2)
    assert [call for call in run.calls if "save" in call] == saved
    assert (caught.value.exit_code, caught.value.note) == (130, said)


def test_steps_after_the_last_checkpoint_are_counted_where_they_are_lost(capsys):
    with pytest.raises(RewardError):
        run(raise_at("learn 6", RewardError("broken")), total=9, save=3, start=1)
    assert "Step 6 was cut off" in (said := capsys.readouterr().out)
    assert said.endswith("Step 3 is saved; the same command resumes from it, and does 2 step(s) again.\n")


@pytest.mark.parametrize(("save", "last"), [(0, True), (-1, False)])
def test_who_wants_nothing_saved_gets_nothing_saved(save, last, capsys):
    with pytest.raises(RewardError):
        run(raise_at("collect 3", RewardError("broken")), total=9, save=save, last=last)
    assert not any("save" in call for call in run.calls)
    assert "Nothing is saved" in capsys.readouterr().out


def test_a_disk_that_takes_no_step_does_not_hide_the_first_error(capsys):
    def act(call: str) -> None:
        if call in ("log 2", "save 2"):
            raise OSError(f"full: {call}")

    with pytest.raises(OSError, match="full: log 2"):
        run(act, total=9, save=100)
    assert "Step 2 could not be saved: full: save 2 No checkpoint was written" in capsys.readouterr().out


# -- signals -------------------------------------------------------------------------------------------------


def signal_at(stop: Stop, where: str):
    """As the thread of `Stop.watch` does it; a phase in which the main thread is interrupted raises."""

    def act(call: str) -> None:
        if call == where:
            stop.requested = signal.SIGTERM
            stop._on_signal(signal.SIGTERM, None)

    return act


@pytest.mark.parametrize(
    ("where", "calls"),
    [
        ("collect 3", ["log 3", "save 3"]),  # the step ends, then it is saved
        ("learn 3", ["log 3", "save 3"]),
        ("log 3", ["log 3", "save 3"]),
        ("save 4", ["save 4", "log 4"]),  # once is enough, and its validation is left to the next start
        ("validate 2", ["validate 2", "save 2"]),  # cut off
    ],
)
def test_a_signal_waits_for_the_step_and_has_it_saved(where, calls):
    stop = Stop()
    with pytest.raises(Stopped) as caught:
        run(signal_at(stop, where), total=9, save=4, test=2, stop=stop)
    assert run.calls[-2:] == calls
    step = calls[-1].split()[1]
    assert (
        caught.value.exit_code == 143
        and caught.value.note == f"Step {step} is saved; the same command resumes from it."
    )
    assert sum("save" in call for call in run.calls) == 1


def test_a_signal_in_the_last_step_leaves_its_validation_to_the_next_start():
    stop = Stop()
    with pytest.raises(Stopped):
        run(signal_at(stop, "learn 2"), total=2, save=-1, test=2, stop=stop)
    assert run.calls == ["before 0", "log 1", "save 2", "log 2"]


def test_a_signal_when_nothing_is_left_to_do_ends_with_success():
    stop = Stop()
    assert run(signal_at(stop, "learn 2"), total=2, save=-1, stop=stop) == ["before 0", "log 1", "save 2", "log 2"]


def test_a_step_that_fails_after_a_signal_ends_as_the_signal_asks():
    stop = Stop()

    def act(call: str) -> None:
        if call == "collect 3":
            stop.requested = signal.SIGTERM
            raise RewardError("the engine is gone")  # a scheduler signals every process

    with pytest.raises(Stopped) as caught:
        run(act, total=9, save=-1, stop=stop)
    assert caught.value.note == (
        "Then the step failed: the engine is gone Step 2 is saved; the same command resumes from it."
    )


def test_a_second_signal_saves_nothing():
    stop = Stop()

    def act(call: str) -> None:
        if call == "collect 3":
            stop.requested, stop.at_once = signal.SIGTERM, True
            stop._on_signal(signal.SIGTERM, None)

    with pytest.raises(Stopped) as caught:
        run(act, total=9, save=-1, stop=stop)
    assert not any("save" in call for call in run.calls)
    assert caught.value.note == "No checkpoint was written: the same command starts again."


def test_the_time_that_saving_took_is_left_for_the_next_save():
    stop = Stop()
    stop.reserve = 0.0
    seconds = []
    timer = Timer()
    run_steps(Parts(), timer, Schedule(3, 1, -1), RecordingHooks(lambda call: seconds.append(stop.reserve)), 0, stop)
    assert seconds[0] == 0.0 and seconds == sorted(seconds) and stop.reserve > 0
