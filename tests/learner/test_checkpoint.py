from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from steepest.errors import CheckpointError
from steepest.learner import checkpoint_files
from steepest.learner.checkpoint import CheckpointStore
from tests.learner import dying_child


def writers(content=b"weights"):
    return {
        "actor": lambda p: (p / "model.bin").write_bytes(content),
        "critic": lambda p: (p / "v.bin").write_bytes(b"v"),
    }


def save(store, step, content=b"weights", **more):
    return store.save(step, writers(content), {"step": step}, **more)


def names(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_the_folder_holds_what_the_design_says(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    assert store.latest() is None and store.best() is None and store.steps() == []
    path = save(store, 10)
    assert path == tmp_path / "run" / "global_step_10"
    assert names(tmp_path / "run") == ["global_step_10", "latest_checkpointed_iteration.txt"]
    assert names(path) == ["actor", "critic", "manifest.json", "trainer_state.json"]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "10\n"
    assert store.state(path) == {"step": 10}
    listed = json.loads((path / "manifest.json").read_text())["files"]
    assert sorted(listed) == ["actor/model.bin", "critic/v.bin", "trainer_state.json"]
    # sha256 of b"weights", by sha256sum
    want = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    assert listed["actor/model.bin"] == {"bytes": 7, "sha256": want}
    assert store.latest() == path == store.open(path)


def damage_missing(path):
    (path / "actor" / "model.bin").unlink()


def damage_short(path):
    (path / "actor" / "model.bin").write_bytes(b"weigh")


def damage_flipped(path):
    (path / "actor" / "model.bin").write_bytes(b"Weights")


def damage_manifest_gone(path):
    (path / "manifest.json").unlink()


def damage_manifest_cut(path):
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def damage_manifest_nonsense(path):
    (path / "manifest.json").write_text('{"files": {"actor/model.bin": 3}}')


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_missing, "actor/model.bin is missing"),
        (damage_short, "actor/model.bin has 5 bytes instead of 7"),
        (damage_flipped, "actor/model.bin has another SHA-256"),
        (damage_manifest_gone, "manifest.json is missing, so it was never finished"),
        (damage_manifest_cut, "manifest.json cannot be read"),
        (damage_manifest_nonsense, "manifest.json or a file that it lists cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, words):
    said = []
    store = CheckpointStore(tmp_path, warn=said.append)
    first, second = save(store, 2), save(store, 4)
    damage(second)
    assert store.latest() == first
    assert len(said) == 1 and str(second) in said[0] and words in said[0]
    with pytest.raises(CheckpointError, match=words):
        store.open(second)
    damage(first)
    assert store.latest() is None and len(said) == 3
    # the run goes on from step 0 and saves the same step again
    assert save(store, 2) == store.latest() == first


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        CheckpointStore.open(tmp_path / "global_step_7")


def test_by_default_the_warning_is_logged(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    damage_short(save(store, 2))
    assert store.latest() is None and "is damaged and is passed over" in caplog.text


def test_notes_in_a_checkpoint_do_no_harm(tmp_path):
    store = CheckpointStore(tmp_path)
    (save(store, 2) / "notes.txt").write_text("good one")
    assert store.latest() is not None


def test_newest_is_the_last_saved_not_the_highest_step(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6):
        save(store, step)
    # somebody went back to step 2 and the run saves step 3
    assert store.steps() == [4, 6]
    path = save(store, 3)
    assert store.latest() == path
    assert store.steps() == [3, 6]


def test_the_same_step_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 2)
    path = save(store, 2, b"later")
    assert (path / "actor" / "model.bin").read_bytes() == b"later"
    assert names(tmp_path) == ["global_step_2", "latest_checkpointed_iteration.txt"]
    assert store.latest() == path


def die_saving(folder, step, *, renames):
    """A process saves the step again, and is killed when it has renamed the step's folder so many times."""
    command = [sys.executable, "-m", "tests.learner.dying_child", str(folder), str(step), str(renames)]
    assert subprocess.run(command, cwd=Path(__file__).parents[2]).returncode == dying_child.EXIT


@pytest.mark.parametrize("rename", [0, 1])
def test_a_kill_inside_a_replacement_leaves_a_whole_checkpoint(tmp_path, rename):
    store = CheckpointStore(tmp_path)
    save(store, 2, b"before")
    die_saving(tmp_path, 2, renames=rename)
    again = CheckpointStore(tmp_path)
    found = again.latest()
    assert found is not None and (found / "actor" / "model.bin").read_bytes() == b"before"
    assert again.remove_leftovers() == [".tmp-global_step_2"]
    assert names(tmp_path) == ["global_step_2", "latest_checkpointed_iteration.txt"]


def test_leftovers_of_a_kill_go_and_nothing_else(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.remove_leftovers() == []
    save(store, 2)
    for name in (".tmp-global_step_4", ".del-global_step_1", ".old-global_step_2"):
        (tmp_path / name / "actor").mkdir(parents=True)
    (tmp_path / ".tmp-best.json").write_text("{")
    (tmp_path / "tmp-mine").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    assert store.latest() == tmp_path / "global_step_2"
    gone = [".del-global_step_1", ".old-global_step_2", ".tmp-best.json", ".tmp-global_step_4"]
    assert sorted(store.remove_leftovers()) == gone
    assert names(tmp_path) == ["global_step_2", "latest_checkpointed_iteration.txt", "metrics.jsonl", "tmp-mine"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.3), (4, 0.5), (5, 0.9)):
        save(store, step)
        store.mark_best(step, score)
    assert store.steps() == [2, 4, 5]
    assert store.best() == (2, 0.9)  # ties go to the earlier
    record = json.loads((tmp_path / "best.json").read_text())
    assert record["step"] == 2 and record["score"] == 0.9 and record["scores"]["4"] == 0.5
    assert store.mark_best(5, 0.95)
    save(store, 6)
    assert store.steps() == [5, 6] and store.best() == (5, 0.95)


def test_a_score_may_come_before_its_checkpoint_and_outlive_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    assert store.mark_best(1, 0.8)
    assert store.best() is None and json.loads((tmp_path / "best.json").read_text())["step"] is None
    save(store, 1)
    assert store.best() == (1, 0.8)
    assert not store.mark_best(2, 0.7)
    save(store, 2)
    assert store.steps() == [1, 2]
    shutil.rmtree(tmp_path / "global_step_1")
    assert store.best() == (2, 0.7)


def test_a_step_that_is_saved_again_forgets_its_old_score(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    for step, score in ((2, 0.1), (4, 0.9)):
        save(store, step)
        store.mark_best(step, score)
    save(store, 4, b"other weights")  # a run that went back to step 2 and came to step 4 again
    assert "4" not in json.loads((tmp_path / "best.json").read_text())["scores"]
    assert store.best() == (2, 0.1)
    save(store, 6)
    assert store.steps() == [2, 6]  # the score 0.9 protects nothing any more


def test_a_score_of_a_replaced_step_is_gone_before_its_weights_are(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 2, b"before")
    store.mark_best(2, 0.9)
    die_saving(tmp_path, 2, renames=0)
    assert (tmp_path / "global_step_2" / "actor" / "model.bin").read_bytes() == b"before"
    assert CheckpointStore(tmp_path).best() is None


def test_a_store_holds_what_it_saved_or_goes_on_from_and_no_older_folder(tmp_path):
    first = CheckpointStore(tmp_path)
    for step in (2, 4, 6):
        save(first, step)
    assert [step for step in (2, 3, 4, 6) if first.holds(step)] == [2, 4, 6]
    again = CheckpointStore(tmp_path)
    again.goes_on_from(tmp_path / "x" / ".." / "global_step_2")
    assert [step for step in (2, 4, 6) if again.holds(step)] == [2]
    save(again, 6)
    assert [step for step in (2, 4, 6) if again.holds(step)] == [2, 6]
    elsewhere = CheckpointStore(tmp_path / "other")
    elsewhere.goes_on_from(tmp_path / "global_step_4")
    save(elsewhere, 8)
    shutil.copytree(tmp_path / "global_step_4", tmp_path / "other" / "global_step_4")
    assert elsewhere.holds(8) and not elsewhere.holds(4)


def test_a_damaged_checkpoint_takes_no_place_from_a_good_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    damage_manifest_gone(save(store, 2))
    save(store, 3)
    assert store.steps() == [1, 2, 3]
    save(store, 4)
    assert store.steps() == [2, 3, 4]


def test_best_json_that_cannot_be_read_is_told_and_replaced(tmp_path):
    said = []
    store = CheckpointStore(tmp_path, warn=said.append)
    save(store, 1)
    (tmp_path / "best.json").write_text("{")
    assert store.mark_best(1, 0.5)
    assert "cannot be read" in said[0] and store.best() == (1, 0.5)


def test_keep_must_leave_something(tmp_path):
    with pytest.raises(ValueError, match="at least one checkpoint has to stay"):
        CheckpointStore(tmp_path, keep=0)


def test_a_writer_that_fails_leaves_no_trace(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    before = names(tmp_path)

    def broken(path):
        (path / "half").write_bytes(b"x")
        raise RuntimeError("cannot serialise")

    with pytest.raises(RuntimeError, match="cannot serialise"):
        store.save(2, {"actor": broken}, {"step": 2})
    with pytest.raises(ValueError, match="JSON"):
        store.save(2, writers(), {"best": float("nan")})
    assert names(tmp_path) == before and store.latest() == tmp_path / "global_step_1"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EROFS, "Read-only file system", "/a"),
        PermissionError(errno.EACCES, "Permission denied", "/a"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"),
        Exception("Error while serializing: I/O error: Read-only file system (os error 30)"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_reason(tmp_path, error):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def refused(path):
        raise error

    with pytest.raises(CheckpointError, match="^checkpoint global_step_2 cannot be written into ") as caught:
        store.save(2, {"actor": refused}, {"step": 2})
    assert f"{tmp_path}: {error}. The last one, {tmp_path}/global_step_1, is untouched." in str(caught.value)
    assert names(tmp_path) == ["global_step_1", "latest_checkpointed_iteration.txt"]


def test_a_file_in_place_of_the_run_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(CheckpointError, match=f"cannot be written into {tmp_path}/run: .* There is no earlier one."):
        save(CheckpointStore(tmp_path / "run"), 1)


def test_a_run_folder_that_vanished_is_made_again(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    save(store, 1)
    shutil.rmtree(tmp_path / "run")
    save(store, 2)
    assert store.latest() == tmp_path / "run" / "global_step_2"


def test_what_cannot_be_deleted_ends_no_run(tmp_path):
    """A link to a folder stands for a folder that a reader on NFS keeps from being deleted."""
    warnings = []
    (tmp_path / "elsewhere").mkdir()
    store = CheckpointStore(tmp_path / "run", 1, warn=warnings.append)
    save(store, 1)
    (tmp_path / "run" / ".del-global_step_1").symlink_to(tmp_path / "elsewhere")
    save(store, 2)
    assert store.steps() == [1, 2] and store.latest() == tmp_path / "run" / "global_step_2"
    assert store.remove_leftovers() == []
    assert [text.split(" (")[0] for text in warnings] == [
        f"{tmp_path}/run/global_step_1 is no longer needed and cannot be deleted",
        f"{tmp_path}/run/.del-global_step_1 is no longer needed and cannot be deleted",
    ]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"step": "2"}', b"\xff", b"[" * 100_000])
def test_a_state_that_names_no_step(tmp_path, text):
    (tmp_path / "trainer_state.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/trainer_state.json "):
        CheckpointStore.state(tmp_path)


@pytest.mark.parametrize("serial", ["NaN", "1e999", '"2"', "true", "null", "[]"])
def test_a_manifest_with_another_serial_number_is_no_obstacle(tmp_path, serial):
    store = CheckpointStore(tmp_path, warn=lambda text: None)
    save(store, 1)
    manifest = tmp_path / "global_step_1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"serial": 1', f'"serial": {serial}'))
    save(store, 2)
    assert store.steps() == [1, 2]


# -- full disks -------------------------------------------------------------------------------------------------


def assert_last_good_is_kept(store, error):
    assert store.latest() == store.folder / "global_step_1"
    assert names(store.folder) == ["global_step_1", "latest_checkpointed_iteration.txt"]
    text = str(error.value)
    free = shutil.disk_usage(store.folder).free
    assert "checkpoint global_step_2 cannot be written" in text and "bytes are needed" not in text
    assert "bytes free" in text and "needed" in text and "global_step_1, is untouched" in text
    return text, free


def test_too_little_space_is_seen_before_writing(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    called = []
    with pytest.raises(CheckpointError) as error:
        store.save(2, {"actor": called.append}, {}, expected_bytes=1 << 60)
    text, _ = assert_last_good_is_kept(store, error)
    assert called == [] and f"about {1 << 60} bytes (1048576.0 TiB)" in text
    # without a number from the caller, the newest checkpoint's size is the estimate
    sizes = sum(
        p.stat().st_size for p in (tmp_path / "global_step_1").rglob("*") if p.name != "manifest.json" and p.is_file()
    )
    assert store._size_of_newest() == sizes


def no_space(path):
    raise OSError(errno.ENOSPC, "No space left on device")


def wrapped(path):
    try:
        no_space(path)
    except OSError as error:
        raise RuntimeError("save_pretrained failed") from error


def short_write(path):
    save_file({"w": torch.zeros(1000)}, path / "model.safetensors")
    os.truncate(path / "model.safetensors", 3000)


def very_short_write(path):
    save_file({"w": torch.zeros(1000)}, path / "model.safetensors")
    os.truncate(path / "model.safetensors", 30)


@pytest.mark.parametrize("writer", [no_space, wrapped, short_write, very_short_write])
def test_a_full_disk_while_writing(tmp_path, writer):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    with pytest.raises(CheckpointError) as error:
        store.save(2, {"actor": writer}, {})
    assert_last_good_is_kept(store, error)


def file_writer(path):
    (path / "model.bin").write_bytes(bytes(1 << 20))


def safetensors_writer(path):
    save_file({"w": torch.zeros(1 << 18)}, path / "model.safetensors")


@pytest.fixture
def small_disk(tmp_path):
    """A folder with 256 KiB of its own."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("writer", [file_writer, safetensors_writer])
def test_a_disk_that_is_really_full(small_disk, writer):
    store = CheckpointStore(small_disk / "run")
    save(store, 1)
    with pytest.raises(CheckpointError) as error:
        store.save(2, {"actor": writer}, {}, expected_bytes=0)
    assert_last_good_is_kept(store, error)
    assert store.save(2, writers(), {"step": 2}) == store.latest()


@pytest.mark.parametrize("writer", [file_writer, safetensors_writer])
def test_a_limit_on_file_size(tmp_path, writer):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(CheckpointError) as error:
            store.save(2, {"actor": writer}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_last_good_is_kept(store, error)


def test_other_errors_are_not_taken_for_a_full_disk():
    assert not checkpoint_files.is_disk_full(PermissionError(errno.EACCES, "no"))
    assert not checkpoint_files.is_disk_full(RuntimeError("tensor has no storage (os error 2)"))


# -- kill -9 ----------------------------------------------------------------------------------------------------


def test_twenty_kills_at_random_moments(tmp_path):
    """After each kill the newest checkpoint is whole, is no older than the last one promised, and the run goes on."""
    rng = random.Random(7)
    promised = 0
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.learner.saving_child", str(tmp_path)]
    for _ in range(20):
        child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline().split()
        assert first[0] == "ready" and int(first[1]) >= promised
        printed = [child.stdout.readline() for _ in range(rng.randint(0, 3))]
        time.sleep(rng.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        printed += child.stdout.read().splitlines()
        saved = [int(line.split()[1]) for line in printed if line.startswith("saved")]
        child.wait()
        promised = saved[-1] if saved else promised
        said = []
        store = CheckpointStore(tmp_path, keep=2, warn=said.append)
        found = store.latest()
        if promised:
            assert found is not None and store.state(found)["step"] >= promised
            step = store.state(found)["step"]
            assert (found / "critic" / "3.bin").read_bytes() == bytes([step % 251]) * 4096
        assert said == []
    assert promised >= 5  # the kills fell into saves, not before the first one
    store.remove_leftovers()
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    # the newest two, the best (step 1), and one more when the last kill came before pruning
    assert len(store.steps()) <= 4 and 1 in store.steps()
