"""What a page takes out of the files of a run: numbers, stretches of health checks, origins, samples within a size."""

from __future__ import annotations

import json

import pytest

from steepest.config.load import load_config, save_config
from steepest.errors import SteepestError
from steepest.report import read
from tests.support.report_run import make_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def test_curves_have_a_column_a_metric_and_none_where_there_is_no_number(folder):
    found = read.curves(read.read_steps(folder / "metrics.jsonl"))
    assert found.steps == list(range(1, 13)) and found.every == 1
    assert found.metrics["critic/score/mean"][:4] == [0.083333, 0.16667, 0.25, 0.33333]  # k / 12
    assert found.metrics["actor/entropy"][:3] == [1.0, None, 0.33333]  # NaN in step 2
    assert found.metrics["val/accuracy"] == [None, None, 0.5] * 4
    assert found.seconds[:3] == [0.0, 2.0, 5.0]  # 1002, 1004, and 1007 of the validation after step 3
    assert "time" not in found.metrics


def test_a_long_run_is_thinned_and_keeps_validations_and_the_last_step():
    steps = {step: {"a": float(step)} for step in range(1, 2503)}
    steps[7]["val/accuracy"] = 0.5
    found = read.curves(steps)
    assert found.every == 3  # 2502 steps, 1000 on a page
    assert found.steps[:5] == [3, 6, 7, 9, 12] and found.steps[-2:] == [2499, 2502]
    assert found.metrics["a"][2] == 7.0


def test_numbers_have_five_digits():
    assert [read.number(x) for x in (1.234567, -0.000123456789, 1234567.8, float("inf"), None)] == [
        1.2346, -0.00012346, 1234568, None, None,
    ]  # fmt: skip


def test_events_are_stretches_of_steps():
    sick = {"health/kl": 1.0, "health/nan": 0.0}
    well = {"health/kl": 0.0}
    steps = {1: well, 2: sick, 3: sick, 5: sick, 6: well, 7: {"health/kl": 1.0, "health/nan": 1.0}}
    assert read.events(steps) == {"kl": [[2, 5], [7, 7]], "nan": [[7, 7]]}  # 5 is the row after 3


def test_settings_come_with_their_origins(folder):
    assert read.read_settings(folder / "config.yaml") == [
        ("data.train_files", '[a.parquet, "b # c.parquet"]', "command line"),
        ("data.train_batch_size", "32", "preset grpo"),
        ("data.hub", "huggingface", "derived from actor_rollout_ref.model.hub"),
        ("data.val_batch_size", "null", "default"),
        ("data.apply_chat_template_kwargs", "{a: 1}", "default"),
        ("actor_rollout_ref.model.path", "some/model", "command line"),
        ("algorithm.adv_estimator", "grpo", "preset grpo"),
    ]
    assert read.read_settings(folder / "none.yaml") == []


def test_every_origin_of_a_saved_configuration_is_found(tmp_path):
    words = [
        "--config-name",
        "grpo",
        "data.train_files=数据 # 1.parquet",
        "data.val_files=b",
        "trainer.logger=[console,jsonl]",
    ]
    config = load_config([*words, "actor_rollout_ref.model.path='a: b'"])
    save_config(config, tmp_path / "config.yaml")
    found = {key: origin for key, _, origin in read.read_settings(tmp_path / "config.yaml")}
    assert found == dict(config.provenance.sources)
    values = {key: value for key, value, _ in read.read_settings(tmp_path / "config.yaml")}
    assert values["data.train_files"] == "['数据 # 1.parquet']" and values["trainer.logger"] == "[console, jsonl]"
    assert values["actor_rollout_ref.model.path"] == "'a: b'"


def test_a_damaged_configuration_is_an_error_with_its_name(tmp_path):
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(SteepestError, match="config.yaml: this configuration cannot be read"):
        read.read_settings(tmp_path / "config.yaml")


def test_samples_that_do_not_fit_are_left_out_evenly(tmp_path):
    file = tmp_path / "token_samples.jsonl"
    line = json.dumps({"step": 100, "x": "a" * 57})  # 80 bytes with a step of three digits
    assert len(line) == 80 - 1
    file.write_text("".join(line.replace("100", str(step)) + "\n" for step in range(100, 120) for _ in range(2)))
    found = read.sample_lines(file, 5 * 160)  # of 20 steps of 160 bytes each, five
    steps = [json.loads(line)["step"] for line in found.lines]
    assert steps == [100, 100, 105, 105, 110, 110, 114, 114, 119, 119] and found.steps_left_out == 15
    assert read.sample_lines(file, 1_000_000).steps_left_out == 0
    assert read.sample_lines(file, 200).lines == [line] * 2  # not even the last step: two of its rows
    assert read.sample_lines(tmp_path / "none.jsonl", 1).lines == []


def test_a_sample_line_that_is_being_written_is_left_out(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text('{"step": 1, "a": 1}\n{"a": 2, "step": 2}\n{"step": 3, "a"')
    assert read.sample_lines(file, 1000).lines == ['{"step": 1, "a": 1}', '{"a": 2, "step": 2}']
