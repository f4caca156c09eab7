"""The command on this machine: its output, its form as JSON, its exit code, its imports."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from steepest import __version__
from steepest.rollout import ROLLOUT_ENGINES
from tests.doctor import documents
from tests.support.installs import ROOT, TORCH, Ran, doctor, environment

GROUPS = ["machine", "device", "versions", "engines", "extras", "hubs", "environment"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return doctor(tmp_path_factory.mktemp("home"), OMP_NUM_THREADS="1", HF_TOKEN="hf_secret")


def test_it_prints_one_json_object_of_the_documented_form(here: Ran) -> None:
    report = here.json
    assert list(report) == ["schema", "steepest", "status", "counts", "seconds", "device", "devices", "groups"]
    assert (report["schema"], report["steepest"]) == (1, __version__)
    assert [group["name"] for group in report["groups"]] == GROUPS
    lines = [line for group in report["groups"] for line in group["lines"]]
    assert all(list(line) == ["name", "status", "text", "remedy"] for line in lines)
    for status in ("ok", "warning", "problem"):
        assert report["counts"][status] == sum(line["status"] == status for line in lines)
    assert all(line["remedy"] for line in lines if line["status"] != "ok")
    for group in report["groups"]:  # a program looks a line up by its name
        names = [line["name"] for line in group["lines"]]
        assert len(set(names)) == len(names)


def test_exit_code_and_status_agree(here: Ran) -> None:
    problems = here.json["counts"]["problem"]
    assert (here.code, here.json["status"] == "problem") == ((1, True) if problems else (0, False))
    assert here.err == ""


def test_only_the_probe_imports_what_is_slow_to_import(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom steepest.doctor.command import main\nmain()\n"
        "assert not {'torch', 'transformers', 'pyarrow', 'numpy'} & set(sys.modules)"
    )
    environ = environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_prints_no_token(here: Ran) -> None:
    assert here.lines("hubs")["HF token"]["text"] == "present, from HF_TOKEN"
    assert "secret" not in here.out


def test_what_it_says_about_this_machine(here: Ran) -> None:
    lines = here.lines()
    assert lines["torch"]["text"].startswith(TORCH)
    cpu = here.json["devices"]["cpu"]
    assert cpu["available"] is True and cpu["distributed_backend"] == "gloo" and cpu["ray_resource"] == "CPU"
    assert 0 < cpu["memory_available"] < cpu["memory_total"]
    assert lines["cpu memory"]["text"].endswith(f"free of {cpu['memory_total'] / 2**30:.1f} GiB")
    extras = re.findall(r"^(\S+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    for facts in here.json["devices"].values():  # what is told to install can be installed
        assert set(re.findall(r"steepest\[(\S+)\]", facts["vllm_install"])) <= set(extras)
    assert set(here.lines("engines")) == set(ROLLOUT_ENGINES.names())
    assert next(iter(here.json["devices"])) == "cpu" and set(here.json["devices"]) >= {"cuda", "npu"}
    if util.find_spec("torch_npu") is None:
        assert here.json["device"] == "cpu"
        assert lines["npu"]["text"] == "not here: the package torch-npu is not installed"
        assert lines["choice"]["text"].startswith("cpu (trainer.device is unset: the best device present; no cuda: ")
    if (threads := lines["threads"])["status"] == "warning":  # more than one core, and one thread
        assert threads["text"].startswith("torch computes with 1 on ") and "OMP_NUM_THREADS=1" in threads["text"]


def test_the_page_shows_these_lines(here: Ran) -> None:
    page = documents.documented(documents.CPU)
    for group in ("device", "engines", "extras"):
        assert [name for name in here.lines(group) if f" {name} " not in page and here.json["device"] == "cpu"] == []
    text = documents.PAGE.read_text(encoding="utf-8")
    fields = {*here.json, *(key for facts in here.json["devices"].values() for key in facts)}
    assert [field for field in fields if f"`{field}`" not in text] == []  # the schema is described


def test_text_has_the_same_lines_and_no_colour(here: Ran, tmp_path: Path) -> None:
    ran = doctor(tmp_path, arguments=(), OMP_NUM_THREADS="1", HF_TOKEN="hf_secret", COLUMNS="100")
    assert ran.out.startswith(f"steepest {__version__} doctor\n\nmachine\n  ok       system ")
    assert "\x1b" not in ran.out and "secret" not in ran.out and ran.err == ""
    overlong = [line for line in ran.out.splitlines() if len(line) > 100]
    assert all("/" in line.split()[-1] and len(line.split()[-1]) > 50 for line in overlong)  # paths are not cut
    for name in here.lines():
        assert f" {name} " in ran.out
    assert ran.code == here.code and (ran.out.rstrip().endswith("Runs can start here.") == (ran.code == 0))
