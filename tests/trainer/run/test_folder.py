"""Where a run may start and write: checkpoints of other jobs, folders and disks that take nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from steepest.errors import CheckpointError, SteepestError
from steepest.learner.checkpoint import FROM_NOTHING, CheckpointStore, Start
from steepest.trainer.run import folder as start_module
from steepest.trainer.run.hooks import changed_values, write_jsonl
from steepest.trainer.run.resume import find_start, finished_message, set_aside
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


def test_a_folder_that_takes_no_file():
    """Not even root's: os.access says that it may."""
    found = start_module._cannot_write(Path("/proc/a/b"))
    assert found is not None and found.startswith("/proc cannot be written to (")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, capsys, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    with start_module.hold(tmp_path / "run", flock):
        said = capsys.readouterr().out
    assert said.startswith(f"warning: {tmp_path}/.run.lock cannot be locked ({os.strerror(number)}): nothing keeps a")


def test_a_volume_next_to_which_no_lock_fits(tmp_path, capsys):
    with start_module.hold(Path("/proc/self")):
        assert "warning: /proc/.self.lock cannot be locked" in capsys.readouterr().out
    name = "n" * 250  # the folder's name is allowed, the lock's is too long
    with start_module.hold(tmp_path / name):
        assert "cannot be locked (File name too long)" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["/proc/a/run", "{tmp_path}/file/run"])
def test_a_run_folder_that_cannot_be_made(tmp_path, folder):
    (tmp_path / "file").touch()
    said = "run cannot be made: .* choose another trainer.experiment_name or"
    with pytest.raises(CheckpointError, match=said), start_module.hold(Path(folder.format(tmp_path=tmp_path))):
        pass


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again_over_them(tmp_path):
    said = []
    store = CheckpointStore(tmp_path, warn=said.append)
    assert find_start(store, mode="auto", resume_from_path=None, say=said.append).step == 0
    for step in (2, 4):
        store.save(step, {"actor": lambda path: (path / "weights").write_text("1")}, {"step": step})
        (tmp_path / f"global_step_{step}" / "actor" / "weights").write_text("22")
    with pytest.raises(CheckpointError) as caught:
        find_start(store, mode="auto", resume_from_path=None, say=said.append)
    assert str(caught.value) == (
        f"no checkpoint in {tmp_path} is whole (global_step_2, global_step_4; the warnings above name the faults). "
        "Bring a whole copy back, or start afresh with resume_mode=disable, which moves this folder aside and deletes "
        "nothing."
    )
    assert len(said) == 2 and all("has 2 bytes instead of 1" in text for text in said)
    assert store.steps() == [2, 4]


def test_an_earlier_run_that_cannot_be_moved(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"^/proc/self holds an earlier run and cannot be renamed to self.old-1 \("
    ):
        set_aside(Path("/proc/self"))


def test_a_full_disk_is_told_when_responses_are_written(tmp_path):
    said = r"1.jsonl: the responses cannot be written \(File too large\)"
    with files_of_at_most(4), pytest.raises(SteepestError, match=said):
        write_jsonl(tmp_path / "1.jsonl", [{"a": 1}])


@pytest.mark.parametrize("text", [b"{broken", b"a: ${nowhere", b"[1, 2", b"a: \xff", b"a: \x00", b"7", b"[" * 5000])
def test_a_kept_configuration_that_cannot_be_read_stops_no_run(tmp_path, capsys, text):
    (tmp_path / "config.yaml").write_bytes(text)
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
