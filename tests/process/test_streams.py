"""What a command prints cannot end it: a reader that is gone, a full disk, a closed descriptor, a small encoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOB = """
import sys, warnings
from pathlib import Path
from steepest.process.entry import run_entry

def main(argv):
    for number in range(3000):
        print("step", number, "\\u7b54\\u6848 \\udc80", flush=number % 2 == 0)
        print("error", number, file=sys.stderr)
    warnings.warn("the end")
    kept = open(argv[0] + ".log", "w")  # gets a number that is no stream's
    Path(argv[0]).write_text(f"done {kept.fileno() > 2}")
    return 7

sys.exit(run_entry(main))
"""


def run(tmp_path: Path, shell: str, **more: str) -> tuple[int, str]:
    """Exit code of the job, started by `shell` with JOB in it, and what it left in its file."""
    job, end = tmp_path / "job.py", tmp_path / "end"
    job.write_text(JOB)
    command = shell.replace("JOB", f"{sys.executable} {job} {end}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, check=False)
    assert b"Traceback" not in done.stderr + done.stdout, done.stderr.decode()
    return done.returncode, end.read_text() if end.exists() else ""


@pytest.mark.parametrize(
    "shell",
    [
        "JOB | head -n 2 > /dev/null; exit ${PIPESTATUS[0]}",
        "JOB 2>&1 >/dev/null | head -n 2; exit ${PIPESTATUS[0]}",
        "JOB > /dev/full",
        "JOB > /dev/full 2> /dev/full",
        "JOB >&-",
        "JOB 2>&-",
        "JOB <&- >&- 2>&-",
        "PYTHONIOENCODING=ascii JOB",
        "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 JOB",
        "PYTHONUNBUFFERED=1 JOB | true; exit ${PIPESTATUS[0]}",
    ],
)
def test_a_job_goes_on_to_its_end(tmp_path: Path, shell: str) -> None:
    assert run(tmp_path, shell) == (7, "done True")


def test_a_character_that_the_encoding_does_not_have_is_escaped(tmp_path: Path) -> None:
    assert run(tmp_path, f"PYTHONIOENCODING=ascii JOB > {tmp_path}/out 2>/dev/null") == (7, "done True")
    assert (tmp_path / "out").read_text().startswith("step 0 \\u7b54\\u6848 \\udc80\nstep 1 ")
    assert run(tmp_path, f"PYTHONIOENCODING=utf-8 JOB > {tmp_path}/out 2>/dev/null") == (7, "done True")
    assert (tmp_path / "out").read_text().startswith("step 0 \u7b54\u6848 \\udc80\nstep 1 ")


@pytest.mark.parametrize(
    "command", ["--help | true; exit ${PIPESTATUS[0]}", "ppo --cfg job > /dev/full", "rewards check gsm8k >&-"]
)
def test_the_commands(command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = ["bash", "-c", f"{sys.executable} -m steepest {command}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
