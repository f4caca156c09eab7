"""Data sets of a hub: which files a name means, over both hubs' real clients and a hub on this machine."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from steepest.config.types import Hub
from steepest.data.hub_sets import FOR_VALIDATION, HubSet, local_files, parse
from steepest.data.prompts import load_prompts
from steepest.errors import DataError
from tests.support.fake_hub import FakeHub
from tests.support.hub_world import HUBS, set_offline, turn_to, without_waiting

CONFIGS = b"""---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files:
  - split: train
    path: socratic/train-*
---
# GSM8K
"""


def parquet(*rows: dict[str, str]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def lines(*rows: dict[str, str]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def row(number: int) -> dict[str, str]:
    return {"question": f"What is {number}?", "answer": f"{number}\n#### {number}"}


SHARDED = {
    "README.md": CONFIGS,
    "main/train-00000-of-00002.parquet": parquet(row(1)),
    "main/train-00001-of-00002.parquet": parquet(row(2)),
    "main/test-00000-of-00001.parquet": parquet(row(3)),
    "socratic/train-00000-of-00001.parquet": parquet(row(4)),
}
PLAIN = {
    "data/train.jsonl": lines({"prompt": "A", "answer": "1"}),
    "data/val.jsonl": lines({"prompt": "B", "answer": "2"}),
    "data/test.csv": b"prompt,answer\nC,3\n",
    "dataset_infos.json": b"{}",
    "load.py": b"",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    without_waiting(monkeypatch)
    with FakeHub() as hub:
        hub.commit("datasets", "owner/sharded", SHARDED)
        hub.commit("datasets", "owner/plain", PLAIN)
        hub.commit("datasets", "owner/script", {"load.py": b"", "README.md": b"# x"})
        turn_to(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


def files_of(name: str, *, hub: Hub = "huggingface", validation: bool = False) -> list[str]:
    """Paths below the copy of the repository."""
    splits = FOR_VALIDATION if validation else ("train",)
    found = local_files([name], hub=hub, key="data.train_files", splits=splits, note=lambda _: None)
    return ["/".join(Path(file).parts[-2:]) for file in found]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("openai/gsm8k", HubSet("openai/gsm8k")),
        ("openai/gsm8k:main:train", HubSet("openai/gsm8k", None, ("main", "train"))),
        ("openai/gsm8k@abc1:test", HubSet("openai/gsm8k", "abc1", ("test",))),
        ("data/train.parquet", None),
        ("data/train.jsonl.gz", None),
        ("/data/set", None),
        ("a/b/c", None),
        ("plain", None),
    ],
)
def test_what_is_a_data_set_and_what_a_file(name: str, meant: HubSet | None) -> None:
    assert parse(name) == meant


@pytest.mark.parametrize("on", HUBS)
def test_configs_of_the_readme_name_the_files(hub: FakeHub, on: Hub) -> None:
    train = ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]
    assert files_of("owner/sharded:main:train", hub=on) == train
    assert files_of("owner/sharded:main", hub=on) == train
    assert files_of("owner/sharded:main", hub=on, validation=True) == ["main/test-00000-of-00001.parquet"]
    assert not hub.asked("socratic/train")


def test_names_of_files_without_a_readme(hub: FakeHub) -> None:
    assert files_of("owner/plain") == ["data/train.jsonl"]
    assert files_of("owner/plain", validation=True) == ["data/val.jsonl"]
    assert files_of("owner/plain:test") == ["data/test.csv"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/sharded", "several configs, and none is the default. There are main:train, main:test, socratic:train."),
        ("owner/sharded:other:train", "the data set has no config 'other'. There are main:train, main:test,"),
        ("owner/sharded:main:dev", "no split 'dev' in config 'main'. There are main:train, main:test, socratic:train."),
        ("owner/sharded:a:b:c", "expected data.train_files=owner/sharded:CONFIG:SPLIT."),
        ("owner/plain:dev", "no split 'dev' in config 'default'. There are default:train, default:"),
        ("owner/script", "no file that is read (.parquet, .jsonl, .json, .csv, .tsv); it holds load.py, README.md."),
        ("owner/nowhere", "data.train_files=owner/nowhere"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(hub: FakeHub, name: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        files_of(name)
    assert message in str(caught.value)


def test_rows_of_a_hub_are_rows_as_any_and_stay_without_a_network(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    names = ["owner/sharded:main:train", "owner/plain"]
    files = local_files(names, hub="huggingface", key="data.train_files", note=notes.append)
    rows = load_prompts(files, needs_source=False, note=lambda _: None)
    assert [row.ground_truth for row in rows] == ["1", "2", "1"]
    assert [row.uid for row in rows] == ["train:0", "train#2:0", "train#3:0"]
    assert notes[0] == "data.train_files=owner/sharded:main:train: config 'main', split 'train', 2 files"
    set_offline(monkeypatch)
    assert local_files(names, hub="huggingface", key="data.train_files", note=notes.append) == files
