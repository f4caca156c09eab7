"""GSM8K to parquet: columns, types and texts as the reference has them; hubs that do not answer."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from steepest.data.prepare import gsm8k
from steepest.data.prepare.gsm8k import prepare_gsm8k
from steepest.data.prompts import load_prompts
from steepest.errors import ConfigError, DataError
from tests.support.fake_hub import FakeHub, Fault
from tests.support.hub_world import turn_to, without_waiting

SCRIPT = Path(__file__).parents[3] / "examples" / "data_preprocess" / "gsm8k.py"
TRAIN = {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}
TEST = {"question": "How much?", "answer": "It is less.\n#### -3.5"}
SCHEMA = [
    ("data_source", "string"),
    ("prompt", "list<struct<content: string, role: string>>"),
    ("ability", "string"),
    ("reward_model", "struct<ground_truth: string, style: string>"),
    ("extra_info", "struct<answer: string, index: int64, question: string, split: string>"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "train.jsonl").write_text(json.dumps(TRAIN) + "\n" + json.dumps(TEST) + "\n")
    (folder / "test.jsonl").write_text(json.dumps(TEST) + "\n")
    return folder


def type_names(schema: Any) -> list[tuple[str, str]]:
    """(column, type) without the name that Arrow gives the entries of a list."""
    names = [(field.name, str(field.type)) for field in schema]
    return [(name, kind.replace("element: ", "").replace("item: ", "")) for name, kind in names]


def test_two_files_with_the_reference_columns(source: Path, tmp_path: Path) -> None:
    written = prepare_gsm8k(tmp_path / "out", source)
    assert {split: (file.path.name, file.num_rows) for split, file in written.items()} == {
        "train": ("train.parquet", 2),
        "test": ("test.parquet", 1),
    }
    table = pyarrow.parquet.read_table(written["train"].path)
    assert type_names(table.schema) == SCHEMA
    first, second = table.to_pylist()
    suffix = ' Let\'s think step by step and output the final answer after "####".'
    assert first == {
        "data_source": "openai/gsm8k",
        "prompt": [{"content": "How many clips?" + suffix, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": "1024", "style": "rule"},
        "extra_info": {"answer": TRAIN["answer"], "index": 0, "question": "How many clips?", "split": "train"},
    }
    assert (second["reward_model"]["ground_truth"], second["extra_info"]["index"]) == ("-3.5", 1)
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    (only,) = load_prompts(str(written["test"].path))
    assert (only.ground_truth, only.extra_info["split"], only.extra_info["index"]) == ("-3.5", "test", 0)


@pytest.mark.real
def test_the_real_files(shared: Path, tmp_path: Path) -> None:
    written = prepare_gsm8k(tmp_path, shared / "gsm8k")
    for split, num in (("train", 7473), ("test", 1319)):
        table = pyarrow.parquet.read_table(tmp_path / f"{split}.parquet")
        assert written[split].num_rows == table.num_rows == num
        assert type_names(table.schema) == SCHEMA
        rows = table.to_pylist()
        assert [row["extra_info"]["index"] for row in rows] == list(range(num))
        for row in rows:
            extra, truth = row["extra_info"], row["reward_model"]["ground_truth"]
            want = f'{extra["question"]} Let\'s think step by step and output the final answer after "####".'
            assert row["prompt"] == [{"content": want, "role": "user"}]
            assert extra["answer"].split("#### ")[1].replace(",", "") == truth and float(truth) == float(truth)
            assert (row["data_source"], row["ability"], row["reward_model"]["style"]) == (
                "openai/gsm8k",
                "math",
                "rule",
            )
            assert extra["split"] == split
    # prepared or raw, training sees the same rows
    raw = load_prompts(str(shared / "gsm8k" / "test.jsonl"), note=lambda _: None)
    assert raw == load_prompts(str(tmp_path / "test.parquet"))


def test_one_file_gives_its_split_only(source: Path, tmp_path: Path) -> None:
    assert list(prepare_gsm8k(tmp_path / "out", source / "test.jsonl")) == ["test"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["test.parquet"]
    (source / "test.jsonl").rename(source / "other.jsonl")
    with pytest.raises(DataError, match="the file's name must say its split: train.jsonl or test.jsonl"):
        prepare_gsm8k(tmp_path / "out", source / "other.jsonl")


def test_a_copy_of_the_hub_folder(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    for split, row in (("train", TRAIN), ("test", TEST)):
        table = pyarrow.Table.from_pylist([row])
        pyarrow.parquet.write_table(table, tmp_path / "main" / f"{split}-00000-of-00001.parquet")
    assert prepare_gsm8k(tmp_path / "a", tmp_path)["train"].num_rows == 1
    assert prepare_gsm8k(tmp_path / "b", tmp_path / "main")["test"].num_rows == 1


def test_what_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="/nowhere: there is no such file or folder. Expected a folder with train.jsonl"
    ):
        prepare_gsm8k(tmp_path / "out", "/nowhere")
    (source / "test.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"the folder has no test split \(looked for test.jsonl, .*; found train.jsonl\)"
    ):
        prepare_gsm8k(tmp_path / "out", source)
    (source / "train.jsonl").write_text('{"q": 1, "a": 2}\n')
    with pytest.raises(DataError, match="there is no column 'question'; it has q, a"):
        prepare_gsm8k(tmp_path / "out", source / "train.jsonl")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "x", "answer": "no number"}, "column 'answer': found 'no number' .*ends in '#### NUMBER'"),
        ({"question": "x", "answer": None}, r"column 'answer': found nothing \(null\)"),
        ({"question": " ", "answer": "#### 1"}, "column 'question': found ' ' .*the text of a question"),
    ],
)
def test_a_wrong_row_stops_before_anything_is_written(
    source: Path, tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    (source / "test.jsonl").write_text(json.dumps(TEST) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"test.jsonl, row 1 \(counted from 0\), {words}"):
        prepare_gsm8k(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def parquet(row: dict[str, str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), sink)
    return sink.getvalue()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    without_waiting(monkeypatch)
    with FakeHub() as hub:
        turn_to(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


def put_gsm8k(hub: FakeHub, name: str) -> None:
    files = {f"main/{split}-00000-of-00001.parquet": parquet(row) for split, row in (("train", TRAIN), ("test", TEST))}
    hub.commit("datasets", name, {**files, "socratic/train-00000-of-00001.parquet": b"not needed", "README.md": b""})


@pytest.mark.parametrize(("where", "name"), gsm8k.GSM8K_ON.items())
def test_both_hubs_are_downloaded_from(hub: FakeHub, tmp_path: Path, where: str, name: str) -> None:
    put_gsm8k(hub, name)
    notes: list[str] = []
    written = prepare_gsm8k(tmp_path / "out", hub=where, note=notes.append)
    assert {split: file.num_rows for split, file in written.items()} == {"train": 1, "test": 1}
    (row,) = pyarrow.parquet.read_table(written["train"].path).to_pylist()
    assert row["reward_model"]["ground_truth"] == "1024" and row["extra_info"]["question"] == "How many clips?"
    assert notes[0].startswith(f"GSM8K (--hub {where})={name}: downloading ") and len(notes) == 2
    assert not hub.asked("socratic/train") and hub.asked("main/train")
    hub.log.clear()
    prepare_gsm8k(tmp_path / "again", hub=where, note=notes.append)
    assert notes[2].endswith("in the cache") and not hub.asked("main/train")


def test_a_hub_may_hold_the_original_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.commit("datasets", "AI-ModelScope/gsm8k", {f"{s}.jsonl": json.dumps(TEST).encode() for s in ("train", "test")})
    assert prepare_gsm8k(tmp_path / "out", hub="modelscope", note=lambda _: None)["test"].num_rows == 1
    hub.commit("datasets", "AI-ModelScope/gsm8k", {"train.jsonl": json.dumps(TEST).encode()})
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"^GSM8K \(--hub modelscope\)=AI-ModelScope/gsm8k: .* has no test split"):
        prepare_gsm8k(tmp_path / "out", hub="modelscope", note=lambda _: None)


def test_a_hub_that_does_not_give_it_names_the_remedies(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as caught:
        prepare_gsm8k(tmp_path / "out")
    assert str(caught.value) == (
        "GSM8K (--hub huggingface)=openai/gsm8k: Hugging Face has no such data set, or it is private, and there is no "
        "such folder here (HTTP 404). Check the name (owner/name). For a private one run `hf auth login` or set "
        "HF_TOKEN. ModelScope may have it: --hub modelscope."
    )
    hub.faults.append(Fault("/api/", status=503))
    with pytest.raises(DataError, match=r"Hugging Face may have it: --hub huggingface\.$"):
        prepare_gsm8k(tmp_path / "out", hub="modelscope")
    turn_to("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    with pytest.raises(DataError, match=r"give its folder: --local_dataset_path FOLDER with the original train\.jsonl"):
        prepare_gsm8k(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_environment_chooses_the_hub(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_gsm8k(hub, "AI-ModelScope/gsm8k")
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "True")
    assert prepare_gsm8k(tmp_path / "out", note=lambda _: None)["train"].num_rows == 1
    with pytest.raises(DataError, match="openai/gsm8k: Hugging Face has no such data set"):  # what is asked for wins
        prepare_gsm8k(tmp_path / "out", hub="huggingface")
    monkeypatch.setenv("VERL_USE_MODELSCOPE", "maybe")
    with pytest.raises(ConfigError, match="VERL_USE_MODELSCOPE='maybe' in the environment: expected True or False"):
        prepare_gsm8k(tmp_path / "out")
    with pytest.raises(ConfigError, match="--hub='modelscop': no such hub. Known: huggingface, modelscope."):
        prepare_gsm8k(tmp_path / "out", hub="modelscop")


@pytest.mark.parametrize("line", [[str(SCRIPT)], ["-m", "steepest", "prepare", "gsm8k"]], ids=["script", "command"])
@pytest.mark.parametrize(("where", "name"), gsm8k.GSM8K_ON.items())
def test_the_commands_fetch_by_the_settings_of_the_environment(
    tmp_path: Path, line: list[str], where: str, name: str
) -> None:
    with FakeHub() as hub:
        put_gsm8k(hub, name)
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "MODELSCOPE_ENDPOINT": hub.url,
            "MODELSCOPE_CACHE": str(tmp_path / "ms"),
            "MODELSCOPE_HOME": str(tmp_path / "ms-home"),
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(SCRIPT.parents[2]),
            "HOME": str(tmp_path),
        }
        command = [sys.executable, *line, "--hub", where, "--local_save_dir", str(tmp_path / "out")]
        done = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'out' / 'test.parquet'} (1 rows)" in done.stdout
    assert list((tmp_path / ("hf" if where == "huggingface" else "ms")).rglob("train-00000-of-00001.parquet"))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env={"PYTHONPATH": str(SCRIPT.parents[2])})


def test_the_script(source: Path, tmp_path: Path) -> None:
    done = run_script("--local_save_dir", str(tmp_path / "out"), "--local_dataset_path", str(source))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"wrote {tmp_path / 'out' / 'train.parquet'} (2 rows)",
        f"wrote {tmp_path / 'out' / 'test.parquet'} (1 rows)",
    ]
    done = run_script("--local_save_dir", str(tmp_path / "out"), "--local_dataset_path", "/nowhere")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --local_dataset_path=/nowhere: there is no such file")
        and "Trace" not in done.stderr
    )


def test_the_reference_names() -> None:
    assert gsm8k.COLUMNS == ("data_source", "prompt", "ability", "reward_model", "extra_info")
