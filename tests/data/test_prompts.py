"""Rows: what is taken, and for each wrong cell the words file, row, column, found, expected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steepest.data.prompts import load_prompts
from steepest.errors import ConfigError, DataError
from tests.data.conftest import prompt_row

USER = {"role": "user", "content": "hi"}


def message_of(file: str, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_prompts(file, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.json"])
def test_a_row_becomes_a_prompt(write_rows: Any, name: str) -> None:
    first, second = load_prompts(write_rows([prompt_row("A"), prompt_row("B", "7", extra_info=None)], name))
    assert (first.uid, second.uid) == ("train:0", "train:1")
    assert first.messages == [{"role": "user", "content": "A"}]
    assert (first.data_source, first.ground_truth, first.extra_info) == ("openai/gsm8k", "5", {"index": 0})
    assert (second.ground_truth, second.extra_info, second.token_ids) == ("7", {}, ())


def test_several_files_in_the_order_given(write_rows: Any) -> None:
    files = [write_rows([prompt_row("A")], "b.jsonl"), write_rows([prompt_row("B"), prompt_row("C")], "a.parquet")]
    prompts = load_prompts(files)
    assert [p.messages[0]["content"] for p in prompts] == ["A", "B", "C"]
    assert [p.uid for p in prompts] == ["b:0", "a:0", "a:1"]


def test_other_column_names_and_other_ground_truths(write_rows: Any) -> None:
    row = prompt_row(prompt=..., data_source=..., question_text=[USER], task="mine", reward_model={"ground_truth": [1]})
    (prompt,) = load_prompts(write_rows([row]), prompt_key="question_text", reward_fn_key="task")
    assert (prompt.messages, prompt.data_source, prompt.ground_truth) == ([USER], "mine", [1])
    (zero,) = load_prompts(write_rows([prompt_row(truth=0)]))
    assert zero.ground_truth == 0


def test_keys_that_are_null_in_a_message_are_dropped(write_rows: Any) -> None:
    rows = [prompt_row(prompt=[{**USER, "name": "Ann"}]), prompt_row(prompt=[USER])]
    prompts = load_prompts(write_rows(rows, "t.parquet"))
    assert [p.messages for p in prompts] == [[{**USER, "name": "Ann"}], [USER]]


def test_raw_gsm8k_rows_are_taken_with_a_note(write_rows: Any) -> None:
    notes: list[str] = []
    raw = {"question": "How many?", "answer": "1,000 + 234 = 1,234\n#### 1,234"}
    (prompt,) = load_prompts(write_rows([raw], "test.parquet"), note=notes.append)
    instruction = 'Let\'s think step by step and output the final answer after "####".'
    assert prompt.messages == [{"role": "user", "content": f"How many? {instruction}"}]
    assert (prompt.data_source, prompt.ground_truth) == ("openai/gsm8k", "1234")
    assert len(notes) == 1 and "raw GSM8K rows (question, answer)" in notes[0] and "prepare gsm8k" in notes[0]
    file = write_rows([raw, {"question": "Why?", "answer": "Because."}])
    assert message_of(file, note=notes.append).startswith(
        f"{file}, row 1 (counted from 0), column 'answer': found 'Because.' (str); "
        "expected a worked answer that ends in '#### NUMBER', as in GSM8K.\n"
    )


def test_a_file_without_the_prompt_column_names_its_columns(write_rows: Any) -> None:
    file = write_rows([prompt_row(prompt=..., words="hi")], "t.parquet")
    assert message_of(file) == (
        f"{file}: there is no column 'prompt'; it has data_source, reward_model, extra_info, words. "
        "prompt_key=NAME names another column.\n"
        'A right row: {"data_source": "openai/gsm8k", "prompt": "What is 2 + 3?", "answer": "5"}'
    )
    file = write_rows([prompt_row(data_source=...)])
    assert "there is no column 'data_source'; it has prompt, reward_model, extra_info." in message_of(file)
    file = write_rows([prompt_row(reward_model=...)])
    assert message_of(file).startswith(
        f"{file}: there is no column 'answer'; it has data_source, prompt, extra_info. answer_key=NAME names the one "
        "that the reward reads.\n"
    )


@pytest.mark.parametrize(
    ("change", "column", "found", "expected"),
    [
        ({"prompt": 5}, "prompt", "5 (int)", "a text, or a list of messages"),
        ({"prompt": " "}, "prompt", "' ' (str)", "a text, or a list of messages"),
        ({"prompt": None}, "prompt", "nothing (null)", "a text, or a list of messages"),
        ({"prompt": float("nan")}, "prompt", "nothing (null)", "a text, or a list of messages"),
        ({"prompt": ...}, "prompt", "nothing (null)", "a text, or a list of messages"),
        ({"prompt": []}, "prompt", "[] (list)", "at least one message"),
        ({"prompt": [USER, "x"]}, "prompt[1]", "'x' (str)", "a message {'role': ..., 'content': ...}"),
        ({"prompt": [{"role": "user"}]}, "prompt[0]", "{'role': 'user'} (dict)", "a message with 'content'"),
        ({"prompt": [{"content": "x"}]}, "prompt[0]", "{'content': 'x'} (dict)", "a message with 'role'"),
        (
            {"prompt": [{"role": "human", "content": "x"}]},
            "prompt[0].role",
            "'human' (str)",
            "one of system, developer, user, assistant, tool",
        ),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt[0].content", "nothing (null)", "a string"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, "prompt[0].content", "['x'] (list)", "a string"),
        (
            {"prompt": [{"role": "user", "content": " \n"}]},
            "prompt[0].content",
            "' \\n' (str)",
            "a text that is not blank",
        ),
        ({"prompt": [{"role": "system", "content": ""}]}, "prompt", "[{'role'", "at least one message that is not"),
        (
            {"prompt": [USER, {"role": "assistant", "content": "5"}]},
            "prompt",
            "{'role': 'assistant', 'content': '5'} (dict)",
            "a conversation that ends before the answer",
        ),
        ({"data_source": None}, "data_source", "nothing (null)", "the name of a data source"),
        ({"data_source": 3}, "data_source", "3 (int)", "the name of a data source"),
        ({"data_source": ""}, "data_source", "'' (str)", "the name of a data source"),
        ({"reward_model": None}, "reward_model", "nothing (null)", "an object with a ground_truth"),
        (
            {"reward_model": {"style": "rule"}},
            "reward_model",
            "{'style': 'rule'} (dict)",
            "an object with a ground_truth",
        ),
        (
            {"reward_model": {"ground_truth": None}},
            "reward_model",
            "{'ground_truth': None}",
            "an object with a ground_truth",
        ),
        ({"extra_info": "x"}, "extra_info", "'x' (str)", "an object with named entries"),
    ],
)
def test_a_wrong_cell_is_named(write_rows: Any, change: dict[str, Any], column: str, found: str, expected: str) -> None:
    file = write_rows([prompt_row(), prompt_row(), prompt_row(**change), prompt_row()])
    text = message_of(file)
    assert text.startswith(f"{file}, row 2 (counted from 0), column {column!r}: found {found}")
    assert f"; expected {expected}" in text


def test_errors_of_files_name_the_key_given(tmp_path: Path) -> None:
    assert message_of(str(tmp_path / "no.parquet"), key="data.val_files").startswith("data.val_files='")


def test_a_subset_is_seeded_and_keeps_the_order(write_rows: Any) -> None:
    file = write_rows([prompt_row(str(number)) for number in range(50)])

    def numbers(seed: int, num: int = 10) -> list[int]:
        return [int(p.messages[0]["content"]) for p in load_prompts(file, max_samples=num, seed=seed)]

    assert numbers(0) == numbers(0) == sorted(numbers(0)) and len(set(numbers(0))) == 10
    assert numbers(0) != numbers(1)
    assert numbers(0, -1) == numbers(0, 50) == numbers(0, 99) == list(range(50))
    # the uid says the place in the file, not in the subset
    chosen = load_prompts(file, max_samples=3, seed=4)
    assert [p.uid for p in chosen] == [f"train:{p.messages[0]['content']}" for p in chosen]


@pytest.mark.parametrize("number", [0, -2])
def test_a_subset_of_nothing_is_refused(write_rows: Any, number: int) -> None:
    with pytest.raises(ConfigError, match=rf"data.val_max_samples={number}: expected -1 \(all rows\)"):
        load_prompts(write_rows([prompt_row()]), max_samples=number, key="data.val_files")


def test_a_row_outside_the_subset_is_checked_too(write_rows: Any) -> None:
    rows = [prompt_row() for _ in range(20)] + [prompt_row(data_source=None)]
    assert "row 20 (counted from 0)" in message_of(write_rows(rows), max_samples=1)
