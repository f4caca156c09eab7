"""scripts/same_numbers: which differences of two run folders it finds. No job is run."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from steepest.config.load import load_config, load_sft_config

ROOT = Path(__file__).parents[1]
MODEL, MOMENTS = Path("actor/model.safetensors"), Path("critic/optimizer.safetensors")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The script as a module. It has no extension, so the loader has to be named."""
    loader = SourceFileLoader("same_numbers", str(ROOT / "scripts" / "same_numbers"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module  # dataclasses look their module up
    loader.exec_module(module)
    yield module
    del sys.modules[loader.name]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal run folders of five steps."""
    old, new = tmp_path / "old", tmp_path / "new"
    for step in (4, 5):
        for file in (MODEL, MOMENTS):
            path = old / f"global_step_{step}" / file
            path.parent.mkdir(parents=True)
            generator = torch.Generator().manual_seed(step)
            save_file({"a": torch.randn(3, 4, generator=generator), "step": torch.tensor(float(step))}, path)
    write_rows(old, rows())
    shutil.copytree(old, new)
    return old, new


def rows() -> list[dict[str, Any]]:
    steps = [
        {"step": n, "time": 1.5, "actor/grad_norm": n / 3, "perf/total_num_tokens": 70.0, "timing_s/step": 0.1}
        for n in range(1, 6)
    ]
    return [{"step": 0, "time": 1.0, "val/accuracy": 0.25}, *steps]


def write_rows(folder: Path, found: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def compared(script: ModuleType, folders: tuple[Path, Path], **intended: str) -> Any:
    job = script.Job((), (script.Shows("actor/grad_norm"), script.Shows("actor/grad_norm", "varies")))
    return script.compare(job, *folders, {name.replace("__", "/"): why for name, why in intended.items()})


def test_equal_folders_are_the_same(script, folders):
    found = compared(script, folders)
    assert (found.differences, found.idle) == ([], [])
    assert (found.metrics, found.tensors) == (1 + 5 * 2, 4)
    assert script.report({"ppo": found, "sft": found}, {}) == (["same numbers: 2 of 2"], 0)


@pytest.mark.parametrize("file", [MODEL, MOMENTS])
def test_one_bit_of_one_tensor_is_found(script, folders, file):
    path = folders[1] / "global_step_5" / file
    tensors = load_file(path)
    before = tensors["a"].clone()
    tensors["a"].view(torch.int32)[2, 3] ^= 1
    save_file(tensors, path)
    found = compared(script, folders)
    largest = float((tensors["a"].double() - before.double()).abs().max())
    assert 0 < largest < 1e-6
    assert found.differences == [f"{file}, a: largest difference {largest:.3g}"]
    lines, code = script.report({"ppo": found, "sft": script.Comparison()}, {})
    assert (lines, code) == ([f"ppo: {file}, a: largest difference {largest:.3g}", "same numbers: 1 of 2"], 1)


def test_a_zero_of_the_other_sign_is_a_difference_and_an_equal_nan_is_none(script, folders):
    path = Path("global_step_5") / MODEL
    save_file({"a": torch.tensor([0.0, math.nan]), "b": torch.tensor(math.nan)}, folders[0] / path)
    save_file({"a": torch.tensor([-0.0, math.nan]), "b": torch.tensor(math.nan)}, folders[1] / path)
    assert [line.partition(":")[0] for line in compared(script, folders).differences] == [f"{MODEL}, a"]


def test_tensors_of_another_type_or_on_one_side_are_found(script, folders):
    path = folders[1] / "global_step_5" / MODEL
    save_file({"a": load_file(path)["a"].bfloat16(), "new": torch.zeros(2)}, path)
    assert compared(script, folders).differences == [
        f"{MODEL}, a: old torch.float32 (3, 4), new torch.bfloat16 (3, 4)",
        f"{MODEL}, new: old missing",
        f"{MODEL}, step: new missing",
    ]


def test_a_file_on_one_side_is_found(script, folders):
    (folders[1] / "global_step_5" / MOMENTS).unlink()
    assert compared(script, folders).differences == [f"{MOMENTS}: new missing"]


def test_checkpoints_of_another_step_are_not_compared(script, folders):
    shutil.rmtree(folders[1] / "global_step_5")
    assert compared(script, folders).differences == ["last checkpoint: old step 5, new step 4, expected 5"]
    shutil.rmtree(folders[0] / "global_step_5")
    assert compared(script, folders).differences == ["last checkpoint: old step 4, new step 4, expected 5"]


def test_a_checkpoint_without_tensors_is_no_equal_one(script, folders):
    for folder in folders:
        (folder / "global_step_5" / MODEL).unlink()
        (folder / "global_step_5" / MOMENTS).unlink()
    assert compared(script, folders).differences == ["last checkpoint: no safetensors file"]


@pytest.mark.parametrize(("row", "name"), [(0, "val/accuracy"), (3, "actor/grad_norm"), (5, "perf/total_num_tokens")])
def test_one_bit_of_one_metric_is_found(script, folders, row, name):
    changed = rows()
    changed[row][name] = math.nextafter(changed[row][name], 100)
    write_rows(folders[1], changed)
    old, new = rows()[row][name], changed[row][name]
    assert old != new
    assert compared(script, folders).differences == [f"step {row}, {name}: old {old}, new {new}"]


def test_clock_and_memory_are_not_compared(script, folders):
    changed = [{**row, "time": 7.0, "timing_s/step": 3.0, "perf/mfu/actor": 0.5} for row in rows()]
    changed[2] |= {"perf/throughput/gen": 1.0, "perf/max_memory_gb": 2.0, "perf/time_per_step": 9.0}
    write_rows(folders[1], changed)
    assert compared(script, folders).differences == []


def test_metrics_on_one_side_are_found(script, folders):
    changed = rows()
    del changed[2]["actor/grad_norm"]
    changed[4]["actor/clipped"] = 0.0
    write_rows(folders[1], changed)
    assert compared(script, folders).differences == [
        "step 2, actor/grad_norm: old 0.6666666666666666, new missing",
        "step 4, actor/clipped: old missing, new 0.0",
    ]


def test_a_step_written_twice_is_a_difference(script, folders):
    write_rows(folders[1], [*rows(), {"step": 5, "actor/grad_norm": 5 / 3}])
    old = 5 / 3
    assert compared(script, folders).differences == [f"step 5, actor/grad_norm: old {old}, new {old} and {old}"]


def test_values_that_are_not_finite_are_compared_by_their_names(script, folders):
    for folder, name in zip(folders, ("nan", "inf"), strict=True):
        write_rows(folder, [*rows(), {"step": 5, "actor/kl": None, "_nonfinite": {"actor/kl": name}}])
    assert compared(script, folders).differences == ["step 5, actor/kl: old nan, new inf"]


def test_intended_differences_are_printed_with_their_reason_and_count_as_same(script, folders):
    changed = [{**row, "rows/failed": 0.0, "rows/kept": 8.0} if row["step"] else row for row in rows()]
    write_rows(folders[1], changed)
    reasons = {"rows__*": "rows are counted by status", "other__*": "not used"}
    found = compared(script, folders, **reasons)
    assert (found.differences, dict(found.intended)) == ([], {"rows/*": 10})
    lines, code = script.report({"ppo": found}, {"rows/*": "rows are counted by status"})
    assert lines == ["intended: rows/*, 10 values: rows are counted by status", "same numbers: 1 of 1"]
    assert code == 0


def test_a_job_in_which_nothing_happens_is_no_proof(script, folders):
    for folder in folders:
        write_rows(folder, [{**row, "actor/grad_norm": 0.0} for row in rows()])
    found = compared(script, folders)
    assert found.idle == ["actor/grad_norm: above 0 in no step", "actor/grad_norm: varies in no step"]
    lines, code = script.report({"ppo": found}, {})
    assert lines == [f"proves nothing: ppo: {what}" for what in found.idle]
    assert code == 2


def test_long_lists_are_cut_and_counted(script):
    found = script.Comparison(differences=[f"difference {n}" for n in range(script.LISTED + 5)])
    lines, code = script.report({"ppo": found}, {})
    assert lines[-3:] == [f"ppo: difference {script.LISTED - 1}", "ppo: 5 more", "same numbers: 0 of 1"]
    assert code == 1


FAKE_RUN = """
import json, pathlib, sys, time
folder, habit = pathlib.Path(sys.argv[1]), sys.argv[2]
first = not folder.exists()
done = [int(path.name[12:]) for path in folder.glob("global_step_*")] if habit == "resumes" else []
rows = []
for step in range(1 + max(done, default=0), 6):
    (folder / f"global_step_{step}").mkdir(parents=True, exist_ok=True)
    (folder / f"global_step_{step}" / "manifest.json").write_text("{}")
    rows.append(json.dumps({"step": step}) + "\\n")
    if habit != "logs at the end" or step == 5:
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(rows)
        rows = []
    if first and step == 3 and habit != "logs at the end":
        time.sleep(600)  # until it is killed
"""


def fake_run(script: ModuleType, tmp_path: Path, habit: str) -> Path:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", FAKE_RUN, str(folder), habit]
    script.kill_and_resume(command, ROOT, folder, tmp_path / "run.log")
    return folder


def test_a_killed_run_is_started_again_and_finishes(script, tmp_path):
    folder = fake_run(script, tmp_path, "resumes")
    assert script.newest_checkpoint(folder)[0] == 5
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5], "killed after step 3, so that only steps 4 and 5 were left"


def test_a_run_that_starts_over_after_the_kill_is_an_error(script, tmp_path):
    with pytest.raises(script.RunError, match="run began from the start after it was killed, instead of resuming"):
        fake_run(script, tmp_path, "starts over")


def test_a_run_that_ends_before_the_kill_is_an_error(script, tmp_path):
    with pytest.raises(script.RunError, match="run ended before it could be killed, 3 times"):
        fake_run(script, tmp_path, "logs at the end")


def test_a_run_that_fails_is_an_error_with_its_output(script, tmp_path):
    with pytest.raises(script.RunError, match=r"ended with exit code 4\nsome words"):
        script.run([sys.executable, "-c", "print('some words'); raise SystemExit(4)"], tmp_path, tmp_path / "run.log")


def test_steepest_must_come_from_the_tree_that_runs(script, tmp_path):
    script.check_origin(ROOT, tmp_path / "right.log")
    other = tmp_path / "other" / "steepest"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    script.check_origin(tmp_path / "other", tmp_path / "other.log")
    (other / "__init__.py").write_text(f"__file__ = {str(ROOT / 'steepest' / '__init__.py')!r}")
    with pytest.raises(script.RunError, match="steepest comes from "):
        script.check_origin(tmp_path / "other", tmp_path / "wrong.log")


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_worktree_is_removed_also_after_an_error(script, tmp_path):
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    repository, beside = tmp_path / "repository", tmp_path / "beside"
    repository.mkdir()
    git("init", "--quiet")
    (repository / "file").write_text("as it was")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    (repository / "file").write_text("as it is")
    with pytest.raises(KeyError), script.checked_out("HEAD", beside, repository) as tree:
        assert (tree / "file").read_text() == "as it was"
        raise KeyError
    assert not beside.exists()
    assert len(git("worktree", "list").splitlines()) == 1
    with (
        pytest.raises(script.RunError, match="nowhere cannot be checked out"),
        script.checked_out("nowhere", beside, repository),
    ):
        pass


def test_every_job_has_a_configuration_without_warnings(script, tmp_path):
    (tmp_path / "rewards.py").write_text(script.REWARDS)
    places = {name: str(tmp_path) for name in ("inputs", "start", "model")} | {"rewards": f"{tmp_path}/rewards.py"}
    assert len(script.JOBS) == 8
    for job in script.JOBS.values():
        load = load_sft_config if job.module.endswith("main_sft") else load_config
        config = load([key.format(**places) for key in job.keys])
        assert config.provenance.warnings == ()
        assert config.trainer.total_training_steps == script.STEPS
