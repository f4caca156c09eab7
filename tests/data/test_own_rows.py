"""A user's own rows: any two columns in any format, all problems at once, and nothing dropped or made up in silence."""

from __future__ import annotations

import csv
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from steepest.data.prompts import Prompt, load_prompts
from steepest.data.sft import load_sft_rows
from steepest.errors import DataError

ROWS = [{"prompt": "What is 2 + 3?", "answer": "5"}, {"prompt": "What is 4 + 3?", "answer": "007"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows in the format of the name's ending."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    names = list(dict.fromkeys(name for row in rows for name in row))
    if plain.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    with plain.open("w", encoding="utf-8", newline="") as file:
        if plain.suffix in (".csv", ".tsv"):
            writer = csv.DictWriter(file, names, delimiter="\t" if plain.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
        elif plain.suffix == ".json":
            json.dump(rows, file)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
    return str(path)


def load(file: str | list[str], **options: Any) -> list[Prompt]:
    """As a run whose reward is chosen by a key loads it."""
    return load_prompts(file, **{"needs_source": False, "note": lambda _: None, **options})


def message_of(file: str | list[str], **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(file, **options)
    return str(caught.value)


FORMATS = ("a.parquet", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.tsv.gz")


@pytest.mark.parametrize("name", FORMATS)
def test_two_columns_are_enough_in_every_format(tmp_path: Path, name: str) -> None:
    notes: list[str] = []
    file = write(tmp_path / name, ROWS)
    first, second = load(file, note=notes.append)
    assert first.messages == [{"role": "user", "content": "What is 2 + 3?"}] and first.is_text
    assert (first.data_source, first.ground_truth, second.ground_truth) == ("a", "5", "007")
    assert [first.uid, second.uid] == ["a:0", "a:1"]
    assert notes == [f"{file}: the prompt is column 'prompt', the ground truth column 'answer', data_source is 'a'."]


def test_any_two_columns_and_the_others_go_to_the_reward(tmp_path: Path) -> None:
    notes: list[str] = []
    row = {"q": [{"role": "user", "content": "Hi"}], "a": 5, "level": "easy", "extra_info": {"level": "hard", "x": 1}}
    (prompt,) = load(write(tmp_path / "a.jsonl", [row]), prompt_key="q", answer_key="a", note=notes.append)
    assert (prompt.ground_truth, prompt.is_text) == (5, False)
    assert prompt.extra_info == {"a": 5, "level": "hard", "x": 1}
    assert notes[1].endswith("the reward gets these columns in extra_info: level.")


def test_files_with_differing_columns_and_a_pattern(tmp_path: Path) -> None:
    prepared = {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "A"}],
        "reward_model": {"ground_truth": "1"},
    }
    write(tmp_path / "x-1.csv", [{"prompt": "B", "answer": "2", "note": "n"}])
    write(tmp_path / "x-2.jsonl", [prepared])
    write(tmp_path / "x-3.parquet", [{"question": "C", "answer": "1 + 2\n#### 3"}])
    found = load(str(tmp_path / "x-*"))
    assert [prompt.ground_truth for prompt in found] == ["2", "1", "3"]
    assert [prompt.data_source for prompt in found] == ["x-1", "mine", "openai/gsm8k"]


def test_a_data_source_is_needed_only_where_it_chooses_the_reward(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", ROWS)
    assert [prompt.data_source for prompt in load(file)] == ["a", "a"]
    text = message_of(file, needs_source=True)
    assert text.startswith(f"{file}: there is no column 'data_source'; it has prompt, answer. It names the reward")
    assert "reward_functions=math (or gsm8k, numeric, exact, multiple_choice, my_reward.py:my_function)" in text
    assert text.endswith('A right row: {"data_source": "openai/gsm8k", "prompt": "What is 2 + 3?", "answer": "5"}')


def test_a_ground_truth_is_needed_only_where_a_reward_reads_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "Write a poem."}, {"prompt": "Another.", "answer": None}])
    assert [prompt.ground_truth for prompt in load(file, needs_truth=False)] == [None, None]
    assert message_of(file).startswith(
        f"{file}, row 0 (counted from 0), column 'answer': found nothing (null); expected what the reward compares "
        "with. The same in 1 more row: 1.\n"
    )


def test_all_problems_of_all_files_at_once_with_a_right_row(tmp_path: Path) -> None:
    bad = [
        {"prompt": "A", "answer": "1"},
        {"prompt": "", "answer": None},
        {"prompt": [{"role": "human", "content": "x"}], "answer": "1"},
        *({"prompt": 5, "answer": "1"} for _ in range(7)),
    ]
    first, second = write(tmp_path / "a.jsonl", bad), write(tmp_path / "b.csv", [{"question": "x", "solution": "y"}])
    assert message_of([first, second]).splitlines() == [
        f"{first}, row 1 (counted from 0), column 'prompt': found '' (str); expected a text, or a list of messages "
        "{'role': ..., 'content': ...}. The same in 7 more rows: 3, 4, 5, 6, ....",
        f"{first}, row 1 (counted from 0), column 'answer': found nothing (null); expected what the reward compares "
        "with.",
        f"{first}, row 2 (counted from 0), column 'prompt[0].role': found 'human' (str); expected one of system, "
        "developer, user, assistant, tool. 'human' is written 'user'.",
        f"{second}: there is no column 'prompt'; it has question, solution. prompt_key=question names another column.",
        f"{second}: there is no column 'answer'; it has question, solution. answer_key=solution names the one that the "
        "reward reads.",
        'A right row: {"prompt": "What is 2 + 3?", "answer": "5"}',
    ]


def test_the_list_of_problems_is_bounded(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{number:02}.csv", [{"x": "1"}]) for number in range(20)]
    lines = message_of(files).splitlines()
    assert (len(lines), lines[12]) == (14, "... and 28 more kinds of problems.")


@pytest.mark.parametrize("key", ["prompt", "question"])
def test_raw_gsm8k_rows_with_and_without_the_prompt_key(tmp_path: Path, key: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}])
    (prompt,) = load(file, prompt_key=key, needs_source=True)
    assert (prompt.data_source, prompt.ground_truth) == ("openai/gsm8k", "2")
    assert prompt.messages[0]["content"].startswith("How many? Let's think step by step")
    assert prompt.extra_info["answer"] == "1 + 1 = 2\n#### 2"
    (plain,) = load(file, prompt_key="question", answer_key="answer")
    assert (plain.messages[0]["content"], plain.ground_truth) == ("How many?", "1 + 1 = 2\n#### 2")


def test_question_and_answer_that_are_not_gsm8k_name_the_keys(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": "Capital of France?", "answer": "Paris"}])
    assert "prompt_key=question names another column" in message_of(file)
    assert load(file, prompt_key="question")[0].ground_truth == "Paris"


@pytest.mark.parametrize(
    ("value", "truth"),
    [
        (72.0, 72),
        (2.5, 2.5),
        (2**53 + 1, 2**53 + 1),
        (10**30, 10**30),
        ("0072", "0072"),
        (True, True),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_a_ground_truth_keeps_its_value(tmp_path: Path, value: Any, truth: Any) -> None:
    notes: list[str] = []
    (prompt,) = load(write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": value}]), note=notes.append)
    assert prompt.ground_truth == truth and type(prompt.ground_truth) is type(truth)
    assert ("1 ground truths are whole numbers stored as floats" in notes[-1]) == (value == 72.0)


def test_ground_truths_that_have_lost_their_value_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "answer": value} for value in (72.0, float("nan"), 2.0**60)]
    text = message_of(write(tmp_path / "a.parquet", rows))
    assert "row 1 (counted from 0), column 'answer': found nothing (null)" in text
    assert (
        "row 2 (counted from 0), column 'answer': found 1.152921504606847e+18 (float); expected a whole number" in text
    )
    (prompt,) = load(write(tmp_path / "b.parquet", [{"prompt": "x", "answer": Decimal("72.00")}]))
    assert prompt.ground_truth == 72


def test_messages_written_as_text_are_messages(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": json.dumps(talk), "answer": "1"}, {"prompt": str(talk), "answer": "2"}]
    assert [prompt.messages for prompt in load(write(tmp_path / "a.csv", rows))] == [talk, talk]
    printed = "[{'content': 'Hi', 'role': 'user'}\n {'content': array(1), 'role': 'user'}]"
    text = message_of(write(tmp_path / "b.csv", [{"prompt": printed, "answer": "1"}]))
    assert "It looks like messages that were printed; write JSON." in text
    model = {"prompt": "x", "reward_model": json.dumps({"ground_truth": "7"}), "extra_info": "{'a': 1}"}
    (prompt,) = load(write(tmp_path / "c.csv", [model]))
    assert (prompt.ground_truth, prompt.extra_info) == ("7", {"a": 1})


def test_parts_of_a_text_are_joined_and_other_parts_are_refused(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "2?"}]
    row = {"prompt": [{"role": "user", "content": parts}], "answer": "1"}
    assert load(write(tmp_path / "a.jsonl", [row]))[0].messages == [{"role": "user", "content": "What is 2?"}]
    row = {"prompt": [{"role": "user", "content": [*parts, {"type": "image", "image": "x.png"}]}], "answer": "1"}
    assert "expected a string. Text only in this version." in message_of(write(tmp_path / "b.jsonl", [row]))


REFUSED = [
    {"tools": [{"name": "search"}]},
    {"tools": '[{"name": "search"}]'},
    {"images": ["a.png"]},
    {"video": "a.mp4"},
    {"agent_name": "tool_agent"},
    {"chat_template_kwargs": {"enable_thinking": False, "x": 1}},
    {"extra_info": {"need_tools_kwargs": True}},
    {"extra_info": {"interaction_kwargs": {"name": "gsm8k"}}},
]


@pytest.mark.parametrize("more", REFUSED, ids=lambda more: str(more)[:30])
def test_content_that_the_model_would_not_see_stops_the_run(tmp_path: Path, more: dict[str, Any]) -> None:
    ((name, value),) = more.items()
    inside = next(iter(value)) if name == "extra_info" else None
    file = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], **more}])
    column = f"{name}.{inside}" if inside else name
    assert f"row 1 (counted from 0), column {column!r}: found " in message_of(file)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    sft = write(tmp_path / "b.jsonl", [{"messages": talk, **more}])
    if not inside:
        assert load(file, ignored_columns=[name])[1].extra_info[name] == value  # the reward has it as any other
        with pytest.raises(DataError, match=f"column '{name}'.*ignored_columns=.{name}."):
            load_sft_rows(sft, note=lambda _: None)
        assert len(load_sft_rows(sft, ignored_columns=[name], note=lambda _: None)) == 1


def test_columns_without_content_are_no_problem(tmp_path: Path) -> None:
    empty = {
        "tools": [],
        "images": None,
        "agent_name": "single_turn_agent",
        "extra_info": {"need_tools_kwargs": False, "tools_kwargs": {"a": None}},
        "Unnamed: 0": 3,
    }
    (prompt,) = load(write(tmp_path / "a.jsonl", [{**ROWS[0], **empty}]))
    assert "Unnamed: 0" not in prompt.extra_info
    (prompt,) = load(write(tmp_path / "a.csv", [{**ROWS[0], "tools": "[]", "images": "", "": "0"}]))
    assert prompt.extra_info == {"answer": "5", "tools": "[]", "images": None}


def test_a_system_prompt_of_the_row_is_its_system_message(tmp_path: Path) -> None:
    notes: list[str] = []
    rows = [{**ROWS[0], "system_prompt": "Be brief."}, {**ROWS[1], "system_prompt": None}]
    first, second = load(write(tmp_path / "a.jsonl", rows), note=notes.append)
    assert first.messages[0] == {"role": "system", "content": "Be brief."} and not first.is_text
    assert [message["role"] for message in second.messages] == ["user"] and second.is_text
    assert notes[1].endswith("column 'system_prompt' is the system message of its row.")
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "x"}]
    text = message_of(write(tmp_path / "b.jsonl", [{"prompt": own, "answer": "1", "system": "Be brief."}]))
    assert "column 'system': found 'Be brief.' (str); expected nothing, since the messages have" in text


def test_a_style_that_is_not_read_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    row = {"data_source": "d", "prompt": "x", "reward_model": {"style": "model", "ground_truth": "1"}}
    load(write(tmp_path / "a.jsonl", [row, row]), note=notes.append)
    assert notes[-1].endswith("reward_model.style='model' in 2 rows is not read: the reward is chosen by keys.")


def test_a_prepared_file_is_loaded_without_a_word(tmp_path: Path) -> None:
    notes: list[str] = []
    row = {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "x"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"index": 0, "split": "train"},
    }
    (prompt,) = load_prompts(write(tmp_path / "a.parquet", [row]), note=notes.append)
    assert notes == [] and prompt.extra_info == {"ability": "math", "index": 0, "split": "train"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "prompt,answer\nA,1,2\n", "row 0 (counted from 0), up to line 2: found 3 cells; expected 2"),
        ("a.csv", "prompt,answer\nA\n", "found 1 cells; expected 2, one a column (prompt, answer), separated by ','"),
        ("a.csv", "answer,prompt,answer\n1,A,2\n", "two columns are called 'answer'. Rename one."),
        ("a.csv", 'prompt,answer\n"A,1\n', "line 2 (counted from 1): not CSV: unexpected end of data."),
        ("a.csv", "\nA,1\n", "the first line is empty; expected the names of the columns."),
        ("a.jsonl", '{"prompt": "A", "answer": 1, "answer": 2}\n', "line 1 (counted from 1): an object has the name"),
        ("a.json", '[{"prompt": "A", "prompt": "B"}]', "an object has the name 'prompt' twice"),
    ],
)
def test_files_whose_content_would_be_lost_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert message in message_of(str(tmp_path / name))


def test_two_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table(
        [pyarrow.array(["A"]), pyarrow.array(["1"]), pyarrow.array(["2"])], ["prompt", "answer", "answer"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "two columns are called 'answer'. Rename one." in message_of(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_csv_cells_are_the_texts_of_the_file(tmp_path: Path, mark: str) -> None:
    long = "word " * 40_000  # the csv package refuses more than 131,072 characters unless it is told
    quoted = f'"A ""b""{mark}\nc"'
    (tmp_path / "a.csv").write_text(
        f"prompt{mark}answer\n{quoted}{mark}1e3\n\n{long}{mark}0.50\n", encoding="utf-8-sig"
    )
    first, second = load(str(tmp_path / "a.csv"))
    assert (first.messages[0]["content"], first.ground_truth) == (f'A "b"{mark}\nc', "1e3")
    assert (second.messages[0]["content"], second.ground_truth) == (long, "0.50")


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    file = Path(write(tmp_path / "a.jsonl.gz", ROWS))
    file.write_bytes(file.read_bytes()[:-12])
    assert "cannot be read: " in message_of(str(file))


def test_spaces_behind_the_separator_are_no_part_of_the_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt, answer\n"a, b", 72\n', encoding="utf-8")
    (prompt,) = load(str(tmp_path / "a.csv"))
    assert (prompt.messages[0]["content"], prompt.ground_truth) == ("a, b", "72")


def test_an_answer_column_stands_in_for_a_reward_model_without_ground_truth(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "answer": "1", "reward_model": {"style": "rule"}},
        {"prompt": "x", "answer": "2", "reward_model": None},
        {"prompt": "x", "answer": "3", "reward_model": {"ground_truth": "4"}},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    assert [prompt.ground_truth for prompt in load(file)] == ["1", "2", "4"]
    assert [prompt.ground_truth for prompt in load(file, answer_key="answer")] == ["1", "2", "3"]


def test_what_is_the_same_in_many_files_is_told_once(tmp_path: Path) -> None:
    notes: list[str] = []
    for number in range(3):
        write(tmp_path / f"train-0000{number}-of-00003.csv", ROWS)
    rows = load(str(tmp_path / "*.csv"), note=notes.append)
    assert notes == [
        f"{tmp_path}/train-00000-of-00003.csv and 2 more files: the prompt is column 'prompt', the ground truth column "
        "'answer', data_source is 'train'."
    ]
    assert [row.uid for row in rows] == ["train:0", "train:1", "train#2:0", "train#2:1", "train#3:0", "train#3:1"]
    assert {row.data_source for row in rows} == {"train"}


def test_several_wrong_messages_of_one_row_are_one_row(tmp_path: Path) -> None:
    text = message_of(write(tmp_path / "a.jsonl", [{"prompt": ["a", "b"], "answer": "1"}]))
    assert "column 'prompt[0]': found 'a' (str)" in text and "The same" not in text
