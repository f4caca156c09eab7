"""ModelScope, over modelscope_hub (the full `modelscope` package installs it too).

That package reads MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE and MODELSCOPE_API_TOKEN at each call.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from steepest.hub.faults import HubFault, fault_of
from steepest.hub.files import Kind, Listing, RemoteFile

try:
    from modelscope_hub import HubApi, HubConfig
except ImportError:
    HubApi = HubConfig = None


class ModelScope:
    """One model or data set; see `client.HubClient`.

    The cache is models/OWNER--NAME/snapshots/REVISION. The folder of a branch is written over when the branch moves.
    """

    newest = "master"
    checks = True  # by the Sha256 of the listing, also files that were there before

    def __init__(self, kind: Kind, name: str) -> None:
        if HubApi is None:
            raise HubFault("package")
        if name.count("/") != 1:
            raise HubFault("name")
        self.kind, self.name = kind, name
        config = HubConfig()
        self.cache = Path(config.cache_dir)
        self._snapshots = self.cache / f"{kind}s" / name.replace("/", "--") / "snapshots"
        self._api: Any = HubApi(config=config)
        self._found = False
        self._raw: dict[str, list[dict[str, Any]]] = {}

    def list(self, revision: str) -> Listing:
        self._find_endpoint()
        try:
            with _without_log():
                raw = self._api.legacy.list_repo_files(self.name, self.kind, revision=revision, recursive=True)
        except Exception as error:
            if fault_of(error).what == "missing" and self._exists():
                raise HubFault("revision", f"no {revision}") from error
            raise
        files = [entry for entry in raw if entry.get("Type") != "tree"]
        listing = Listing(_commit(files), tuple(_remote_file(entry) for entry in files))
        self._raw[listing.commit] = raw
        return listing

    def folder(self, revision: str, listing: Listing) -> Path:
        return self._snapshots / revision

    def held(self, revision: str, listing: Listing, file: RemoteFile) -> int:
        path = self.folder(revision, listing) / file.path
        for candidate in (path, path.with_name(f"{path.name}.incomplete")):
            if candidate.is_file():
                return min(candidate.stat().st_size, file.size)
        return 0

    def download(self, revision: str, listing: Listing, patterns: Sequence[str]) -> Path:
        with _without_log():
            folder = self._api.download_repo(
                self.name,
                self.kind,
                revision=revision,
                allow_patterns=list(patterns),
                file_list=self._raw[listing.commit],
            )
        return Path(folder)

    def discard(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def copy_in_cache(self, revision: str, patterns: Sequence[str]) -> tuple[Path, str] | None:
        try:
            with _without_log():
                folder = self._api.download_repo(self.name, self.kind, revision=revision, local_files_only=True)
        except Exception as error:  # CacheNotFound of its own, and what reading a folder can raise
            if type(error).__name__ != "CacheNotFound":
                raise
            return None
        return Path(folder), ""

    def _find_endpoint(self) -> None:
        """Find the server that has the repository: MODELSCOPE_ENDPOINT, else modelscope.cn, else modelscope.ai."""
        if not self._found:
            endpoint = self._api.resolve_endpoint_for_read(self.name, repo_type=self.kind)
            self._api, self._found = HubApi(config=HubConfig(), endpoint=endpoint), True

    def _exists(self) -> bool:
        try:
            return bool(self._api.legacy.get_repo_info(self.name, self.kind))
        except Exception as error:
            if fault_of(error).what != "missing":
                raise
            return False


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    sha256 = entry.get("Sha256")
    return RemoteFile(str(entry["Path"]), int(entry.get("Size") or 0), f"sha256:{sha256}" if sha256 else "")


def _commit(files: Sequence[dict[str, Any]]) -> str:
    """The newest commit that changed one of the files, because the listing names no commit of its own.

    Where the hub names no commit at all, this is a name computed from the files' checksums.
    """
    dated = [(int(entry.get("CommittedDate") or 0), str(entry.get("Revision") or "")) for entry in files]
    newest = max(dated, default=(0, ""))[1]
    if newest and newest.isalnum():
        return newest
    told = "".join(sorted(f"{entry['Path']} {entry.get('Sha256')}\n" for entry in files))
    return f"files-{hashlib.sha256(told.encode()).hexdigest()[:16]}"


@contextmanager
def _without_log() -> Iterator[None]:
    """Hide the client's log of retries and failed files; when all retries fail, our error reports it once."""
    logger = logging.getLogger("modelscope_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
