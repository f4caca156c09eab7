"""Exit codes and messages of a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from steepest.errors import ConfigError, DeviceError
from steepest.trainer.entry import describe, guarded, run_entry


def test_main_gets_the_arguments_and_its_code_is_the_exit_code() -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    assert run_entry(main, ("a=1", "--cfg", "job")) == 7
    assert seen == [["a=1", "--cfg", "job"]]
    assert run_entry(lambda argv: None, []) == 0


def test_without_arguments_those_of_the_process_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program", "x=1"])
    assert run_entry(lambda argv: 5 if argv == ["x=1"] else 6) == 5


def fail(error: BaseException) -> int:
    raise error


def test_an_error_of_the_user_is_told_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: fail(DeviceError("trainer.device=npu: no NPU."))) == 2
    out = capsys.readouterr()
    assert (out.out, out.err) == ("", "error: trainer.device=npu: no NPU.\n")


def test_several_problems_are_numbered_and_fit_on_a_screen() -> None:
    assert describe(ConfigError(["a", "b"])) == "error: 2 problems:\n  1. a\n  2. b"
    long = describe(ConfigError([f"problem {i}" for i in range(50)])).splitlines()
    assert len(long) == 22
    assert long[0] == "error: 50 problems:" and long[-1] == "  and 30 more; mend these first."


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(lambda: fail(KeyboardInterrupt())) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


@pytest.mark.parametrize(("no_color", "red"), [(False, True), (True, False)])
def test_red_on_a_terminal_only_when_colour_is_wanted(
    no_color: bool, red: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    guarded(lambda: fail(DeviceError("x")))
    assert capsys.readouterr().err.startswith("\033[31merror: x\033[0m") is red


def test_torch_is_kept_from_loading_a_broken_npu_plug_in() -> None:
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"


def test_waiting_threads_sleep_unless_the_user_says_otherwise() -> None:
    code = "import steepest.trainer.entry, os; print(os.environ['OMP_WAIT_POLICY'])"
    for given, want in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | (
            {"OMP_WAIT_POLICY": given} if given else {}
        )
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == want
