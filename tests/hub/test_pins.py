"""A pin brings back the same files, or none: wherever the branch is now, and whatever is left in the cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from steepest.config.types import Hub
from steepest.errors import ModelError, render
from steepest.hub import Found, Pin, find
from tests.support.fake_hub import FakeHub
from tests.support.hub_world import HUBS, MODEL, file_path, source, turn_to

WEIGHTS = "model.safetensors"
OTHER = {**MODEL, WEIGHTS: MODEL[WEIGHTS][::-1]}
"""Other weights of the same size."""
both = pytest.mark.parametrize("client", HUBS)


@pytest.fixture
def pin(hub: FakeHub, client: Hub) -> Pin:
    found = find(source(client), note=lambda _: None)
    assert found.pin is not None
    return found.pin


def again(client: Hub, pin: Pin, notes: list[str] | None = None) -> Found:
    return find(source(client), pin=pin, note=(notes if notes is not None else []).append)


def weights(found: Found) -> bytes:
    return (found.path / WEIGHTS).read_bytes()


@both
def test_nothing_moved(hub: FakeHub, client: Hub, pin: Pin) -> None:
    hub.log.clear()
    notes: list[str] = []
    found = again(client, pin, notes)
    assert found.pin == pin and weights(found) == MODEL[WEIGHTS]
    assert len(notes) == 1 and notes[0].endswith("in the cache") and not hub.asked(file_path(client, WEIGHTS))


@both
def test_the_branch_has_moved_and_the_pin_wins(hub: FakeHub, client: Hub, pin: Pin) -> None:
    new = hub.commit("models", "owner/tiny", OTHER)
    notes: list[str] = []
    found = again(client, pin, notes)
    assert found.pin == pin and weights(found) == MODEL[WEIGHTS]
    title, branch = ("Hugging Face", "main") if client == "huggingface" else ("ModelScope", "master")
    assert notes[0].endswith("in the cache") and [render(note) for note in notes[1:]] == [
        f"path=owner/tiny: {branch} has moved on {title} to commit {new[:12]}; "
        f"this run goes on with {pin.commit[:12]}, with which it began."
    ]
    assert weights(find(source(client), note=lambda _: None)) == OTHER[WEIGHTS]  # a new run takes the new one


@both
@pytest.mark.parametrize("lost", ["cache gone", "another run fetched the new commit"])
def test_the_pinned_commit_is_fetched_again(hub: FakeHub, cache: Path, client: Hub, pin: Pin, lost: str) -> None:
    hub.commit("models", "owner/tiny", OTHER)
    if lost == "cache gone":
        shutil.rmtree(cache)
    else:
        assert weights(find(source(client), note=lambda _: None)) == OTHER[WEIGHTS]
    found = again(client, pin)
    assert weights(found) == MODEL[WEIGHTS]
    assert found.pin is not None and (found.pin.commit, found.pin.digests) == (pin.commit, pin.digests)


@both
def test_a_commit_that_changed_nothing_needed_is_as_good(hub: FakeHub, cache: Path, client: Hub, pin: Pin) -> None:
    hub.commit("models", "owner/tiny", {**MODEL, "README.md": b"# A new word"})
    del hub.repositories["models", "owner/tiny"].commits[pin.commit]  # as after a history that was rewritten
    shutil.rmtree(cache)
    assert weights(again(client, pin)) == MODEL[WEIGHTS]


@both
def test_a_commit_that_is_gone_is_an_error(hub: FakeHub, cache: Path, client: Hub, pin: Pin) -> None:
    hub.commit("models", "owner/tiny", OTHER)
    del hub.repositories["models", "owner/tiny"].commits[pin.commit]
    shutil.rmtree(cache)
    with pytest.raises(
        ModelError, match=f"began with commit {pin.commit} .*neither in the cache nor.*resume_mode=disable"
    ):
        again(client, pin)


@both
def test_the_same_commit_with_other_files_is_an_error(hub: FakeHub, cache: Path, client: Hub, pin: Pin) -> None:
    hub.commit("models", "owner/tiny", OTHER)
    hub.repositories["models", "owner/tiny"].commits[pin.commit] = dict(OTHER)
    shutil.rmtree(cache)
    with pytest.raises(ModelError, match="other checksums"):
        again(client, pin)
    find(source(client, revision=pin.commit), note=lambda _: None)  # nor when these are in the cache
    with pytest.raises(ModelError, match="other checksums"):
        again(client, pin)


@both
def test_without_a_network_the_pinned_copy_serves(
    hub: FakeHub, cache: Path, client: Hub, pin: Pin, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn_to("http://127.0.0.1:9", cache, monkeypatch)
    notes: list[str] = []
    assert again(client, pin, notes).pin == pin and notes[0].endswith("; what is in the cache is used.")
    shutil.rmtree(cache)
    with pytest.raises(ModelError, match="cannot be reached"):
        again(client, pin)


@both
def test_a_branch_that_was_deleted_does_not_matter(hub: FakeHub, cache: Path, client: Hub) -> None:
    first = next(iter(hub.repositories["models", "owner/tiny"].commits))
    found = find(source(client, revision=first), note=lambda _: None)
    assert found.pin is not None
    shutil.rmtree(cache)
    gone = find(source(client, revision="v1"), pin=found.pin, note=lambda _: None)
    assert weights(gone) == MODEL[WEIGHTS]
