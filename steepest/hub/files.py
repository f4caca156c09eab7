"""Files of a repository on a hub: which of them are wanted, their checksums, and the room they need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from steepest.hub.faults import HubFault
from steepest.process.files import free_bytes

Kind = Literal["model", "dataset"]
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Configs and tokenizers, and remote code (which runs only when trusted)."""
MODEL_FILES = ("*.safetensors", *TOKENIZER_FILES)
"""TOKENIZER_FILES and the weights, in the form of safetensors only."""
_BLOCK = 1 << 20
_SPARE = 64 << 20
"""Number of bytes that must stay free on the disk of the cache."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the hub lists it. `digest` is `sha256:...` or `git-sha1:...`, empty where the hub lists none."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    commit: str
    files: tuple[RemoteFile, ...]

    def wanted(self, patterns: Sequence[str]) -> tuple[RemoteFile, ...]:
        """The files that match at least one pattern; `*` also matches `/`."""
        return tuple(file for file in self.files if any(fnmatch(file.path, pattern) for pattern in patterns))


def what_is_wrong(path: Path, file: RemoteFile) -> str | None:
    """Compare size and checksum of a file on the disk with the hub's list: the difference in words, or None."""
    size = path.stat().st_size
    if size != file.size:
        return f"{file.path} has {size} bytes instead of {file.size}"
    kind, _, want = file.digest.partition(":")
    found = checksum(path, kind) if want else want
    return None if found == want else f"{file.path}: {kind} {found[:12]}... instead of {want[:12]}..."


def checksum(path: Path, kind: str) -> str:
    """The hex digest of a file: `sha256`, or `git-sha1`, git's name of a blob."""
    if kind == "sha256":
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def require_room(folder: Path, needed: int) -> None:
    """Raise HubFault if the disk of `folder` (which need not exist yet) has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = free_bytes(there)
    if needed > 0 and free is not None and needed + _SPARE > free:
        raise HubFault("space", f"{human(needed)} are needed in {folder}, {human(free)} are free")


def total(files: Iterable[RemoteFile]) -> int:
    """Size of all files together, in bytes."""
    return sum(file.size for file in files)


def human(size: float) -> str:
    """A number of bytes as text: 988.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
