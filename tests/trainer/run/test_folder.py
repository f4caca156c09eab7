"""Where a run may start and write: checkpoints of other jobs, folders and disks that take nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.errors import CheckpointError, SteepestError
from steepest.learner.checkpoint import FROM_NOTHING, Start
from steepest.trainer.run import folder as start_module
from steepest.trainer.run.hooks import changed_values, write_jsonl
from steepest.trainer.run.resume import finished_message
from steepest.trainer.run.summary import end_summary
from tests.support.machine import files_of_at_most


def test_a_checkpoint_of_another_job_is_refused_by_what_it_holds(tmp_path):
    (tmp_path / "actor").mkdir()
    start = Start(3, tmp_path, {"step": 3, "kl_controller": {"value": 0.1}})
    assert start.folder("actor", Path("model")) == tmp_path / "actor"
    assert start.entry("kl_controller") == {"value": 0.1}
    for call, words in (
        (lambda: start.folder("critic", Path("model")), "holds no critic"),
        (lambda: start.entry("random"), "holds no random"),
        (lambda: start.refuse_entry("kl_controller"), "holds a kl_controller"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            call()
        assert f"{tmp_path}/actor" in str(caught.value) and "Choose another experiment_name or " in str(caught.value)
    start.refuse_entry("something")
    assert FROM_NOTHING.folder("critic", Path("model")) == Path("model")


def test_a_finished_run_offers_only_what_the_job_has():
    for can_validate in (True, False):
        text = finished_message(3, 4, can_validate=can_validate)
        assert text.startswith("the run is finished: it stands at step 3 and trainer.total_training_steps is 4.")
        assert ("trainer.val_only" in text) is can_validate


def test_a_folder_that_is_to_be_made_is_no_problem_and_one_below_a_file_is(tmp_path):
    (tmp_path / "file").touch()
    assert start_module._cannot_write(tmp_path / "a" / "b") is None
    assert start_module._cannot_write(tmp_path / "file" / "b") == f"{tmp_path}/file is no folder"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "looking makes nothing"


def test_a_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert start_module._cannot_write(tmp_path / "a") == f"{tmp_path} cannot be written to"


def test_a_full_disk_is_told_when_responses_are_written(tmp_path):
    said = r"1.jsonl: the responses cannot be written \(File too large\)"
    with files_of_at_most(4), pytest.raises(SteepestError, match=said):
        write_jsonl(tmp_path / "1.jsonl", [{"a": 1}])


@pytest.mark.parametrize("text", ["{broken", "a: ${nowhere", "[1, 2"])
def test_a_kept_configuration_that_cannot_be_read_stops_no_run(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_text(text)
    assert changed_values(tmp_path / "config.yaml", {"a": 1}) == []
    assert "config.yaml cannot be read" in capsys.readouterr().out


def test_the_end_names_only_what_is_there(tmp_path):
    (tmp_path / "config.yaml").write_text("a: 1")
    (tmp_path / "samples.jsonl").touch()
    text = end_summary({}, seconds=1, steps=2, folder=str(tmp_path), kept=False)
    assert f"{tmp_path} (config.yaml)\n" in text
    assert "not saved, as trainer.save_freq and trainer.save_last ask" in text
    (tmp_path / "global_step_2").mkdir()
    text = end_summary({}, seconds=1, steps=2, folder=str(tmp_path))
    assert text.endswith(f"{tmp_path} (config.yaml, 1 checkpoint(s))") and "not saved" not in text
