"""`find` turns a model or data set that the user names into a folder (or GGUF file) on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from steepest.config.types import Hub
from steepest.console import say
from steepest.errors import DataError, ModelError, SteepestError, setting
from steepest.hub.client import HubClient, open_client
from steepest.hub.faults import NAMES, UNREACHABLE, HubFault, Source, fault_of, sentence
from steepest.hub.files import MODEL_FILES, Kind, Listing, RemoteFile, human, require_room, total, what_is_wrong
from steepest.hub.local import local_model, looks_like_a_path
from steepest.hub.receipts import Receipt, Receipts

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.\-]*(/[A-Za-z0-9_][\w.\-]*)?")


@dataclass(frozen=True)
class Pin:
    """The hub, repository, commit and files that a name meant when it was looked up, to get the same files again."""

    name: str
    hub: Hub
    revision: str | None
    commit: str
    digests: tuple[tuple[str, str], ...] = ()
    """(path, checksum) of the files that were taken; empty for a copy in the cache whose checksums are not known."""

    def agrees(self, listing: Listing, patterns: Sequence[str]) -> bool:
        """True if the needed files of the listing are the files that were taken."""
        taken, there = dict(self.digests), {file.path for file in listing.files}
        same = all(taken.get(file.path, file.digest) == file.digest for file in listing.wanted(patterns))
        return same and there.issuperset(taken)


@dataclass(frozen=True)
class Found:
    """A folder or GGUF file on this machine. The pin is None where the user gave a local path."""

    path: Path
    pin: Pin | None = None


def find(
    source: Source,
    *,
    kind: Kind = "model",
    files: Sequence[str] = MODEL_FILES,
    pin: Pin | None = None,
    note: Callable[[str], None] = say,
) -> Found:
    """Return a local path as it is; look up any other name on a hub, and take it from the hub's cache or download it.

    `files`: patterns of the needed files. `pin`: what the name meant at an earlier start; the same files are taken
    again, or none. `note` is called with one line that says what was taken and where from. Raises ModelError or
    DataError, which name the setting, the fault and the remedy.
    """
    wrong: type[SteepestError] = ModelError if kind == "model" else DataError
    local = Path(source.name).expanduser()
    if local.exists() or looks_like_a_path(source.name):
        return Found(_local(source, kind, local))
    try:
        if not _HUB_ID.fullmatch(source.name):
            raise HubFault("name")
        fetch = _Fetch(source, open_client(source.hub, kind, source.name), kind, tuple(files), note)
        found = fetch.newest() if pin is None else fetch.pinned(pin)
    except SteepestError:
        raise
    except Exception as error:  # the clients raise types of their own, of their HTTP libraries and of the system
        raise wrong(sentence(fault_of(error), source)) from error
    return Found(_local(source, kind, found.path), found.pin)


def paths_of(source: Source, *, kind: Kind = "model") -> tuple[str, ...]:
    """Paths of the files that a repository holds. If the hub cannot be reached: the paths that were fetched last.

    Raises ModelError or DataError, as `find` does.
    """
    wrong: type[SteepestError] = ModelError if kind == "model" else DataError
    try:
        client = open_client(source.hub, kind, source.name)
        revision = source.revision or client.newest
        try:
            listing = client.list(revision)
        except Exception as error:
            kept = Receipts(client.cache, kind, source.name).latest(revision)
            if kept is None or fault_of(error).what not in UNREACHABLE:
                raise
            listing = kept.listing
    except SteepestError:
        raise
    except Exception as error:  # as in `find`
        raise wrong(sentence(fault_of(error), source)) from error
    return tuple(file.path for file in listing.files)


def _local(source: Source, kind: Kind, path: Path) -> Path:
    if kind == "dataset":
        if not path.exists():
            raise DataError(f"{source.label}: there is no such folder or file (looked for {path.absolute()}).")
        return path
    try:
        return local_model(path)
    except ModelError as error:
        raise ModelError(f"{source.key}: {error.marked}") from error


class _Fetch:
    """One look-up of a repository on a hub."""

    def __init__(
        self, source: Source, client: HubClient, kind: Kind, patterns: tuple[str, ...], note: Callable[[str], None]
    ) -> None:
        self.source, self.client, self.patterns, self.note = source, client, patterns, note
        self.revision = source.revision or client.newest
        self.title = NAMES[source.hub].title
        self.receipts = Receipts(client.cache, kind, source.name)
        self.is_pinned = False
        """True if the commit may differ from the present commit of the revision."""

    def newest(self) -> Found:
        """The present commit of the revision; without a network, the commit that was fetched last."""
        try:
            listing = self.client.list(self.revision)
        except Exception as error:
            return self._from_cache(self.revision, fault_of(error), error)
        return self._bring(self.revision, listing)

    def pinned(self, pin: Pin) -> Found:
        """The files of the pin, from the cache or from the hub."""
        self.is_pinned = True
        kept = self.receipts.read(pin.commit)
        if kept is not None and not (self._is_whole(kept) and pin.agrees(kept.listing, self.patterns)):
            kept = None
        try:
            now = self.client.list(self.revision)
        except Exception as error:
            fault = fault_of(error)
            if kept is None and fault.what != "revision":
                return self._from_cache(pin.commit, fault, error)
            self._tell_unreachable(fault)
            return self._kept(kept) if kept is not None else self._fetch_pinned(pin)
        if kept is None and pin.agrees(now, self.patterns):
            return self._bring(self.revision, now)
        found = self._kept(kept) if kept is not None else self._fetch_pinned(pin)
        if now.commit != pin.commit:
            self.note(
                f"{self.source.label}: {self.revision} has moved on {self.title} to commit {now.commit[:12]}; this run "
                f"goes on with {pin.commit[:12]}, with which it began."
            )
        return found

    def _fetch_pinned(self, pin: Pin) -> Found:
        lost = (
            f"{self.source.label}: this run began with commit {pin.commit} of {self.title}, and the files of that are "
            "neither in the cache nor on the hub any more{}. Bring them back, or start a run of its own with "
            f"{setting('resume_mode')}=disable or another {setting('experiment_name')}."
        )
        try:
            listing = self.client.list(pin.commit)
        except Exception as error:
            fault = fault_of(error)
            if fault.what in ("missing", "revision"):
                raise ModelError(lost.format(f" ({fault.detail})")) from error
            raise
        if not pin.agrees(listing, self.patterns):
            raise ModelError(lost.format(": what it offers as that commit has other checksums"))
        return self._bring(pin.commit, listing)

    def _bring(self, revision: str, listing: Listing) -> Found:
        """The files of a listing; those that are not in the cache are downloaded and checked."""
        wanted = self._wanted(listing)
        kept = self.receipts.read(listing.commit)
        if kept is not None and kept.holds(wanted):
            return self._kept(kept)
        missing = sum(file.size - self.client.held(revision, listing, file) for file in wanted)
        require_room(self.client.cache, missing)
        if missing:
            self.note(
                f"{self.source.label}: downloading {human(missing)} of {human(total(wanted))} from {self.title}, "
                f"{self._at(listing.commit)}, to {self.client.cache}"
            )
        self._note_down(
            revision, listing, self.client.folder(revision, listing), ()
        )  # so a broken one is known as such
        folder = self._download(revision, listing, wanted)
        self._note_down(revision, listing, folder, wanted)
        return self._tell(folder, listing.commit, "downloaded and checked" if missing else "checked", wanted)

    def _note_down(self, revision: str, listing: Listing, folder: Path, checked: Sequence[RemoteFile]) -> None:
        try:
            self.receipts.write(revision, listing, folder, checked)
        except OSError as error:  # a cache that is shared and may only be read
            if checked:
                self.note(f"{self.source.label}: the files are checked again at the next start: {error}")

    def _wanted(self, listing: Listing) -> tuple[RemoteFile, ...]:
        wanted = listing.wanted(self.patterns)
        weights = "*.safetensors"
        if not wanted or (weights in self.patterns and not listing.wanted([weights])):
            there = ", ".join(file.path for file in listing.files[:8]) or "nothing"
            raise HubFault("files", f"it holds {there}")
        return wanted

    def _download(self, revision: str, listing: Listing, wanted: Sequence[RemoteFile]) -> Path:
        """Download and check files. A damaged file, from this or an earlier download, is downloaded once more."""
        for is_last in (False, True):
            folder = self.client.download(revision, listing, self.patterns)
            if self.client.checks:
                break
            wrong = {file.path: fault for file in wanted if (fault := what_is_wrong(folder / file.path, file))}
            for path in wrong:
                self.client.discard(folder / path)
            if not wrong:
                break
            if is_last:
                raise HubFault("corrupt", "; ".join(wrong.values()))
        return folder

    def _from_cache(self, revision: str, fault: HubFault, error: Exception) -> Found:
        """The copy in the cache, for a hub that cannot be reached. Raises `error` if there is no usable copy."""
        if fault.what not in UNREACHABLE:
            raise error
        kept = self.receipts.latest(revision)
        if kept is not None and self._is_whole(kept):
            self._tell_unreachable(fault)
            return self._kept(kept)
        copy = self.client.copy_in_cache(revision, self.patterns)
        if copy is None or self.receipts.of_folder(copy[0]) is not None:  # known to be cut off or damaged
            raise error
        self._tell_unreachable(fault)
        folder, commit = copy
        self.note(
            f"{self.source.label}: taken from {folder} as it lies. Another program downloaded it, so it is not known "
            "whether it is whole."
        )
        pin = Pin(self.source.name, self.source.hub, self.source.revision, commit) if commit else None
        return Found(folder, pin)

    def _is_whole(self, kept: Receipt) -> bool:
        wanted = kept.listing.wanted(self.patterns)
        return bool(wanted) and kept.holds(wanted)

    def _kept(self, kept: Receipt) -> Found:
        return self._tell(kept.folder, kept.listing.commit, "in the cache", kept.listing.wanted(self.patterns))

    def _tell(self, folder: Path, commit: str, state: str, files: Sequence[RemoteFile]) -> Found:
        self.note(f"{self.source.label}: {self.title}, {self._at(commit)}, {human(total(files))}, {state}")
        digests = tuple((file.path, file.digest) for file in files)
        return Found(folder, Pin(self.source.name, self.source.hub, self.source.revision, commit, digests))

    def _tell_unreachable(self, fault: HubFault) -> None:
        reason = "HF_HUB_OFFLINE is set" if fault.what == "offline" else f"{self.title} does not answer as it should"
        detail = f" ({fault.detail})" if fault.detail and fault.what != "offline" else ""
        self.note(f"{self.source.label}: {reason}{detail}; what is in the cache is used.")

    def _at(self, commit: str) -> str:
        named = commit != self.revision and not self.is_pinned
        return f"{self.revision} = commit {commit[:12]}" if named else f"commit {commit[:12]}"
