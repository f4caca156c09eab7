"""`steepest evaluate` on real runs of the toy: what it finds is what the run's own validation found."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import steepest
from steepest.__main__ import app
from steepest.config.load import load_config
from steepest.errors import CheckpointError, ConfigError
from steepest.trainer.jobs.evaluate import run_evaluation, subject_of, vote
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

VAL = "actor_rollout_ref.rollout.val_kwargs"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """Fifteen steps, the last two saved and validated; a LoRA run in the same way."""

    def made(name, *more):
        words = ["trainer.total_training_steps=15", "trainer.save_freq=14", "trainer.test_freq=14", *more]
        return run_ppo(load_config(toy_overrides(toy, tmp_path_factory.mktemp("runs") / name, *words)))

    return made


@pytest.fixture(scope="module")
def whole(run):
    return run("whole", "data.max_response_length=2")


def test_a_checkpoint_scores_as_in_its_run(whole, capsys):
    for step in (14, 15):
        folder = whole.folder / f"global_step_{step}"
        found = run_evaluation(str(folder), [])["evaluated"][str(folder)]["toy"]
        assert found["prompts"] == 40 and found["mean@1"]["value"] == pytest.approx(whole.history[step], abs=1e-9)
        assert found["mean@1"]["low"] < whole.history[step] < found["mean@1"]["high"] or whole.history[step] in (0, 1)
    before = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    run_evaluation(str(whole.folder), [])
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == before, "evaluating changed the run"


@pytest.mark.slow
def test_an_adapter_scores_as_in_its_run(run):
    done = run("lora", "actor_rollout_ref.model.lora_rank=4", "critic.share_base=head")
    found = run_evaluation(str(done.folder), [])["evaluated"][str(done.folder)]["toy"]
    assert found["mean@1"]["value"] == pytest.approx(done.history[15], abs=1e-9)


def test_two_on_the_same_prompts(whole, toy, tmp_path):
    output = tmp_path / "responses.jsonl"
    source, other = str(whole.folder), str(toy["model"])
    found = run_evaluation(source, ["data.val_max_samples=20"], other=other, samples=4, output=output)
    ours, start = (found["evaluated"][name]["toy"] for name in (source, other))
    assert list(ours) == list(start) == ["prompts", "mean@4", "pass@2", "pass@4", "maj@4"] and ours["prompts"] == 20
    pair = found["compared"]["toy"]
    want = start["mean@4"]["value"] - ours["mean@4"]["value"]
    assert pair["difference"]["value"] == pytest.approx(want) and pair["worse"] >= pair["better"]
    for path in (output, tmp_path / "responses-2.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 80 and {"prompt", "response", "score", "accuracy"} <= set(rows[0])


def test_the_command(whole):
    done = CliRunner().invoke(app, ["evaluate", str(whole.folder), "--json", "data.val_max_samples=5"])
    assert done.exit_code == 0 and json.loads(done.stdout)["evaluated"][str(whole.folder)]["toy"]["prompts"] == 5
    shown = CliRunner().invoke(app, ["evaluate", str(whole.folder), "data.val_max_samples=5"]).stdout.splitlines()
    assert shown[-3:-1] == [str(whole.folder), "  toy, 5 prompts"] and shown[-1].startswith("    mean@1    ")


def test_a_run_of_a_program_evaluates_itself(whole):
    found = steepest.load_run(whole.folder).evaluate(14, **{"data.val_max_samples": 5})
    assert found["toy"]["prompts"] == 5


def test_what_cannot_be_evaluated(toy, tmp_path):
    with pytest.raises(ConfigError, match="is a model, and no run says what to evaluate it on: give data.val_files"):
        subject_of(str(toy["model"]), [])
    (tmp_path / "global_step_1").mkdir()
    with pytest.raises(CheckpointError, match="holds no whole checkpoint|damaged"):
        subject_of(str(tmp_path), [])


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("It is 3.\n#### 7", "7"),
        ("so \\boxed{ 7 }", "7"),
        ("<think>8</think>The answer is 7.", "7"),
        ("\nseven\n", "seven"),
        ("", ""),
    ],
)
def test_votes(response, answer):
    assert vote(response) == answer
