"""Rows for supervised fine-tuning: shapes of rows, and a mask that is true on the answers only."""

from __future__ import annotations

from typing import Any

import pytest

from steepest.data.chat import encode_prompts
from steepest.data.prompts import Prompt
from steepest.data.sft import SFTExample, SFTRow, encode_sft, load_sft_rows
from steepest.errors import ConfigError, DataError, ModelError
from tests.data.conftest import CHATML, byte_tokenizer
from tests.support.chat_templates import FAMILIES, Family

ASK = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
TALK = [{"role": "system", "content": "Be brief."}, ASK, ANSWER, {"role": "user", "content": "And 4 more?"},
        {"role": "assistant", "content": "9"}]  # fmt: skip


def encode(messages: list[dict[str, Any]], tokenizer: Any, **options: Any) -> SFTExample:
    (example,), _ = encode_sft(
        [SFTRow("t:0", messages)], tokenizer, max_length=options.pop("max_length", 1000), **options
    )
    return example


def learned(example: SFTExample, tokenizer: Any) -> str:
    """The text under the mask, runs of it joined by |."""
    runs: list[list[int]] = [[]]
    for token, take in zip(example.token_ids, example.loss_mask, strict=True):
        if take:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return "|".join(tokenizer.decode(run) for run in runs if run)


def message_of(file: str) -> str:
    with pytest.raises(DataError) as caught:
        load_sft_rows(file)
    return str(caught.value)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.json"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, ANSWER]},
        {"prompt": "What is 2 + 3?", "answer": "It is 5."},
        {"prompt": [ASK], "answer": "It is 5."},
    ],
)
def test_three_shapes_of_rows(write_rows: Any, name: str, row: dict[str, Any]) -> None:
    assert load_sft_rows(write_rows([row], name)) == [SFTRow("t:0", [ASK, ANSWER])]


def test_other_names_several_files_and_raw_gsm8k(write_rows: Any) -> None:
    notes: list[str] = []
    files = [
        write_rows([{"q": "What is 2 + 3?", "a": "It is 5."}], "a.jsonl"),
        write_rows([{"talk": [ASK, ANSWER]}], "b.jsonl"),
        write_rows([{"question": "How many?", "answer": "1 + 1 = 2\n#### 2"}], "c.jsonl"),
    ]
    rows = load_sft_rows(files, messages_key="talk", prompt_key="q", answer_key="a", note=notes.append)
    assert [row.messages for row in rows[:2]] == [[ASK, ANSWER]] * 2
    assert rows[2].messages[0]["content"].startswith("How many? Let's think step by step")
    assert rows[2].messages[1] == {"role": "assistant", "content": "1 + 1 = 2\n#### 2"}
    assert len(notes) == 1 and "raw GSM8K rows" in notes[0]
    assert [row.uid for row in rows] == ["a:0", "b:0", "c:0"]


def test_a_subset(write_rows: Any) -> None:
    file = write_rows([{"prompt": str(number), "answer": "x"} for number in range(20)])
    rows = load_sft_rows(file, max_samples=5, seed=1)
    numbers = [int(row.messages[0]["content"]) for row in rows]
    assert len(numbers) == 5 and numbers == sorted(set(numbers))
    with pytest.raises(ConfigError, match="^train_max_samples=0"):
        load_sft_rows(file, max_samples=0)


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"messages": [ASK]}, "messages", "a conversation whose last message is the assistant's"),
        ({"messages": [ANSWER]}, "messages", "a conversation that starts with a message of the user or the system"),
        ({"messages": "x"}, "messages", "a conversation whose last message is the assistant's"),
        ({"prompt": "x", "answer": None}, "answer", "the text of the answer"),
        ({"prompt": "x", "answer": " "}, "answer", "the text of the answer"),
        ({"prompt": " ", "answer": "x"}, "prompt", "a text, or a list of messages"),
        ({"prompt": 5, "answer": "x"}, "prompt", "a text, or a list of messages"),
        ({"prompt": [ASK, ANSWER], "answer": "x"}, "prompt", "a prompt that ends before the answer"),
        ({"prompt": [{"role": "bot", "content": "x"}], "answer": "x"}, "prompt[0].role", "one of system"),
    ],
)
def test_a_wrong_cell_is_named(write_rows: Any, row: dict[str, Any], column: str, expected: str) -> None:
    file = write_rows([row])
    text = message_of(file)
    assert (
        text.startswith(f"{file}, row 0 (counted from 0), column {column!r}: found ")
        and f"; expected {expected}" in text
    )


def test_a_file_of_another_kind_names_its_columns(write_rows: Any) -> None:
    file = write_rows([{"text": "x", "prompt": "y"}])
    assert message_of(file).startswith(
        f"{file}: expected the column 'messages' (messages), or 'prompt' and 'answer'; it has text, prompt."
    )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_the_mask_is_the_answer_and_its_end_token(family: Family) -> None:
    tokenizer = byte_tokenizer(family.template, eos="<eos>")
    end = tokenizer.convert_tokens_to_ids(family.end)
    example = encode([ASK, ANSWER], tokenizer, end_token_ids=[end])
    assert learned(example, tokenizer).strip() == f"It is 5.{family.end}"
    # what stands before the answer is exactly what a rollout is asked with
    (asked,), _ = encode_prompts([Prompt("t:0", [ASK], "d", "5")], tokenizer, max_prompt_length=1000)
    first = example.loss_mask.index(True)
    assert example.token_ids[:first] == asked.token_ids
    assert example.token_ids[sum(example.loss_mask) + first - 1] == end


def test_by_hand(tokenizer: Any) -> None:
    example = encode([ASK, ANSWER], tokenizer, end_token_ids=[tokenizer.convert_tokens_to_ids("<|im_end|>")])
    assert tokenizer.decode(example.token_ids) == (
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>\n"
    )
    assert learned(example, tokenizer) == "It is 5.<|im_end|>"
    assert not example.loss_mask[0] and not example.loss_mask[-1]  # the line break after the end token is not learned


def test_every_answer_of_a_conversation_is_learned(tokenizer: Any) -> None:
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert learned(encode(TALK, tokenizer, end_token_ids=ends), tokenizer) == "It is 5.<|im_end|>|9<|im_end|>"


def test_an_end_token_is_appended_where_the_template_writes_none() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    example = encode([ASK, ANSWER], tokenizer)
    assert tokenizer.decode(example.token_ids) == "What is 2 + 3?\nIt is 5.\n<eos>"
    assert learned(example, tokenizer) == "It is 5.\n<eos>"
    with pytest.raises(ModelError, match="the tokenizer has no EOS token"):
        encode([ASK, ANSWER], byte_tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}", eos=None))


def test_a_token_that_spans_the_border_is_split_as_generation_splits_it() -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    half, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Tom app", "Tom apples"))
    assert whole[: len(half)] != half  # the trap is set
    example = encode([{"role": "user", "content": "Tom app"}, {"role": "assistant", "content": "les"}], tokenizer)
    assert list(example.token_ids[: len(half)]) == half
    assert example.loss_mask.index(True) == len(half)
    assert learned(example, tokenizer) == "les<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer(FAMILIES["chatml that drops earlier thoughts"].template)
    thinking = {"role": "assistant", "content": "<think>2 and 3</think>It is 5."}
    assert learned(encode([ASK, thinking], tokenizer), tokenizer).startswith("<think>2 and 3</think>It is 5.")
    with pytest.raises(
        DataError, match=r"row t:0: the chat template writes the conversation up to message 2 .*one row of each"
    ):
        encode([ASK, thinking, ASK, ANSWER], tokenizer)


def test_too_long(tokenizer: Any) -> None:
    rows = [SFTRow("t:0", [ASK, ANSWER]), SFTRow("t:1", [ASK, {"role": "assistant", "content": "5 " * 60}])]
    with pytest.raises(
        DataError, match=r"row t:1: the conversation has \d+ tokens, max_length is 50; 1 of 2 are too long"
    ):
        encode_sft(rows, tokenizer, max_length=50)
    kept, report = encode_sft(rows, tokenizer, max_length=50, truncation="right")
    assert [len(example.token_ids) for example in kept][1] == 50 == len(kept[1].loss_mask)
    assert (report.num_kept, report.num_filtered, report.num_truncated) == (2, 0, 1)
    assert report.describe().startswith("2 conversations, the longest ") and report.describe().endswith(
        ", 1 cut (right)."
    )
    with pytest.raises(ConfigError, match="^max_length=0"):
        encode_sft(rows, tokenizer, max_length=0)


def test_a_cut_that_takes_the_whole_answer_is_refused(tokenizer: Any) -> None:
    long = [{"role": "user", "content": "x " * 60}, ANSWER]
    with pytest.raises(DataError, match=r"row t:0: cut to max_length=20 \(truncation=right\) nothing of the answer"):
        encode(long, tokenizer, max_length=20, truncation="right")
    assert "It is 5." in learned(encode(long, tokenizer, max_length=20, truncation="left"), tokenizer)


def test_no_chat_template() -> None:
    with pytest.raises(ModelError, match="has no chat template"):
        encode([ASK, ANSWER], byte_tokenizer(None))


def test_a_doubled_bos_is_made_single() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    example = encode([ASK, ANSWER], tokenizer)
    assert example.token_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("field", ["weight", "loss", "train"])
def test_an_answer_of_weight_0_is_read_and_not_learned(write_rows: Any, tokenizer: Any, field: str) -> None:
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    talk = [dict(message) for message in TALK]
    talk[2][field] = 0
    talk[4][field] = 1
    (row,) = load_sft_rows(write_rows([{"messages": talk}]))
    assert (row.messages, row.not_learned) == (TALK, {2})
    (example,), _ = encode_sft([row], tokenizer, max_length=1000, end_token_ids=ends)
    assert learned(example, tokenizer) == "9<|im_end|>"
    for value, told in ((0.5, "0 (not learned) or 1 (learned)"), (0, "an answer that is learned (weight 1)")):
        talk[4][field] = value
        assert told in message_of(write_rows([{"messages": talk}]))


def test_an_answer_may_be_messages_and_may_not_be_blank(write_rows: Any) -> None:
    (row,) = load_sft_rows(write_rows([{"prompt": [ASK], "answer": [ANSWER]}]))
    assert row.messages == [ASK, ANSWER]
    assert "the text of the answer, or messages of the assistant" in message_of(
        write_rows([{"prompt": "x", "answer": [ASK]}])
    )
    blank = [ASK, {"role": "assistant", "content": " "}]
    assert "expected answers that are not blank" in message_of(write_rows([{"messages": blank}]))


def test_columns_that_are_not_used_are_told_and_a_system_prompt_is_used(write_rows: Any) -> None:
    notes: list[str] = []
    file = write_rows([{"prompt": "x", "answer": "y", "system": "Be brief.", "topic": "a", "id": 3}])
    (row,) = load_sft_rows(file, note=notes.append)
    assert row.messages[0] == {"role": "system", "content": "Be brief."}
    assert notes == [
        f"{file}: column 'system' is the system message of its row.",
        f"{file}: these columns are not used: topic, id.",
    ]
