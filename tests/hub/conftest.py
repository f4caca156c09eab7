from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_hub import FakeHub
from tests.support.hub_world import hub_with_model, turn_to, without_waiting


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with `owner/tiny`, to which both clients turn; caches under tmp_path/cache."""
    without_waiting(monkeypatch)
    with hub_with_model() as hub:
        turn_to(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
