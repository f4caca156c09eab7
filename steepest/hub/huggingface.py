"""The Hugging Face hub, over huggingface_hub. It reads HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import logging

from steepest.hub.files import Kind, Listing, RemoteFile


class HuggingFace:
    """One model or data set; see `client.HubClient`.

    The cache is models--OWNER--NAME/{blobs,refs,snapshots}. A snapshot holds links to blobs that are named by their
    checksum.
    """

    newest = "main"
    checks = False  # the client compares sizes only

    def __init__(self, kind: Kind, name: str) -> None:
        self.kind, self.name = kind, name
        self.cache = Path(constants.HF_HUB_CACHE)
        self._folder = self.cache / f"{kind}s--{name.replace('/', '--')}"

    def list(self, revision: str) -> Listing:
        info: Any = HfApi().repo_info(self.name, repo_type=self.kind, revision=revision, files_metadata=True)
        return Listing(info.sha, tuple(_remote_file(sibling) for sibling in info.siblings or ()))

    def folder(self, revision: str, listing: Listing) -> Path:
        return self._folder / "snapshots" / listing.commit

    def held(self, revision: str, listing: Listing, file: RemoteFile) -> int:
        blob = self._folder / "blobs" / file.digest.partition(":")[2]
        return file.size if file.digest and blob.is_file() else 0

    def download(self, revision: str, listing: Listing, patterns: Sequence[str]) -> Path:
        options: dict[str, Any] = {"repo_type": self.kind, "allow_patterns": list(patterns)}
        with _without_warnings():
            folder = Path(snapshot_download(self.name, revision=revision, **options))
            if folder.name != listing.commit:  # a new commit came in between
                folder = Path(snapshot_download(self.name, revision=listing.commit, **options))
        return folder

    def discard(self, path: Path) -> None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)

    def copy_in_cache(self, revision: str, patterns: Sequence[str]) -> tuple[Path, str] | None:
        options: dict[str, Any] = {"repo_type": self.kind, "allow_patterns": list(patterns), "local_files_only": True}
        try:
            folder = Path(snapshot_download(self.name, revision=revision, **options))
        except LocalEntryNotFoundError:  # none, or one that the client knows to be cut off
            return None
        return folder, folder.name


def _remote_file(sibling: Any) -> RemoteFile:
    lfs = sibling.lfs
    digest = f"sha256:{lfs.sha256}" if lfs is not None else f"git-sha1:{sibling.blob_id}" if sibling.blob_id else ""
    return RemoteFile(sibling.rfilename, int((lfs.size if lfs is not None else sibling.size) or 0), digest)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide the client's warning at every retry; when all retries fail, our error reports it once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
