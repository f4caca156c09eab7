"""From a name to a folder, over real downloads by both clients from a hub on loopback."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from steepest.config.types import Hub
from steepest.errors import DataError, ModelError, render
from steepest.hub import TOKENIZER_FILES, Source, find
from tests.support.fake_hub import FakeHub, Fault
from tests.support.hub_world import (
    HUBS,
    MODEL,
    NEEDED,
    cached_files,
    file_path,
    listing_path,
    set_huggingface,
    set_offline,
    source,
    turn_to,
)

WEIGHTS = "model.safetensors"
both = pytest.mark.parametrize("client", HUBS)


def take(client: Hub, notes: list[str] | None = None, **options: object) -> Path:
    return find(source(client), note=(notes if notes is not None else []).append, **options).path  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# -- what lies on this machine ----------------------------------------------------------------------------------------


def on_this_machine(name: object) -> Path:
    return find(Source(str(name), "huggingface", key="model.path")).path


def test_a_local_folder_is_itself_and_has_no_pin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = find(Source(str(tmp_path), "modelscope"))
    assert found.path == tmp_path and found.pin is None


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert on_this_machine(tmp_path) == tmp_path / "a.gguf" == on_this_machine(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ModelError, match=r"^model\.path: .*holds 2 \.gguf files"):
        on_this_machine(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "~/no-such-model", "a/b/c", "model.gguf"])
def test_a_path_that_is_not_there_is_called_a_path(name: str) -> None:
    with pytest.raises(ModelError, match=r"^model\.path: .*no such folder or file"):
        on_this_machine(name)
    with pytest.raises(DataError, match="no such folder or file"):
        find(Source(name, "huggingface"), kind="dataset")


# -- downloads --------------------------------------------------------------------------------------------------------


@both
def test_what_is_needed_is_downloaded_once(hub: FakeHub, cache: Path, client: Hub) -> None:
    notes: list[str] = []
    found = find(source(client), note=notes.append)
    assert content(found.path) == {name: MODEL[name] for name in NEEDED}
    commit = next(iter(hub.repositories["models", "owner/tiny"].commits))
    assert found.pin is not None and found.pin.commit == commit
    assert [path for path, _ in found.pin.digests] == ["config.json", "tokenizer.json", "model.safetensors"]
    title, branch = ("Hugging Face", "main") if client == "huggingface" else ("ModelScope", "master")
    where = cache / ("hf" if client == "huggingface" else "ms")
    label = "path=owner/tiny"
    at = f"{title}, {branch} = commit {commit[:12]}"
    assert [render(note) for note in notes] == [
        f"{label}: downloading 262.2 kB of 262.2 kB from {at}, to {where}",
        f"{label}: {at}, 262.2 kB, downloaded and checked",
    ]
    hub.log.clear()
    assert find(source(client), note=notes.append) == found
    assert [render(note) for note in notes[2:]] == [f"{label}: {at}, 262.2 kB, in the cache"]
    assert len(hub.log) == 1 and hub.asked(listing_path(client))  # one question: what is the newest commit?


@both
def test_a_tokenizer_alone_comes_without_the_weights(hub: FakeHub, client: Hub) -> None:
    folder = take(client, files=TOKENIZER_FILES)
    assert sorted(content(folder)) == ["config.json", "tokenizer.json"]
    hub.log.clear()
    notes: list[str] = []
    assert sorted(content(take(client, notes))) == NEEDED
    assert hub.asked(file_path(client, WEIGHTS)) and not hub.asked(file_path(client, "tokenizer.json"))
    assert "downloading 262.1 kB of 262.2 kB" in notes[0]


@both
def test_a_commit_or_branch_can_be_asked_for(hub: FakeHub, client: Hub) -> None:
    first = next(iter(hub.repositories["models", "owner/tiny"].commits))
    second = hub.commit("models", "owner/tiny", {**MODEL, WEIGHTS: b"new weights"})
    assert content(take(client))[WEIGHTS] == b"new weights"
    found = find(source(client, revision=first), note=lambda _: None)
    assert content(found.path)[WEIGHTS] == MODEL[WEIGHTS]
    assert found.pin is not None and found.pin.commit == first != second


@both
def test_a_cut_download_goes_on_where_it_stopped(hub: FakeHub, client: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # it resumes from whole chunks, of 10 MB unless this is set
    set_huggingface(monkeypatch, {"DOWNLOAD_CHUNK_SIZE": 50_000})
    hub.faults.append(Fault("GET .*" + file_path(client, WEIGHTS), cut_after=100_000, times=1))
    assert content(take(client))[WEIGHTS] == MODEL[WEIGHTS]
    asked = [entry.range for entry in hub.asked(file_path(client, WEIGHTS)) if entry.method == "GET"]
    assert asked == [None, "bytes=100000-"]


@both
def test_after_a_broken_start_the_next_one_goes_on(hub: FakeHub, client: Hub) -> None:
    hub.faults += [
        Fault("GET .*" + file_path(client, WEIGHTS), cut_after=100_000, times=1),
        Fault("GET .*" + file_path(client, WEIGHTS), cut_after=0),
    ]
    with pytest.raises(ModelError, match="the connection broke off"):
        take(client)
    hub.faults.clear()
    hub.log.clear()
    assert content(take(client))[WEIGHTS] == MODEL[WEIGHTS]
    asked = [entry.range for entry in hub.asked(file_path(client, WEIGHTS)) if entry.method == "GET"]
    # files that are whole are kept; of the broken one ModelScope's client keeps its part, huggingface_hub's does not
    assert asked == ["bytes=100000-" if client == "modelscope" else None]
    assert not hub.asked(file_path(client, "config.json"))


@both
def test_a_damaged_file_is_an_error_and_not_left_in_the_cache(hub: FakeHub, cache: Path, client: Hub) -> None:
    hub.faults.append(Fault("GET .*" + file_path(client, WEIGHTS), corrupt=True))
    with pytest.raises(ModelError, match=r"a file arrived damaged and was thrown away \(model\.safetensors: "):
        take(client)
    assert len([entry for entry in hub.asked(file_path(client, WEIGHTS)) if entry.method == "GET"]) >= 2
    assert len(MODEL[WEIGHTS]) not in [path.stat().st_size for path in cached_files(cache)]
    hub.faults.clear()
    assert content(take(client))[WEIGHTS] == MODEL[WEIGHTS]


@both
def test_a_file_damaged_in_the_cache_is_fetched_again(hub: FakeHub, client: Hub) -> None:
    path = (take(client) / WEIGHTS).resolve()
    path.write_bytes(b"\1" + MODEL[WEIGHTS][1:])
    os.utime(path, ns=(0, time.time_ns() + 10**9))
    assert content(take(client))[WEIGHTS] == MODEL[WEIGHTS]


def test_a_commit_that_comes_between_listing_and_download_is_not_mixed_in(hub: FakeHub) -> None:
    def move() -> None:
        hub.commit("models", "owner/tiny", {**MODEL, WEIGHTS: MODEL[WEIGHTS][::-1]})

    hub.faults.append(Fault("GET .*" + listing_path("huggingface"), meanwhile=move, times=1))
    commits = hub.repositories["models", "owner/tiny"].commits
    first = next(iter(commits))
    found = find(source("huggingface"), note=lambda _: None)
    assert len(commits) == 2
    assert found.pin is not None and found.pin.commit == first and content(found.path)[WEIGHTS] == MODEL[WEIGHTS]


def test_a_dataset_is_fetched_by_its_patterns(hub: FakeHub) -> None:
    hub.commit("datasets", "owner/sums", {"main/train.parquet": b"PAR1", "other/train.parquet": b"PAR1", "x.md": b""})
    for client in HUBS:
        found = find(source(client, "owner/sums"), kind="dataset", files=["main/*.parquet"], note=lambda _: None)
        assert [path.relative_to(found.path).as_posix() for path in found.path.rglob("*.parquet")] == [
            "main/train.parquet"
        ]
        with pytest.raises(DataError, match="without the files of a model .it holds main/train.parquet"):
            find(source(client, "owner/sums"), kind="dataset", files=["*.csv"], note=lambda _: None)


@both
def test_weights_that_are_no_safetensors_are_not_a_model(hub: FakeHub, client: Hub) -> None:
    hub.commit("models", "owner/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    with pytest.raises(ModelError, match="without the files of a model .it holds config.json, pytorch_model.bin"):
        find(source(client, "owner/old"))


# -- without a network ------------------------------------------------------------------------------------------------


def disconnect(hub: FakeHub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    turn_to("http://127.0.0.1:9", cache, patch)  # nobody listens on the port of `discard`


@both
def test_without_a_network_the_cache_serves_and_says_so(
    hub: FakeHub, cache: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find(source(client), note=lambda _: None)
    disconnect(hub, cache, monkeypatch)
    notes: list[str] = []
    assert find(source(client), note=notes.append) == found
    assert "does not answer as it should (" in notes[0] and notes[0].endswith("; what is in the cache is used.")
    assert notes[1].endswith("262.2 kB, in the cache") and len(notes) == 2
    with pytest.raises(ModelError, match="cannot be reached"):  # another revision was never fetched
        find(source(client, revision="v2"))


@both
def test_a_server_in_trouble_is_like_no_network(hub: FakeHub, client: Hub) -> None:
    take(client)
    hub.faults.append(Fault(listing_path(client), status=503))
    notes: list[str] = []
    take(client, notes)
    assert "(HTTP 503); what is in the cache is used." in notes[0]
    hub.faults[0].status = 403  # but not one who says no
    with pytest.raises(ModelError, match="refuses access"):
        take(client)


def test_hf_hub_offline_uses_the_cache(hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = take("huggingface")
    set_offline(monkeypatch)
    notes: list[str] = []
    hub.log.clear()
    assert take("huggingface", notes) == folder and hub.log == []
    assert "HF_HUB_OFFLINE is set; what is in the cache is used." in notes[0]


@both
def test_half_a_download_is_not_taken_for_a_whole_one(
    hub: FakeHub, cache: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(client, files=TOKENIZER_FILES)
    disconnect(hub, cache, monkeypatch)
    take(client, files=TOKENIZER_FILES)
    with pytest.raises(ModelError, match="cannot be reached"):
        take(client)


@both
def test_a_download_that_broke_off_is_not_taken_for_another_programs(
    hub: FakeHub, cache: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(Fault("GET .*" + file_path(client, WEIGHTS), cut_after=0))
    with pytest.raises(ModelError, match="the connection broke off"):
        take(client)
    shutil.rmtree(cache / "hf" / "models--owner--tiny" / "trees", ignore_errors=True)  # older clients keep none
    disconnect(hub, cache, monkeypatch)
    with pytest.raises(ModelError, match="cannot be reached"):
        take(client)


def test_when_a_newer_commit_broke_off_the_older_one_still_serves(
    hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = take("huggingface")  # ModelScope's client writes over the folder of a branch
    hub.commit("models", "owner/tiny", {**MODEL, WEIGHTS: MODEL[WEIGHTS][::-1]})
    hub.faults.append(Fault("GET .*" + file_path("huggingface", WEIGHTS), cut_after=0))
    with pytest.raises(ModelError, match="the connection broke off"):
        take("huggingface")
    disconnect(hub, cache, monkeypatch)
    assert take("huggingface") == before and content(before)[WEIGHTS] == MODEL[WEIGHTS]


@both
def test_a_cache_can_be_carried_to_another_machine(
    hub: FakeHub, cache: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(client)
    carried = cache.with_name("carried")
    shutil.copytree(cache, carried, symlinks=True, copy_function=shutil.copyfile)  # without the files' times
    disconnect(hub, carried, monkeypatch)
    folder = take(client)
    assert folder.is_relative_to(carried) and content(folder)[WEIGHTS] == MODEL[WEIGHTS]
    (folder / WEIGHTS).resolve().write_bytes(b"\1" + MODEL[WEIGHTS][1:])  # a bad copy, of the right size
    with pytest.raises(ModelError, match="cannot be reached"):
        take(client)


@both
def test_what_another_program_downloaded_is_used_with_a_warning(
    hub: FakeHub, cache: Path, client: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    if client == "huggingface":
        from huggingface_hub import snapshot_download
    else:
        from modelscope_hub.compat import snapshot_download
    there = Path(snapshot_download("owner/tiny"))
    disconnect(hub, cache, monkeypatch)
    notes: list[str] = []
    assert take(client, notes) == there
    assert "not known whether it is whole" in notes[-1]


# -- caches -----------------------------------------------------------------------------------------------------------


@both
def test_receipts_that_cannot_be_read_are_made_anew(hub: FakeHub, cache: Path, client: Hub) -> None:
    take(client)
    receipts = list(cache.glob("*/.steepest/models--owner--tiny/*.json"))
    assert len(receipts) == 2
    for receipt in receipts:
        receipt.write_text("{")
    notes: list[str] = []
    take(client, notes)
    assert notes[-1].endswith("262.2 kB, checked") and len(notes) == 1


@both
def test_a_receipt_that_cannot_be_written_is_no_error(hub: FakeHub, cache: Path, client: Hub) -> None:
    base = cache / ("hf" if client == "huggingface" else "ms")
    base.mkdir(parents=True)
    (base / ".steepest").write_text("in the way")
    notes: list[str] = []
    assert content(take(client, notes))[WEIGHTS] == MODEL[WEIGHTS]
    assert "the files are checked again at the next start" in notes[-2]
