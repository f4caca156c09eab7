"""GSM8K to parquet: columns, types and texts as the reference has them; hubs that do not answer."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from steepest.data.prepare import gsm8k
from steepest.data.prepare.gsm8k import prepare_gsm8k
from steepest.data.prompts import load_prompts
from steepest.errors import ConfigError, DataError

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


def test_the_hub_files_are_used(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str]] = []

    def download(repo: str, file: str, *, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(source / ("train.jsonl" if "train" in file else "test.jsonl"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    notes: list[str] = []
    assert prepare_gsm8k(tmp_path / "out", note=notes.append)["train"].num_rows == 2
    assert notes == ["fetching GSM8K from huggingface"]
    assert asked == [
        ("openai/gsm8k", "main/train-00000-of-00001.parquet", "dataset"),
        ("openai/gsm8k", "main/test-00000-of-00001.parquet", "dataset"),
    ]


def test_no_network_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("Network is unreachable\nlong tail")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(DataError) as caught:
        prepare_gsm8k(tmp_path / "out")
    assert str(caught.value) == (
        "cannot fetch main/train-00000-of-00001.parquet of GSM8K from huggingface: ConnectionError: Network is "
        "unreachable\n"
        "Use --local_dataset_path FOLDER with the original train.jsonl and test.jsonl (from "
        "https://github.com/openai/grade-school-math), or --hub modelscope, or set HF_ENDPOINT to a mirror."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["modelscope.hub.file_download", "modelscope_hub.compat.file_download"])
def test_modelscope(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    asked: list[tuple[str, str]] = []

    def download(dataset: str, file: str) -> str:
        asked.append((dataset, file))
        if "test" in file and len(asked) > 2:
            raise TimeoutError("no answer")
        return str(source / ("train.jsonl" if "train" in file else "test.jsonl"))

    parts = package.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(".".join(parts[:count])))
    monkeypatch.setattr(sys.modules[package], "dataset_file_download", download, raising=False)
    assert prepare_gsm8k(tmp_path / "out", hub="modelscope")["test"].num_rows == 1
    assert asked[0] == ("AI-ModelScope/gsm8k", "main/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"from modelscope: TimeoutError: no answer\n.*--hub huggingface\.$"):
        prepare_gsm8k(tmp_path / "out", hub="modelscope")


def test_modelscope_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("modelscope", "modelscope_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"no ModelScope client is installed.*pip install 'steepest\[modelscope\]'"):
        prepare_gsm8k(tmp_path / "out", hub="modelscope")
    with pytest.raises(ConfigError, match="--hub='modelscop': no such hub. Known: huggingface, modelscope."):
        prepare_gsm8k(tmp_path / "out", hub="modelscop")


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
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("error: --local_dataset_path=/nowhere: there is no such file")
        and "Trace" not in done.stderr
    )


def test_the_reference_names() -> None:
    assert gsm8k.COLUMNS == ("data_source", "prompt", "ability", "reward_model", "extra_info")
