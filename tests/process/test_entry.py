"""Exit codes and messages of a command."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steepest.errors import ConfigError, DeviceError
from steepest.process.entry import describe, guarded, primitive_defaults, run_entry, waiting_defaults


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
    assert long[0] == "error: 50 problems:" and long[-1] == "  and 30 more; fix these first."


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


BOTH, SLEEP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}, {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("schedstat", "given", "set_by_us"),
    [
        ("81523 45210 31\n", {}, BOTH),
        ("81523 45210 31\n", {"OMP_NUM_THREADS": "2"}, BOTH),
        ("0 0 0\n", {}, SLEEP),  # a kernel that does not count
        ("", {}, SLEEP),
        ("off\n", {}, SLEEP),
        (None, {}, SLEEP),  # another system
        ("81523 45210 31\n", {"OMP_WAIT_POLICY": "ACTIVE"}, {}),
        ("81523 45210 31\n", {"OMP_WAIT_POLICY": ""}, {}),
        ("81523 45210 31\n", {"GOMP_SPINCOUNT": "5"}, {}),
        (None, {"GOMP_SPINCOUNT": "5"}, {}),
        (None, BOTH, {}),
    ],
)
def test_how_threads_wait_is_set_where_the_user_did_not(
    schedstat: str | None, given: dict[str, str], set_by_us: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "schedstat"
    if schedstat is not None:
        file.write_text(schedstat)
    assert waiting_defaults(given, file) == set_by_us


@pytest.mark.parametrize(
    ("first", "given", "found"),
    [
        ("", {}, None),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("", {"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ("import torch; ", {}, {}),  # too late to be read
    ],
)
def test_a_command_has_it_in_its_environment(first: str, given: dict[str, str], found: dict[str, str] | None) -> None:
    code = f"{first}import steepest.process.entry, os, json; print(json.dumps([os.environ.get(n) for n in {[*BOTH]}]))"
    env = {name: value for name, value in os.environ.items() if name not in BOTH} | given
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    want = waiting_defaults({}) if found is None else found
    assert json.loads(done.stdout) == [want.get(name) for name in BOTH]


ONEDNN, LAYER = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"


@pytest.mark.parametrize(
    ("given", "set_by_us"),
    [
        ({}, {ONEDNN: "128", LAYER: "128"}),
        ({"ONEDNN_VERBOSE": "1"}, {ONEDNN: "128", LAYER: "128"}),
        ({ONEDNN: "1024"}, {LAYER: "128"}),
        ({"DNNL_PRIMITIVE_CACHE_CAPACITY": "0"}, {LAYER: "128"}),  # oneDNN's older name for the same
        ({LAYER: "5"}, {ONEDNN: "128"}),
        ({ONEDNN: "", LAYER: "5"}, {}),
    ],
)
def test_what_onednn_keeps_is_bounded_where_the_user_did_not(given: dict[str, str], set_by_us: dict[str, str]) -> None:
    assert primitive_defaults(given) == set_by_us


_PRODUCTS = """
import steepest.process.entry
import torch
x, weight = torch.randn(100, 32), torch.ops.mkldnn._reorder_linear_weight(torch.randn(48, 32), 64)
for last in (100, 100, 40, 40):
    for rows in range(1, last + 1):
        torch.ops.mkldnn._linear_pointwise(x[:rows].clone(), weight, None, "none", [], "")
"""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(
    ("capacity", "made", "kept"),
    [(None, 240, 40), ("1024", 100, 180)],  # a product is two operations, so 128 are those of 64 shapes
)
def test_shapes_that_repeat_stay_and_others_go(capacity: str | None, made: int, kept: int) -> None:
    env = {name: value for name, value in os.environ.items() if name not in (ONEDNN, LAYER)}
    env |= {"ONEDNN_VERBOSE": "profile_create"} | ({} if capacity is None else {ONEDNN: capacity, LAYER: capacity})
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], env=env, capture_output=True, text=True, check=True)
    lines = [line.split(",") for line in done.stdout.splitlines() if ",inner_product," in line]
    assert [sum(f"create:cache_{what}" in line for line in lines) for what in ("miss", "hit")] == [made, kept]


LEAVING = """
import atexit, sys, threading
from steepest.process.entry import leave

class Large:
    def __del__(self):
        print("torn down")

large = Large()
large.itself = large
atexit.register(print, "at exit")
threading.Thread(target=lambda: print("a thread"), daemon=False).start()
print("no newline", end="")
leave(7)
"""


def test_a_command_ends_without_teardown_and_loses_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr == ""
    said = ("a thread", "at exit", "no newline")  # in any order: a text and its line end are two writes
    text = done.stdout.replace("\n", "")
    assert [text.count(one) for one in said] == [1, 1, 1] and len(text) == sum(map(len, said))


def test_commands_end_that_way(tmp_path: Path) -> None:
    """Both forms of a command; a function that is registered before Steepest is imported would run after its end."""
    first = "import atexit, sys; atexit.register(print, 'later than the end'); sys.argv = ['steepest', {}]; "
    for words, code, arguments in (
        ("from steepest.__main__ import main; main()", 0, "'--version'"),
        ("import runpy; runpy.run_module('steepest.trainer.main_sft', run_name='__main__')", 2, "'no.such.key=1'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", first.format(arguments) + words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == code and "later than the end" not in done.stdout, done.stderr


@pytest.mark.parametrize(
    "error, said",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            "error: /a/b: No space left on device. Make room, or",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a"),
            "error: /a: Permission denied. Make room, or see to",
        ),
        (
            Exception("Error: I/O error: No space (os error 28)"),
            "error: Error: I/O error: No space (os error 28). Make",
        ),
    ],
)
def test_what_the_system_refuses_is_told_without_traceback(
    capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    assert guarded(lambda: fail(error)) == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_file_that_is_missing_is_a_bug_where_nobody_has_looked_for_it() -> None:
    with pytest.raises(FileNotFoundError):
        guarded(lambda: fail(FileNotFoundError(errno.ENOENT, "No such file", "/a")))
