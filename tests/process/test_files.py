"""Files that outlive a kill and a full disk, and file systems that know less than others."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from steepest.process.files import LineFile, free_bytes, lock, replace_text, sync
from tests.support.machine import disk_of, files_of_at_most


def fails_with(number: int):
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


def test_a_line_that_does_not_fit_leaves_no_part_and_raises_once(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    file.append("first")
    with files_of_at_most(10):
        with pytest.raises(OSError, match="File too large"):
            file.append("a longer line")
        file.append("2nd")  # 6 + 4 bytes
        file.close()
    assert (tmp_path / "lines").read_bytes() == b"first\n2nd\n"


def test_a_full_device_raises_at_the_line_and_not_when_it_is_closed() -> None:
    file = LineFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        file.append("x")
    file.close()


def test_lines_of_two_processes_are_kept_by_a_line_that_does_not_fit(tmp_path: Path) -> None:
    ours, theirs = LineFile(tmp_path / "lines"), LineFile(tmp_path / "lines")
    ours.append("a")
    theirs.append("b")
    with files_of_at_most(5), pytest.raises(OSError, match="File too large"):
        ours.append("long")
    theirs.append("c")
    assert (tmp_path / "lines").read_bytes() == b"a\nb\nc\n"


def test_a_text_that_does_not_fit_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.json", "old", synced=True)
    with files_of_at_most(4), pytest.raises(OSError, match="File too large"):
        replace_text(tmp_path / "a.json", "a new text")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_sync(tmp_path: Path, number: int) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        sync(path, fails_with(number))
    sync(tmp_path, fails_with(errno.EPERM))
    with pytest.raises(PermissionError):
        sync(tmp_path / "file", fails_with(errno.EPERM))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_sync_that_found_a_fault_is_none_that_is_missing(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=os.strerror(number)):
        sync(tmp_path, fails_with(number))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO, errno.EPERM])
def test_a_file_system_without_locks_says_so(tmp_path: Path, number: int) -> None:
    with (tmp_path / "lock").open("w") as file:
        assert lock(file, fails_with(number)) == os.strerror(number)


def test_a_lock_that_another_holds(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as one, (tmp_path / "lock").open("w") as two:
        assert lock(one) is None
        with pytest.raises(BlockingIOError):
            lock(two)
    with (tmp_path / "lock").open("w") as three:
        assert lock(three) is None


def test_a_file_system_that_does_not_count_its_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, total=0, free=0)
    assert free_bytes(tmp_path) is None
