"""`steepest.train`: rows and functions of the program itself, and the run as an object."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import steepest
from steepest.errors import CheckpointError, ConfigError, DataError, RewardError
from tests.support.toy_run import make_toy

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"say {i % 10}", "answer": str(i % 10), "level": i % 3} for i in range(64)]
SETTINGS = {
    "data.train_batch_size": 16,
    "data.max_prompt_length": 16,
    "data.max_response_length": 1,
    "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
    "actor_rollout_ref.actor.fsdp_config.dtype": "float32",
    "actor_rollout_ref.rollout.n": 2,
    "trainer.logger": "jsonl",
    "trainer.device": "cpu",
    "trainer.test_freq": 1,
    "trainer.log_val_generations": 3,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A run of two steps, and what its two rewards were called with."""
    calls: dict[str, list] = {"digit": [], "brief": []}

    def digit(solution_str, ground_truth, extra_info):
        calls["digit"].append(extra_info["level"])
        return {"score": float(solution_str.strip() == ground_truth), "seen": 1}

    def brief(completions, level, **columns):
        calls["brief"].append((len(completions), len(level), sorted(columns)))
        return [-0.1 * len(text) for text in completions]

    folder = tmp_path_factory.mktemp("run") / "run"
    run = steepest.train(
        model=toy["model"], train=ROWS, val=ROWS[:5], reward=[digit, brief], algorithm="grpo", folder=folder,
        **SETTINGS, **{"trainer.total_training_steps": 2},
    )  # fmt: skip
    return run, calls


def test_the_functions_of_the_program_score(trained):
    run, calls = trained
    # a validation at the start and after each step, and a step's 32 responses
    assert [number for number, *_ in calls["brief"]] == [5, 32, 5, 32, 5] and len(calls["digit"]) == 79
    assert {(level, tuple(names)) for _, level, names in calls["brief"]} == {
        (number, ("answer", "data_source", "extra_info", "ground_truth", "prompts")) for number in (5, 32)
    }
    metrics = run.metrics
    assert metrics["step"].to_pylist() == [0, 1, 2]
    assert metrics["reward/digit/seen"].to_pylist()[1:] == [1.0, 1.0]
    score, digit, brief = (metrics[f"{name}"].to_pylist()[1] for name in NAMES)
    assert score == pytest.approx(digit + brief) and brief < 0


NAMES = ("critic/score/mean", "reward/digit/mean", "reward/brief/mean")


def test_the_run_has_its_samples_checkpoints_and_models(trained, toy):
    run, _ = trained
    assert run.metrics["response_length/mean"].to_pylist()[1:] == [1.0, 1.0]
    assert {row["split"] for row in run.samples()} == {"val"} and len(run.samples()) == 12
    assert len(run.samples(step=2, split="val")) == 4 and run.samples(step=1, split="train") == []
    page = run.report(run.folder / "again.html")
    assert page.stat().st_size == pytest.approx((run.folder / "report.html").stat().st_size, abs=500)
    (last,) = run.checkpoints
    assert (last.step, last.path) == (2, run.folder / "global_step_2") and run.best == last == run.checkpoint(2)
    model, start = run.model(), steepest.Checkpoint(0, run.folder, None)
    assert model.dtype == torch.float32 and start.score is None
    ids = run.tokenizer()("say 1", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], model.config.vocab_size)
    assert run.config.actor_rollout_ref.rollout.n == 2
    assert steepest.load_run(run.folder) == run
    with pytest.raises(CheckpointError, match="has no checkpoint of step 1; it has 2."):
        run.model(1)
    with pytest.raises(CheckpointError, match="is no run folder"):
        steepest.load_run(toy["model"])


def test_the_same_call_goes_on(trained, toy, capsys):
    run, _ = trained

    def digit(solution_str, ground_truth):
        return float(solution_str.strip() == ground_truth)

    def brief(completions, **columns):
        return [0.0] * len(completions)

    again = steepest.train(
        model=toy["model"], train=ROWS, val=ROWS[:5], reward=[digit, brief], algorithm="grpo", folder=run.folder,
        **SETTINGS, **{"trainer.total_training_steps": 3},
    )  # fmt: skip
    assert again == run and again.metrics["step"].to_pylist() == [0, 1, 2, 3]
    said = capsys.readouterr().out
    assert "resuming from step 2" in said
    assert "warning: inputs of this run are not those of its last start: python:digit: " in said
    assert len(list(run.folder.with_name("run.data").iterdir())) == 2  # the rows are the same, and so are the files


def start(toy, tmp_path, **more):
    arguments = {"model": toy["model"], "train": ROWS, "folder": tmp_path / "run", **more}
    settings = {**SETTINGS, "trainer.test_freq": -1, "trainer.total_training_steps": 1, "trainer.save_freq": 0}
    return steepest.train(**{**settings, **arguments})


def test_errors_are_those_of_the_command(toy, tmp_path):
    def unfilled(completions, price):
        return [0.0]

    def fails(solution_str):
        raise ZeroDivisionError("no luck")

    def short(completions):
        return [1.0]

    with pytest.raises(
        DataError, match="reward unfilled: nothing fills its parameter price. .*every row has: answer, level."
    ):
        start(toy, tmp_path, reward=unfilled)
    with pytest.raises(ConfigError, match=r"python:reward: it cannot be called \(nothing fills its parameter text\)"):
        start(toy, tmp_path, reward=lambda text: 0.0)
    with pytest.raises(RewardError, match=r"32 of 32 samples failed.*ZeroDivisionError: no luck \(test_train"):
        start(toy, tmp_path, reward=fails, val=None)
    with pytest.raises(RewardError, match="returned 1 numbers for 32 completions"):
        start(toy, tmp_path, reward=short)
    with pytest.raises(ConfigError, match=r"data.train_files: the data are the arguments train and val"):
        start(toy, tmp_path, **{"data.train_files": "a.jsonl"})
    with pytest.raises(ConfigError, match="trainer.total_steps: no such key.*total_training_steps"):
        start(toy, tmp_path, **{"trainer.total_steps": 3})
    with pytest.raises(ConfigError, match="no file .*grpoo.yaml.*grpo"):
        start(toy, tmp_path, algorithm="grpoo")
    with pytest.raises(ConfigError, match="trainer.test_freq=1: there are no rows to validate on. Give val, or"):
        start(toy, tmp_path, **{"trainer.test_freq": 1})
    with pytest.raises(ConfigError, match="two are called fails"):
        start(toy, tmp_path, reward=[fails, fails])


def test_the_command_says_that_a_function_of_a_program_is_missing(trained):
    from steepest.config.load import load_config
    from steepest.trainer.jobs.ppo import run_ppo

    run, _ = trained
    with pytest.raises(ConfigError, match="python:digit: this stands for a function that a Python program passed"):
        run_ppo(load_config(["--config", str(run.folder / "config.yaml")]))


def test_an_async_function_scores_too(toy, tmp_path):
    async def digit(solution_str, ground_truth):
        return float(solution_str.strip() == ground_truth)

    found = start(toy, tmp_path, reward=digit).metrics
    assert 0 <= found["critic/score/mean"][0].as_py() <= 1


def test_the_example_of_the_page_runs(toy, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    example, look = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)[:2]
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(toy["model"])), scope)
    assert scope["run"].metrics["step"].to_pylist() == [0, 1, 2]
    exec(look, scope)
    assert scope["best"].score is not None and scope["answer"]


PROGRAM = """
import os, signal
import steepest

def last(solution_str, ground_truth):
    global calls
    calls += 1
    if calls == 100:
        os.kill(os.getpid(), signal.SIGINT)  # within a step
    return float(solution_str.strip() == ground_truth)

calls = 0
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    steepest.train(model={model!r}, train={rows!r}, reward=last, folder={folder!r}, **{settings!r})
except KeyboardInterrupt:
    print("the program has it", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_continues(toy, tmp_path):
    folder = str(tmp_path / "run")
    settings = {**SETTINGS, "trainer.test_freq": -1, "trainer.total_training_steps": 6, "trainer.save_freq": 100}
    code = PROGRAM.format(model=str(toy["model"]), rows=ROWS, folder=folder, settings=settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "the program has it True" in done.stdout, done.stderr
    assert "Stopped by Ctrl-C." in done.stderr
    run = steepest.load_run(folder)
    assert [one.step for one in run.checkpoints] == [4]  # 32 responses a step: the signal came in the fourth
    again = steepest.train(model=toy["model"], train=ROWS, reward=lambda solution_str: 0.5, folder=folder, **settings)
    assert again.metrics["step"].to_pylist() == [1, 2, 3, 4, 5, 6]


def test_importing_the_package_loads_nothing_else():
    heavy = ["torch", "transformers", "pyarrow", "omegaconf", "numpy"]
    code = f"import sys, steepest; print([n for n in {heavy} if n in sys.modules]); steepest.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    assert "has no attribute 'nothing'; it has Checkpoint, Run, load_run, train" in done.stderr
