"""Receipts record which downloads are complete and were checked.

A receipt is stored in the hub's cache, under `.steepest/`, so that it is copied with the cache to a machine without a
network. It holds the files of one commit with size and checksum and, for files that were checked, the time of their
last change. While size and time on the disk are the same, a file counts as checked. A file with another time is hashed
again: it may belong to a copied cache, or to a newer commit (ModelScope's client overwrites the folder of a branch).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steepest.hub.files import Kind, Listing, RemoteFile, what_is_wrong
from steepest.process.files import replace_text


@dataclass
class Receipt:
    """The files of one commit in one folder: size, checksum and time of the check."""

    folder: Path
    listing: Listing
    checked: dict[str, int] = field(default_factory=dict)
    """Path -> time of the file's last change (ns) when its checksum was found right."""

    def holds(self, files: Iterable[RemoteFile]) -> bool:
        """True if all these files are in the folder, complete and with the right checksum."""
        return all(self._holds(file) for file in files)

    def _holds(self, file: RemoteFile) -> bool:
        path = self.folder / file.path
        if file.path not in self.checked or not path.is_file() or path.stat().st_size != file.size:
            return False
        return path.stat().st_mtime_ns == self.checked[file.path] or what_is_wrong(path, file) is None


class Receipts:
    """All receipts of one repository in one cache."""

    def __init__(self, cache: Path, kind: Kind, name: str) -> None:
        self.cache = cache
        self.folder = cache / ".steepest" / f"{kind}s--{name.replace('/', '--')}"

    def read(self, commit: str) -> Receipt | None:
        """The receipt of a commit; None if it is missing or cannot be read."""
        found = _load(self.folder / f"{commit}.json")
        try:
            files = tuple(RemoteFile(str(path), int(size), str(digest)) for path, size, digest in found["files"])
            checked = {str(path): int(time) for path, time in found["checked"].items()}
            return Receipt(self.cache / str(found["folder"]), Listing(commit, files), checked)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def latest(self, revision: str) -> Receipt | None:
        """The receipt of the commit that `revision` (a branch or a commit) meant when it was last fetched."""
        commit = _load(self.folder / "revisions.json").get(revision, revision)
        return self.read(str(commit))

    def of_folder(self, folder: Path) -> Receipt | None:
        """The receipt whose files are in `folder`, if there is one."""
        found = (self.read(path.stem) for path in sorted(self.folder.glob("*.json")))
        return next((receipt for receipt in found if receipt is not None and receipt.folder == folder), None)

    def write(self, revision: str, listing: Listing, folder: Path, checked: Sequence[RemoteFile]) -> None:
        """Record that the `checked` files of the listing are in `folder`. With no such files: a download has begun."""
        before = self.read(listing.commit)
        times = dict(before.checked) if before is not None and before.folder == folder else {}
        times |= {file.path: (folder / file.path).stat().st_mtime_ns for file in checked}
        self.folder.mkdir(parents=True, exist_ok=True)
        place = folder.relative_to(self.cache) if folder.is_relative_to(self.cache) else folder
        files = [[file.path, file.size, file.digest] for file in listing.files]
        _store(self.folder / f"{listing.commit}.json", {"folder": str(place), "files": files, "checked": times})
        if checked:
            revisions = _load(self.folder / "revisions.json")
            _store(self.folder / "revisions.json", {**revisions, revision: listing.commit})


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or a damaged one: the files are listed and checked again
        return {}
    return found if isinstance(found, dict) else {}


def _store(path: Path, content: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(content) + "\n")
