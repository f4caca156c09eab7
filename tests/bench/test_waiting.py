"""What waiting threads do in each benchmark's process: peers spin for a moment, our trainer sees for itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import SPINNING, threads
from bench.inputs import Inputs
from bench.measure import run_measured

ROOT = Path(__file__).parents[2]


def python(code: str, given: dict[str, str]) -> dict[str, str | None]:
    """The two variables as `code` prints them, started with `given` of them."""
    env = {name: value for name, value in os.environ.items() if name not in SPINNING} | {"PYTHONPATH": str(ROOT)}
    show = f"; import json, os; print(json.dumps([os.environ.get(name) for name in {[*SPINNING]}]))"
    words = [sys.executable, "-c", code + show]
    done = subprocess.run(words, env=env | given, cwd=ROOT, capture_output=True, text=True, check=True)
    return {name: value for name, value in zip(SPINNING, json.loads(done.stdout), strict=True) if value is not None}


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}])
def test_a_benchmarks_own_threads_spin_unless_told_otherwise(given: dict[str, str]):
    assert python("import bench", {}) == SPINNING
    assert python("import bench", given) == given
    left = "import bench.overhead; bench.overhead.as_started()"
    assert (python(left, {}), python(left, given)) == ({}, given)


def test_peers_spin_and_our_trainer_is_left_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in SPINNING.items():
        monkeypatch.setenv(name, value)
    inputs = Inputs(tmp_path, tmp_path, tmp_path, 3, "float32", True, 1, 1)
    assert inputs.env.items() >= {**SPINNING, "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3"}.items()
    names = [*SPINNING, "OMP_NUM_THREADS"]
    code = f"import os; print([os.environ.get(name) for name in {names}])"
    for environment, want in ((inputs.env, ["PASSIVE", "20000", "3"]), (inputs.own_env, [None, None, "3"])):
        assert run_measured([sys.executable, "-c", code], log=tmp_path / "log", env=environment).returncode == 0
        assert (tmp_path / "log").read_text() == f"{want}\n"


def test_three_ways_to_wait_are_compared():
    made = [threads.environment(2, policy, {"HOME": "/h", **SPINNING}) for policy in threads.WAYS.values()]
    assert made == [
        {"HOME": "/h", "OMP_NUM_THREADS": "2", **more}
        for more in ({}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"})
    ]
