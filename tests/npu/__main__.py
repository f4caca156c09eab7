"""Runs the NPU's tests in processes of their own: `python -m tests.npu [arguments for pytest]`.

With torch-npu installed they run on its card, one after another. Without it they run on the stand-in
(tests/fakes/torch_npu), side by side; it is compiled first where it has not been. What cannot run is skipped, and the
reason is printed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tests.fakes import fake_npu_build

ROOT = Path(__file__).parents[2]
FAKES = ROOT / "tests" / "fakes"
EARLY = "STEEPEST_NPU_TESTS"
"""Tells conftest.py to load torch_npu first of all."""
SIDE_BY_SIDE = ("-n", "auto", "--maxprocesses", "8", "--dist", "loadfile")


def on_a_card() -> bool:
    """Whether the real package is installed."""
    spec = importlib.util.find_spec("torch_npu")
    return spec is not None and (spec.origin is None or not Path(spec.origin).is_relative_to(FAKES))


def environment() -> dict[str, str]:
    """The environment in which `import torch_npu` finds the real package, else the stand-in, compiled.

    Raises CannotBuildError or BuildFailedError where there is neither a real package nor a stand-in.
    """
    found = {"OMP_NUM_THREADS": "1", **os.environ, EARLY: "1"}
    found["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # with it, a torch-npu without CANN breaks `import torch` itself
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if not on_a_card():
        fake_npu_build.build(say=True)
        path.insert(0, str(FAKES))
    return {**found, "PYTHONPATH": os.pathsep.join(path)}


def pytest_line(arguments: list[str]) -> list[str]:
    """The command; all of tests/npu unless `arguments` name something of it."""
    line = [sys.executable, "-m", "pytest", "-m", "npu and not slow", "-rs"]
    if not any("tests/" in word for word in arguments):
        line += ["tests/npu", *(() if on_a_card() or arguments else SIDE_BY_SIDE)]
    return [*line, *arguments]


def main(arguments: list[str]) -> int:
    """pytest's exit code; 0 with the reason where nothing can run."""
    try:
        found = environment()
    except fake_npu_build.CannotBuildError as error:
        print(f"SKIPPED: all tests of tests/npu: {error}.", file=sys.stderr)
        return 0
    except fake_npu_build.BuildFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return subprocess.run(pytest_line(arguments), cwd=ROOT, env=found).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
