"""The loggers of other packages, each against the real package, without network. Absent packages are skipped."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import steepest
from steepest.loggers import Loggers, make_loggers, read_metrics
from steepest.loggers.outputs.mlflow import flatten

METRICS = {"actor/pg_loss": 0.25, "val-core/openai/gsm8k/acc/mean@1": 0.5, "bad": math.nan, "up": math.inf, "n": 3}
CONFIG = {"actor": {"lr": 1e-6, "n": [1, 2]}, "none": None, "empty": {}, "long": "x" * 9000}


def two_runs(name: str, folder: Path) -> None:
    """Three steps, killed after the second was saved, and the rest after a resume."""
    with started(name, folder) as loggers:
        for step in (1, 2, 3):
            loggers.log(step, METRICS)
    with started(name, folder, start_step=2) as loggers:
        for step in (3, 4):
            loggers.log(step, {**METRICS, "actor/pg_loss": 0.125})


def started(name: str, folder: Path, start_step: int = 0) -> Loggers:
    return make_loggers([name], folder, "project", "experiment", CONFIG, total_steps=4, start_step=start_step)


@pytest.fixture(autouse=True)
def no_failures_and_no_account(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> object:
    for variable in ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_URI", "TENSORBOARD_DIR"):
        monkeypatch.delenv(variable, raising=False)
    yield
    assert [str(w.message) for w in recwarn if "the logger" in str(w.message)] == []


def tensorboard_points(folder: Path, name: str) -> list[tuple[int, float]]:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    two_runs("tensorboard", tmp_path)
    points = tensorboard_points(tmp_path / "tensorboard", "actor/pg_loss")
    assert points == [(1, 0.25), (2, 0.25), (3, 0.125), (4, 0.125)]  # the superseded step 3 is gone
    assert math.isnan(tensorboard_points(tmp_path / "tensorboard", "bad")[0][1])


def test_tensorboard_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "elsewhere"))
    with started("tensorboard", tmp_path) as loggers:
        loggers.log(1, METRICS)
    assert tensorboard_points(tmp_path / "elsewhere", "n") == [(1, 3.0)]
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    two_runs("wandb", tmp_path)
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2  # one run, continued
    assert b"actor/pg_loss" in files[0].read_bytes()


def test_mlflow_database(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    two_runs("mlflow", tmp_path)
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("project")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "experiment" and run.info.status == "FINISHED"
    assert run.data.params["actor.lr"] == "1e-06" and run.data.params["actor.n"] == "[1, 2]"
    history = client.get_metric_history(run.info.run_id, "actor/pg_loss")
    assert sorted({(point.step, point.value) for point in history}) == [
        (1, 0.25),
        (2, 0.25),
        (3, 0.125),
        (3, 0.25),
        (4, 0.125),
    ]
    assert client.get_metric_history(run.info.run_id, "val-core/openai/gsm8k/acc/mean_at_1")[0].value == 0.5


def test_swanlab_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    two_runs("swanlab", tmp_path)
    run_id = (tmp_path / "swanlab_run_id.txt").read_text().strip()
    files = sorted(tmp_path.glob("swanlab/run-*/*.swanlab"))
    assert [file.name for file in files] == [f"run-{run_id}.swanlab"] * 2
    assert b"actor/pg_loss" in files[0].read_bytes()


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_without_an_account_the_run_stops_with_the_remedy(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    code = (
        "from steepest.errors import ConfigError\n"
        "from steepest.loggers import make_loggers\n"
        f"try: make_loggers(['{name}'], '.', 'p', 'e', {{}})\n"
        "except ConfigError as error: print(error)\n"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "SWANLAB_"))}
    environment = {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(Path(steepest.__file__).parents[1])}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert f"Run `{name} login` or set {name.upper()}_MODE=offline, or take {name} out of logger" in done.stdout


def test_jsonl_has_the_same_values_beside_a_service(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    two_runs("tensorboard", tmp_path)
    assert {s: row["actor/pg_loss"] for s, row in read_metrics(tmp_path / "metrics.jsonl").items()} == {
        1: 0.25, 2: 0.25, 3: 0.125, 4: 0.125,
    }  # fmt: skip


def test_a_nested_configuration_becomes_dotted_parameters() -> None:
    assert list(flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None})) == [
        ("a.b", "1"), ("a.c.d", "[2]"), ("e", "{}"), ("f", "None"),
    ]  # fmt: skip
