"""`steepest preflight` on tiny jobs: what a healthy one shows, what sick ones are told, that nothing is written."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from steepest.checks import Check, problem, warning
from steepest.config.load import load_config
from steepest.process.start_timing import Laps
from steepest.trainer.jobs.preflight.command import preflight
from steepest.trainer.jobs.preflight.report import Report, shown
from steepest.trainer.jobs.preflight.resources import Measured, at
from steepest.trainer.main_preflight import main
from tests.support.sick_runs import HotEngine, SickJob, make_world, words

MORE = ("trainer.total_training_steps=20", "trainer.test_freq=10", "trainer.save_freq=5",
        "trainer.max_actor_ckpt_to_keep=2")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The job, and validation rows that are not trained on."""
    world = make_world(tmp_path_factory.mktemp("world"))
    rows = world["rows"].read_text().splitlines()[:10]
    world["val"] = world["rows"].with_name("val.jsonl")
    world["val"].write_text("".join(row.replace('"say ', '"say 1') + "\n" for row in rows))
    return world


def job(world, folder: Path, reward: str, *more: str) -> list[str]:
    return words(world, folder, reward, *MORE, f"data.val_files={world['val']}", *more)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def healthy(world, tmp_path_factory) -> tuple[Report, Path]:
    """(report of a healthy job, the folder of its run folder)."""
    folder = tmp_path_factory.mktemp("runs")
    return preflight(load_config(job(world, folder / "run", "digit")), Laps()), folder


def line(report: Report, name: str) -> Check:
    (found,) = [line for line in report.lines if line.name == name]
    return found


def test_a_healthy_job_has_a_line_for_each_thing_and_no_problem(healthy):
    report, _ = healthy
    assert [(group.name, [line.name for line in group.lines]) for group in report.groups] == [
        ("data", ["train rows", "validation rows", "overlap", "template", "bos", "eos", "pad"]),
        ("reward", ["ground truth"]),
        ("answers", ["limit", "scores", "groups"]),
        ("step", ["ratio", "engine", "actor gradient", "critic gradient", "KL in the reward"]),
        ("resources", ["checkpoint", "time", "memory", "disk"]),
    ]
    assert report.exit_code == 0
    assert [line for line in report.lines if line.status == "problem"] == []
    assert line(report, "ratio").text == "1 before the first update, up to 0"
    assert line(report, "checkpoint").text.endswith("log-probs after loading differ by 0")


def test_it_shows_three_prompts_as_the_model_sees_them_and_eight_answers(healthy):
    report, _ = healthy
    assert report.prompts[1] == ("rows:1", "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n")
    assert len(report.prompts) == 3 and len(report.answers) == 8
    for answer in report.answers:
        assert answer.score == float(answer.ground_truth in answer.text) and answer.num_tokens <= 24


def test_the_prediction_follows_from_what_was_measured(healthy):
    report, _ = healthy
    found = report.prediction
    assert found is not None and found.steps == 20
    # steps 5, 10, 15 and 20 are saved; the newest two and the best stay
    assert found.disk_bytes == 3 * found.checkpoint_bytes > 0
    assert found.seconds >= 20 * found.step_seconds > 0 and found.peak_bytes > 2**26


def test_nothing_is_written(healthy, world, tmp_path):
    assert list(healthy[1].iterdir()) == []  # no run folder, no lock, no temporary folder
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = snapshot(tmp_path)
    report = preflight(load_config(job(world, folder, "digit", "data.max_prompt_length=4")), Laps())
    assert snapshot(tmp_path) == before
    # a row that is too long ends the report, as it would end the run
    (found,) = report.lines
    assert found.status == "problem" and "data.max_prompt_length is 4" in found.text and report.exit_code == 1
    assert report.keys[0] == "data.max_prompt_length"


def test_json_is_all_that_stands_on_standard_output_and_a_grader_that_never_accepts_is_a_problem(
    world, tmp_path, capsys
):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    before = snapshot(tmp_path)
    assert main([*job(world, folder, "nothing"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert snapshot(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert found["schema"] == 1 and found["status"] == "problem" and found["counts"]["problem"] == 1
    lines = {line["name"]: line for group in found["groups"] for line in group["lines"]}
    assert lines["ground truth"]["text"].startswith("in 16 of 16 rows the ground truth as the answer scores no more")
    assert lines["scores"]["text"] == "all 8 answers score 0: steps of such answers teach nothing"
    assert "of made-up scores" in lines["actor gradient"]["text"] and lines["actor gradient"]["status"] == "ok"
    assert found["keys"][:2] == ["custom_reward_function.path", "reward.functions"]
    assert len(found["answers"]) == 8 and found["answers"][0]["score"] == 0.0


@pytest.mark.slow
def test_a_limit_that_cuts_everything_is_a_problem(world, tmp_path):
    report = preflight(load_config(job(world, tmp_path / "run", "digit", "data.max_response_length=1")), Laps())
    assert line(report, "limit").status == "problem" and "100% of 8 answers were cut" in line(report, "limit").text
    assert report.exit_code == 1 and report.keys[0] == "data.max_response_length"


@pytest.mark.slow
def test_a_template_that_writes_bos_twice_is_a_warning(world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world["model"], model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_start|>"}))
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    job_words = job(world, tmp_path / "run", "digit", f"actor_rollout_ref.model.path={model}")
    report = preflight(load_config(job_words), Laps())
    assert line(report, "bos").text.startswith("the chat template writes <|im_start|> twice in 90 prompts")
    assert report.exit_code == 0 and report.keys == ["actor_rollout_ref.model.custom_chat_template"]


@pytest.mark.slow
def test_an_engine_with_another_temperature_is_a_problem(world, tmp_path):
    config = load_config(job(world, tmp_path / "run", "digit"))
    report = preflight(config, Laps(), partial(SickJob, engine=HotEngine))
    assert line(report, "engine").status == "problem" and "(limit 0.001 in the mean)" in line(report, "engine").text
    assert line(report, "ratio").status == "ok"  # the loss divides by the actor's own, where the engine's are wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "names"),
    [
        (["algorithm.adv_estimator=grpo", "actor_rollout_ref.actor.use_kl_loss=True"], {"KL loss"}),
        (["algorithm.adv_estimator=rloo"], {"KL"}),
        (["actor_rollout_ref.model.lora_rank=4", "trainer.critic_warmup=2"], {"KL in the reward", "critic gradient"}),
    ],
)
def test_other_algorithms_have_a_gradient_too(world, tmp_path, more, names):
    groups = [
        "actor_rollout_ref.rollout.n=4",
        "data.train_batch_size=8",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    ]
    report = preflight(load_config(job(world, tmp_path / "run", "digit", *groups, *more)), Laps())
    assert {name for name in names if line(report, name).status != "ok"} == set()
    assert line(report, "actor gradient").status == "ok" and report.exit_code == 0


def test_seconds_lie_on_the_line_through_both_measurements():
    small, large = Measured(8, {"gen": 1.0, "ref": 4.0}, 0, 1), Measured(32, {"gen": 2.5, "ref": 3.0}, 0, 1)
    # gen: 1.5 s for 24 rows more; 2.5 + 1.5 / 24 * 224 = 16.5 for 256 rows
    assert [at(rows, small, large, "gen") for rows in (8, 32, 256)] == [1.0, 2.5, 16.5]
    assert at(256, small, large, "ref") == 3.0  # the smaller one was slower by chance: no more rows take less time
    assert at(64, large, large, "gen") == 5.0 and at(64, small, large, "reward") == 0.0


def test_the_verdict_names_the_keys_of_problems_first_and_each_once():
    report = Report(seconds=2.0)
    report.add("a", [warning("x", "w", "raise data.max_response_length or data.val_files")])
    report.add("b", [problem("y", "p", "see actor_rollout_ref.actor.optim.lr and data.val_files")])
    assert report.keys == ["actor_rollout_ref.actor.optim.lr", "data.val_files", "data.max_response_length"]
    assert report.exit_code == 1
    text = " ".join(row for row, _ in report._rows(100))
    assert "1 problem, 1 warning, 2.0 s. Correct the problems before you start the run. Keys to look at: actor" in text


def test_texts_of_a_model_cannot_steer_the_terminal():
    assert shown("a\x1b[31mb\u202ec\nd") == "a\\x1b[31mb\\u202ec\nd"
    assert len(shown("x" * 5000)) == 1205
