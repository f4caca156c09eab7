"""What goes wrong with a hub and what the user reads.

`python -m tests.support.hub_faults` prints the table of docs/hubs.md.
"""

from __future__ import annotations

import contextlib
import io
import re
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from steepest.config.types import Hub
from steepest.errors import ModelError
from steepest.hub import Source, find
from tests.support.fake_hub import FakeHub, Fault
from tests.support.hub_world import (
    HUBS,
    file_path,
    hub_with_model,
    listing_path,
    set_offline,
    source,
    turn_to,
    without_waiting,
)
from tests.support.machine import disk_of


@dataclass
class Scene:
    """A fake hub with `owner/tiny`, the client under test, and its patches."""

    hub: FakeHub
    client: Hub
    cache: Path
    patch: pytest.MonkeyPatch
    source: Source

    def fault(self, **options: object) -> None:
        self.hub.faults.append(Fault(listing_path(self.client), **options))  # type: ignore[arg-type]

    def file_fault(self, **options: object) -> None:
        self.hub.faults.append(Fault("GET .*" + file_path(self.client, "model.safetensors"), **options))  # type: ignore[arg-type]


def missing(scene: Scene) -> None:
    scene.source = replace(scene.source, name="owner/missing")


def no_revision(scene: Scene) -> None:
    scene.source = replace(scene.source, revision="v9")


def wrong_token(scene: Scene) -> None:
    scene.hub.token = "right"
    scene.patch.setenv("HF_TOKEN", "wrong")
    scene.patch.setenv("MODELSCOPE_API_TOKEN", "wrong")


def gated(scene: Scene) -> None:
    scene.hub.repositories["models", "owner/tiny"].gated = True


def forbidden(scene: Scene) -> None:
    scene.fault(status=403)


def too_many_requests(scene: Scene) -> None:
    scene.fault(status=429, headers={"Retry-After": "0"})


def server_trouble(scene: Scene) -> None:
    scene.fault(status=503)


def no_network(scene: Scene) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        turn_to(f"http://127.0.0.1:{free.getsockname()[1]}", scene.cache, scene.patch)


def breaks_off(scene: Scene) -> None:
    # with some bytes each time, a client would go on from there each time
    scene.file_fault(cut_after=1000, times=1)
    scene.file_fault(cut_after=0)


def offline(scene: Scene) -> None:
    set_offline(scene.patch)


def little_room(scene: Scene) -> None:
    disk_of(scene.patch, total=10**9, free=10**6)


def disk_full(scene: Scene) -> None:
    """The room runs out while a file is written; the check before the download saw enough."""
    _download_fails(scene, OSError(28, "No space left on device"))


def unwritable(scene: Scene) -> None:
    scene.cache.mkdir(parents=True, exist_ok=True)
    _download_fails(scene, PermissionError(13, "Permission denied", "snapshots"))


def _download_fails(scene: Scene, error: OSError) -> None:
    def download(*_: object) -> Path:
        raise error

    scene.patch.setattr(f"steepest.hub.{scene.client}.{CLIENTS[scene.client]}.download", download)


def corrupt(scene: Scene) -> None:
    scene.file_fault(corrupt=True)


def no_id(scene: Scene) -> None:
    scene.source = replace(scene.source, name="owner/tiny@v1")


def no_package(scene: Scene) -> None:
    scene.patch.setattr("steepest.hub.modelscope.HubApi", None)


def only_gguf(scene: Scene) -> None:
    scene.hub.commit("models", "owner/quantised", {"q4.gguf": b"GGUF", "q8.gguf": b"GGUF"})
    scene.source = replace(scene.source, name="owner/quantised")


CLIENTS: dict[Hub, str] = {"huggingface": "HuggingFace", "modelscope": "ModelScope"}
CASES: dict[str, tuple[Callable[[Scene], None], tuple[Hub, ...]]] = {
    "no such model": (missing, HUBS),
    "no such revision": (no_revision, HUBS),
    "401, wrong token": (wrong_token, HUBS),
    "403, terms not accepted": (gated, HUBS),
    "403, no access": (forbidden, HUBS),
    "429, too many requests": (too_many_requests, HUBS),
    "503, server trouble": (server_trouble, HUBS),
    "no network": (no_network, HUBS),
    "connection breaks off again and again": (breaks_off, HUBS),
    "HF_HUB_OFFLINE, nothing in the cache": (offline, ("huggingface",)),
    "too little room": (little_room, HUBS),
    "disk full while writing": (disk_full, HUBS),
    "cache not writable": (unwritable, HUBS),
    "damaged on the way": (corrupt, HUBS),
    "not an id": (no_id, HUBS),
    "client not installed": (no_package, ("modelscope",)),
    "no files of a model": (only_gguf, HUBS),
}
"""Fault -> (what makes it, the hubs that can have it)."""


def message_of(case: str, client: Hub, folder: Path) -> str:
    """What the user reads when a model is fetched under this fault."""
    arrange, _ = CASES[case]
    with pytest.MonkeyPatch.context() as patch, hub_with_model() as hub:
        without_waiting(patch)
        turn_to(hub.url, folder / "cache", patch)
        scene = Scene(hub, client, folder / "cache", patch, source(client))
        arrange(scene)
        try:
            find(scene.source, note=lambda text: None)
        except ModelError as error:
            text = str(error).replace(str(folder), "FOLDER").replace(hub.url, "HUB")
            return re.sub(r"port=\d+", "port=PORT", text)
    raise AssertionError(f"{case}: nothing went wrong")


def main() -> None:
    print("| fault | hub | message |\n|---|---|---|")
    for case, (_, hubs) in CASES.items():
        for client in hubs:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                message = message_of(case, client, Path(folder))
            print(f"| {case} | {client} | {message.replace('|', '/')} |")


if __name__ == "__main__":
    sys.exit(main())
