"""What the two hubs have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from steepest.config.types import Hub
from steepest.hub.files import Kind, Listing, RemoteFile


class HubClient(Protocol):
    """One repository on one hub. Every method raises whatever the hub's package raises."""

    cache: Path
    """The folder of the hub's cache."""
    newest: str
    """The branch that is meant where no revision is given."""
    checks: bool
    """Whether `download` itself compares every file with its checksum."""

    def list(self, revision: str) -> Listing:
        """The files of a branch, a tag or a commit."""
        ...

    def folder(self, revision: str, listing: Listing) -> Path:
        """Where `download` is going to put them."""
        ...

    def held(self, revision: str, listing: Listing, file: RemoteFile) -> int:
        """Bytes of the file that are in the cache already."""
        ...

    def download(self, revision: str, listing: Listing, patterns: Sequence[str]) -> Path:
        """Fetch what matches; files that are there stay. Returns the folder."""
        ...

    def discard(self, path: Path) -> None:
        """Take a damaged file out of the cache."""
        ...

    def copy_in_cache(self, revision: str, patterns: Sequence[str]) -> tuple[Path, str] | None:
        """(folder, commit or empty) of a copy that anyone left in the cache; not known to be whole."""
        ...


def open_client(hub: Hub, kind: Kind, name: str) -> HubClient:
    """The client for one repository. Raises HubFault where its package is missing."""
    if hub == "modelscope":
        from steepest.hub.modelscope import ModelScope

        return ModelScope(kind, name)
    from steepest.hub.huggingface import HuggingFace

    return HuggingFace(kind, name)
