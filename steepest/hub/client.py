"""The interface that the clients of both hubs implement."""

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
    """The default branch, used when no revision is given."""
    checks: bool
    """True if `download` itself compares every file with its checksum."""

    def list(self, revision: str) -> Listing:
        """The files of a branch, a tag or a commit."""
        ...

    def folder(self, revision: str, listing: Listing) -> Path:
        """The folder into which `download` puts the files."""
        ...

    def held(self, revision: str, listing: Listing, file: RemoteFile) -> int:
        """Number of bytes of the file that are already in the cache."""
        ...

    def download(self, revision: str, listing: Listing, patterns: Sequence[str]) -> Path:
        """Download the files that match a pattern and are not there yet. Returns the folder."""
        ...

    def discard(self, path: Path) -> None:
        """Remove a damaged file from the cache."""
        ...

    def copy_in_cache(self, revision: str, patterns: Sequence[str]) -> tuple[Path, str] | None:
        """(folder, commit or empty) of a copy that another program left in the cache. It may be incomplete."""
        ...


def open_client(hub: Hub, kind: Kind, name: str) -> HubClient:
    """The client for one repository. Raises HubFault where its package is missing."""
    if hub == "modelscope":
        from steepest.hub.modelscope import ModelScope

        return ModelScope(kind, name)
    from steepest.hub.huggingface import HuggingFace

    return HuggingFace(kind, name)
