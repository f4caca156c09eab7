"""How the stand-in NPU is built, and what is said where it cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import fake_npu_build

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A folder without a library, and no torch_npu on the path."""
    changes = {"FAKE_NPU_BUILD_DIR": str(tmp_path / "built"), "PYTHONPATH": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return {**os.environ, **changes}


def compiler(folder: Path, code: str) -> str:
    """A program that stands where the compiler does."""
    script = folder / "compiler"
    script.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    script.chmod(0o755)
    return str(script)


def build(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, fake_npu_build.__file__]
    return subprocess.run(line, env=environment, capture_output=True, text=True)


WRITES = "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('built')"


def test_without_a_compiler_it_says_so_and_what_to_install(environment: dict[str, str]) -> None:
    done = build({**environment, "CXX": "no-such-compiler"})
    assert done.returncode == fake_npu_build.EXIT_CANNOT
    assert "no C++ compiler (no-such-compiler) is on the PATH; install one" in done.stderr
    assert not Path(environment["FAKE_NPU_BUILD_DIR"]).exists()


def test_the_runner_of_the_tests_skips_them_with_that_reason(environment: dict[str, str]) -> None:
    line = [sys.executable, "-m", "tests.npu"]
    env = {**environment, "CXX": "no-such-compiler"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    if "no-such-compiler" not in done.stderr:
        pytest.skip("torch-npu is installed, so nothing is compiled")
    assert done.returncode == 0 and done.stdout == ""
    assert done.stderr.startswith("SKIPPED: all tests of tests/npu: no C++ compiler")


def test_a_failed_compilation_is_an_error_with_the_compilers_words(environment: dict[str, str], tmp_path: Path) -> None:
    done = build({**environment, "CXX": compiler(tmp_path, "sys.exit('device.cpp:1: error: no such header')")})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "does not compile (device.cpp) against torch" in done.stderr and "error: no such header" in done.stderr
    assert list(Path(environment["FAKE_NPU_BUILD_DIR"]).iterdir()) == []


def test_it_is_compiled_once_and_a_killed_build_is_in_nobodys_way(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(environment["FAKE_NPU_BUILD_DIR"])
    killed = folder / "fake-npu-building-x" / "fake-npu-0"
    killed.mkdir(parents=True)
    (killed / "fake_npu_c.so").write_text("half")
    cxx = compiler(tmp_path, f"{WRITES}\nopen({str(tmp_path / 'calls')!r}, 'a').write('x')")
    for _ in range(2):
        done = build({**environment, "CXX": cxx})
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text() == "xxx"  # two sources and a link, once
    monkeypatch.setenv("FAKE_NPU_BUILD_DIR", str(folder))
    assert done.stdout.strip() == str(fake_npu_build.library()) and fake_npu_build.library().read_text() == "built"


def test_another_source_is_another_library(tmp_path: Path) -> None:
    changed = tmp_path / "device.cpp"
    changed.write_text(fake_npu_build.SOURCES[0].read_text() + "\n")
    sources = (changed, *fake_npu_build.SOURCES[1:])
    assert fake_npu_build.library(sources) != fake_npu_build.library()


def test_importing_it_uncompiled_compiles_nothing_and_says_how_to(environment: dict[str, str]) -> None:
    env = {**environment, "PYTHONPATH": str(ROOT / "tests" / "fakes")}
    done = subprocess.run([sys.executable, "-c", "import torch_npu"], env=env, capture_output=True, text=True)
    assert f"ImportError: the stand-in NPU is not compiled for this torch and Python; run {fake_npu_build.COMMAND}" in (
        done.stderr
    )
    assert not Path(environment["FAKE_NPU_BUILD_DIR"]).exists()
