"""GSM8K (Cobbe et al. 2021, https://arxiv.org/abs/2110.14168) as parquet files with the columns the trainer reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

from steepest.config.environment import default_hub
from steepest.config.types import Hub
from steepest.data.files import Table, WrittenFile, read_tables, write_parquet
from steepest.errors import ConfigError, DataError
from steepest.hub import Source, find

DATA_SOURCE = "openai/gsm8k"
COLUMNS = ("data_source", "prompt", "ability", "reward_model", "extra_info")
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
SPLITS = ("train", "test")
HUBS: tuple[str, ...] = get_args(Hub)
GSM8K_ON: dict[Hub, str] = {"huggingface": DATA_SOURCE, "modelscope": "AI-ModelScope/gsm8k"}
HUB_FILE = "main/{split}-00000-of-00001.parquet"
HUB_FILES = ("main/*.parquet", *(f"{split}.jsonl" for split in SPLITS))
WORKED_ANSWER = "a worked answer that ends in '#### NUMBER', as in GSM8K"
_FINAL = re.compile(r"#### (\-?[0-9\.\,]+)")


def prepare_gsm8k(
    save_dir: str | Path,
    local_path: str | Path | None = None,
    hub: str | None = None,
    *,
    note: Callable[[str], None] = print,
) -> dict[str, WrittenFile]:
    """Write train.parquet (7,473 rows of the original) and test.parquet (1,319) into `save_dir`.

    `local_path`: a folder with train.jsonl and test.jsonl, a downloaded copy of the hub's folder, or one file whose
    name contains its split; no network is used then. `hub`: the hub to download from, "huggingface" or "modelscope";
    None: the hub that the environment chooses, else huggingface. `note` is called with what was taken from the hub.
    Returns split -> path and number of rows. Both splits are read and checked before the first is written.

    Raises DataError: nothing found at `local_path`, a row that is no GSM8K row, a hub that does not give the files, a
    folder that cannot be written.
    """
    if hub is not None and hub not in HUBS:
        raise ConfigError(f"--hub={hub!r}: no such hub. Known: {', '.join(HUBS)}.")
    if local_path is not None:
        sources = _local_files(Path(local_path).expanduser())
    else:
        sources = _from_hub(cast(Hub, hub) if hub is not None else default_hub(), note)
    folder = Path(save_dir).expanduser()
    rows = {split: _split_rows(split, path) for split, path in sources.items()}
    return {split: write_parquet(folder / f"{split}.parquet", rows[split], row_schema()) for split in rows}


def row_schema() -> Any:
    """The Arrow schema of a row: the one verl's scripts write, so the files can be exchanged."""
    import pyarrow as pa

    message = pa.struct([("content", pa.string()), ("role", pa.string())])
    extra = [("answer", pa.string()), ("index", pa.int64()), ("question", pa.string()), ("split", pa.string())]
    types = (
        pa.string(),
        pa.list_(message),
        pa.string(),
        pa.struct([("ground_truth", pa.string()), ("style", pa.string())]),
        pa.struct(extra),
    )
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def math_row(data_source: str, prompt: str, answer: str, ground_truth: str, **extra: Any) -> dict[str, Any]:
    """One row of `row_schema`: a single user message; `extra` holds the raw question, the split and the index."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"answer": answer, **extra},
    }


def to_row(table: Table, index: int, *, split: str) -> dict[str, Any]:
    """Row `index` of the original (question, answer). The ground truth is the number after `#### `, commas removed, a
    string.

    Raises DataError if question or answer is not a text, or the answer has no final number.
    """
    row = table.rows[index]
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise table.error(index, "question", question, "the text of a question")
    truth = final_number(answer)
    if truth is None or not isinstance(answer, str):
        raise table.error(index, "answer", answer, WORKED_ANSWER)
    return math_row(
        DATA_SOURCE, f"{question} {INSTRUCTION}", answer, truth, split=split, index=index, question=question
    )


def final_number(answer: object) -> str | None:
    """The number after `#### ` in a worked answer, commas removed; None where there is none."""
    found = _FINAL.search(answer) if isinstance(answer, str) else None
    return None if found is None else found.group(1).replace(",", "")


def _split_rows(split: str, path: Path) -> list[dict[str, Any]]:
    (table,) = read_tables(str(path), key="--local_dataset_path", columns=("question", "answer"))
    for column in ("question", "answer"):
        if column not in table.columns:
            raise DataError(
                f"{path}: there is no column {column!r}; it has {', '.join(table.columns)}. "
                f"Expected the original GSM8K file, with question and answer."
            )
    return [to_row(table, index, split=split) for index in range(len(table.rows))]


def _local_files(path: Path) -> dict[str, Path]:
    if path.is_file():
        splits = [split for split in SPLITS if split in path.stem.lower()]
        if len(splits) != 1:
            raise DataError(
                f"--local_dataset_path={path}: the file's name must say its split: train.jsonl or test.jsonl."
            )
        return {splits[0]: path}
    if not path.is_dir():
        raise DataError(
            f"--local_dataset_path={path}: there is no such file or folder. "
            f"Expected a folder with train.jsonl and test.jsonl, or one of these files."
        )
    return _split_files(path, f"--local_dataset_path={path}")


def _split_files(path: Path, named: str) -> dict[str, Path]:
    """The file of each split in the original folder, or in a copy of a hub's."""
    found = {}
    for split in SPLITS:
        places = (f"{split}.jsonl", HUB_FILE.format(split=split), Path(HUB_FILE.format(split=split)).name)
        hits = [path / place for place in places if (path / place).is_file()]
        if not hits:
            here = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
            raise DataError(
                f"{named}: the folder has no {split} split (looked for {', '.join(places)}; found "
                f"{here}). Name one file to convert only its split."
            )
        found[split] = hits[0]
    return found


def _from_hub(hub: Hub, note: Callable[[str], None]) -> dict[str, Path]:
    source = Source(
        GSM8K_ON[hub],
        hub,
        key=f"GSM8K (--hub {hub})",
        hub_option="--hub ",
        local_option="--local_dataset_path FOLDER with the original train.jsonl and test.jsonl (from "
        "https://github.com/openai/grade-school-math)",
        noun="data set",
    )
    return _split_files(find(source, kind="dataset", files=HUB_FILES, note=note).path, source.label)
