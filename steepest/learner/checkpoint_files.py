"""Files that survive a kill: written, synced, listed with size and hash, and renamed into place in one instant."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from steepest.process.files import sync, system_errno

MANIFEST = "manifest.json"
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def files_under(folder: Path) -> Iterator[Path]:
    """Every file below `folder` but its manifest, in sorted order."""
    yield from (p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST)


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Sync every file, then write `manifest.json`: `facts`, and size and SHA-256 of each file. Last, sync the folders.

    A folder with a valid manifest is whole, since the manifest is written after everything else.
    Raises OSError for a safetensors file that is shorter than its own header says.
    """
    listed: dict[str, Any] = {}
    for file in files_under(folder):
        if file.suffix == ".safetensors":
            _check_length(file)
        sync(file)
        listed[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": listed}, indent=1) + "\n", encoding="utf-8")
    sync(manifest)
    for inner in [p for p in folder.rglob("*") if p.is_dir()]:
        sync(inner)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None when it is missing or is none."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else None


def what_is_wrong(folder: Path) -> str | None:
    """None when every file of the manifest is there with its size and hash; else the first fault, in words.

    Sizes are compared before any hash, so a file cut short is found at once. Files that the manifest does not list
    are ignored: a user may put notes there.
    """
    if not folder.is_dir():
        return "there is no such folder"
    manifest = read_manifest(folder)
    if manifest is None:
        missing = not (folder / MANIFEST).is_file()
        return f"{MANIFEST} {'is missing, so it was never finished' if missing else 'cannot be read'}"
    try:
        files: dict[str, Any] = manifest["files"]
        for name, facts in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size} bytes instead of {facts['bytes']}"
        for name, facts in files.items():
            if sha256(folder / name) != facts["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    except (KeyError, TypeError, OSError) as error:
        return f"{MANIFEST} or a file that it lists cannot be read ({type(error).__name__}: {error})"
    return None


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that the disk, a quota or a size limit is reached."""
    return any(system_errno(one) in _DISK_FULL for one in _chain(error))


def system_reason(error: BaseException) -> str | None:
    """The system's reason in an exception, or in one that it came from; None where no call of the system failed."""
    return next((str(one) for one in _chain(error) if system_errno(one) is not None), None)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _check_length(file: Path) -> None:
    """A safetensors file says in its header where its data ends: compare, to notice a write that fell short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 + length:
            raise OSError(errno.ENOSPC, f"{file.name}: {size} bytes are fewer than its header needs")
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted = 8 + length + max(ends, default=0)
    if size != wanted:
        raise OSError(errno.ENOSPC, f"{file.name}: {size} bytes written of {wanted}")
