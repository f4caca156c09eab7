"""Both clients turned towards a fake hub, with a cache of their own and without waiting between retries."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from steepest.config.types import Hub
from steepest.hub import Source
from tests.support.fake_hub import FakeHub, Files

HUBS: tuple[Hub, ...] = ("huggingface", "modelscope")
MODEL: Files = {
    "config.json": b'{"model_type": "qwen2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 1024,
    "README.md": b"# Not needed",
    "pytorch_model.bin": b"never fetched",
}
"""A model that downloads but does not load."""
NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]


def turn_to(url: str, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let both clients use `url` as their hub and `cache` as their cache. Without their settings of the machine."""
    for name in list(os.environ):
        if name.startswith(("HF_", "MODELSCOPE_", "HUGGING_FACE")) or name.endswith("_USE_MODELSCOPE"):
            patch.delenv(name)
    patch.setenv("NO_PROXY", "127.0.0.1")
    read = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hf"),
        "HF_TOKEN_PATH": str(cache / "no-token"),
        "HF_HUB_OFFLINE": False,
    }
    set_huggingface(patch, read)
    patch.setenv("MODELSCOPE_ENDPOINT", url)
    patch.setenv("MODELSCOPE_CACHE", str(cache / "ms"))
    patch.setenv("MODELSCOPE_HOME", str(cache / "ms-home"))


def set_huggingface(patch: pytest.MonkeyPatch, values: Mapping[str, object]) -> None:
    """Constants of huggingface_hub, which reads its variables when it is imported (modelscope_hub at each call)."""
    for name, value in values.items():
        patch.setattr(f"huggingface_hub.constants.{name}", value)


def set_offline(patch: pytest.MonkeyPatch) -> None:
    """As HF_HUB_OFFLINE=1 does."""
    set_huggingface(patch, {"HF_HUB_OFFLINE": True})


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    sleep = time.sleep
    patch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    pytest.importorskip("modelscope_hub")
    for name in (
        "_download.DOWNLOAD_RETRY_MAX_DELAY_SECONDS",
        "_download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF",
        "_legacy_api.REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS",
    ):
        patch.setattr(f"modelscope_hub.{name}", 0)


def source(hub: Hub, name: str = "owner/tiny", revision: str | None = None) -> Source:
    return Source(name, hub, revision=revision)


def file_path(hub: Hub, file: str, name: str = "owner/tiny") -> str:
    """A pattern of the requests for a file's content, for `Fault.match` and `FakeHub.asked`."""
    return rf"/{name}/resolve/\w+/{file}" if hub == "huggingface" else rf"/{name}/repo\?.*FilePath={file}"


def listing_path(hub: Hub, name: str = "owner/tiny") -> str:
    """A pattern of the requests for the list of files."""
    return rf"/api/models/{name}/" if hub == "huggingface" else rf"/{name}/repo/files"


def cached_files(cache: Path) -> list[Path]:
    """Every file with content under a cache: no locks, receipts or records of the clients."""
    files = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.name in MODEL or path.parent.name == "blobs"]


def hub_with_model() -> FakeHub:
    hub = FakeHub()
    hub.commit("models", "owner/tiny", MODEL)
    return hub
