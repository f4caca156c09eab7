"""The made-up problems: right answers, disjoint splits, closed vocabulary, demonstrations wrong on purpose."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from steepest.data.prepare import arithmetic
from steepest.data.prepare.arithmetic import Problem, arithmetic_corpus, make_problems, prepare_arithmetic, split_of
from steepest.data.prompts import load_prompts
from steepest.data.sft import load_sft_rows
from steepest.errors import ConfigError, DataError

PIECE = re.compile(r" ?[0-9]+| ?[A-Za-z]+| ?#+|\n| ?[^\sA-Za-z0-9#]")
STEP = re.compile(r"(First|Then|Last) (\d+) ([+*/-]) (\d+) = (\d+)")
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")


@pytest.fixture(scope="module")
def problems() -> dict[str, list[Problem]]:
    return {split: make_problems(1500, split, seed=f"{split} 0") for split in ("train", "test")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic")
    prepare_arithmetic(folder, num_train=300, num_test=256, num_sft=200)
    return folder


def check_worked(text: str) -> tuple[list[str], int]:
    """The labels and the final number of a worked answer, after each of its lines was computed anew."""
    *lines, final = text.split("\n")
    labels, last = [], None
    for line in lines:
        found = STEP.fullmatch(line)
        assert found, line
        label, left, sign, right, result = found.groups()
        assert eval(f"{left} {sign} {right}") == int(result), line
        assert last is None or int(left) == last, text  # each line goes on from the result before
        labels.append(label)
        last = int(result)
    assert STRICT.findall(text) == [str(last)] and final == f"#### {last}"
    return labels, last or 0


def story_answer(question: str) -> int:
    """The answer read from the words of the question alone, by rules written apart from the generator's."""
    sentences = [part.strip(" ?") for part in question.split(".")]
    numbers = [[int(word) for word in re.findall(r"\d+", sentence)] for sentence in sentences]
    total = numbers[0][0] * (numbers[0][1] if "boxes of" in sentences[0] else 1)
    for sentence, found in zip(sentences[1:], numbers[1:], strict=True):
        if "twice as many" in sentence:
            total += 2 * total
        elif "more than" in sentence:
            total += total + found[0]
        elif "fewer than" in sentence:
            total += total - found[0]
        elif re.search(r"(buys|finds?|gets) \d+", sentence):
            total += found[0]
        elif re.search(r"(sells?|loses|gives) \d+", sentence):
            total -= found[0]
        elif "equally in" in sentence:
            assert total % found[0] == 0
            total //= found[0]
        else:
            assert sentence.startswith("How many") and not found, sentence
    return total


def test_answers_are_right(problems: dict[str, list[Problem]]) -> None:
    for problem in problems["train"] + problems["test"]:
        labels, final = check_worked(problem.answer)
        assert labels == ["First", "Then", "Last"][: int(problem.kind[-1])]
        assert final == problem.result == story_answer(problem.question), problem


def test_shortcuts_look_right_but_leave_out_the_second_step(problems: dict[str, list[Problem]]) -> None:
    for problem in problems["train"]:
        labels, final = check_worked(problem.shortcut)
        assert labels == (["First"] if len(problem.steps) == 2 else ["First", "Last"])
        assert final != problem.result
        assert problem.shortcut.split("\n")[0] == problem.answer.split("\n")[0]


def test_by_hand() -> None:
    steps = ((12, "+", 7, 19), (19, "-", 4, 15), (15, "+", 2, 17))
    three = Problem("change3", "?", steps)
    assert three.answer == "First 12 + 7 = 19\nThen 19 - 4 = 15\nLast 15 + 2 = 17\n#### 17"
    assert three.shortcut == "First 12 + 7 = 19\nLast 19 + 2 = 21\n#### 21"
    two = Problem("change2", "?", steps[:2])
    assert two.answer == "First 12 + 7 = 19\nThen 19 - 4 = 15\n#### 15"
    assert two.shortcut == "First 12 + 7 = 19\n#### 19"


def test_train_and_test_share_neither_questions_nor_numbers(problems: dict[str, list[Problem]]) -> None:
    for what in ("question", "key"):
        train, test = ({getattr(p, what) for p in problems[split]} for split in ("train", "test"))
        assert train and test and not train & test
    for split, found in problems.items():
        assert len({p.question for p in found}) == len(found)
        assert {split_of(p) for p in found} == {split}
    # names and things alone do not make a problem another one
    first = problems["train"][0]
    assert split_of(Problem(first.kind, "other words", first.steps)) == split_of(first)


def test_there_is_variety(problems: dict[str, list[Problem]]) -> None:
    for found in problems.values():
        kinds = Counter(p.kind for p in found)
        assert set(kinds) == set(arithmetic.KINDS) and min(kinds.values()) >= 20
        assert max(kinds.values()) < len(found) / 2
        assert len({p.key for p in found}) > len(found) / 3
        assert len({p.result for p in found}) > 35


def test_lengths_and_vocabulary(problems: dict[str, list[Problem]]) -> None:
    vocabulary = {piece for text in arithmetic_corpus() for piece in PIECE.findall(text)}
    assert 150 <= len(vocabulary) <= 300
    assert {f" {number}" for number in range(100)} <= vocabulary
    for problem in problems["train"] + problems["test"]:
        for text, low, high in ((problem.question, 15, 35), (problem.answer, 10, 25), (problem.shortcut, 8, 25)):
            pieces = PIECE.findall(text)
            assert "".join(pieces) == text and low <= len(pieces) <= high
            assert set(pieces) <= vocabulary, set(pieces) - vocabulary
    used = {piece for found in problems.values() for p in found for piece in PIECE.findall(p.question + p.answer)}
    # no number stands without a space before it: one piece a number
    assert not [piece for piece in used if piece.isdigit()]
    assert {piece for piece in vocabulary - used if not piece.strip().isdigit()} == set()


def test_files_have_the_gsm8k_columns(prepared: Path) -> None:
    from steepest.data.prepare.gsm8k import row_schema

    for split, num in (("train", 300), ("test", 256)):
        table = pyarrow.parquet.read_table(prepared / f"{split}.parquet")
        assert table.schema.equals(row_schema()) and table.num_rows == num
        for index, row in enumerate(table.to_pylist()):
            extra = row["extra_info"]
            assert row["prompt"] == [{"role": "user", "content": extra["question"]}]
            assert (row["data_source"], row["ability"]) == ("steepest/arithmetic", "math")
            assert row["reward_model"] == {"ground_truth": extra["answer"].split("#### ")[1], "style": "rule"}
            assert (extra["index"], extra["split"]) == (index, split)
    assert len(load_prompts([str(prepared / "train.parquet"), str(prepared / "test.parquet")])) == 556


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_share_of_right_demonstrations(tmp_path: Path, share: float) -> None:
    written = prepare_arithmetic(tmp_path, num_train=1, num_test=1, num_sft=200, right_share=share)
    rows = pyarrow.parquet.read_table(written["sft"].path).to_pylist()
    assert list(rows[0]) == ["prompt", "answer", "is_right"]
    right = [story_answer(row["prompt"][0]["content"]) == check_worked(row["answer"])[1] for row in rows]
    assert right == [row["is_right"] for row in rows]
    assert sum(right) == round(200 * share) and written["sft"].num_rows == 200


def test_demonstrations_come_from_the_train_problems(prepared: Path) -> None:
    rows = load_sft_rows(str(prepared / "sft.parquet"))
    test = {p.question for p in make_problems(3000, "test", seed="test 0")}
    assert not {row.messages[0]["content"] for row in rows} & test
    assert [message["role"] for message in rows[0].messages] == ["user", "assistant"]


def test_same_seed_same_files_other_seed_others(tmp_path: Path, prepared: Path) -> None:
    def questions(folder: Path, name: str) -> list[Any]:
        return pyarrow.parquet.read_table(folder / f"{name}.parquet").to_pylist()

    for seed in (0, 1):
        prepare_arithmetic(tmp_path / str(seed), num_train=300, num_test=256, num_sft=200, seed=seed)
        for name in ("train", "test", "sft"):
            assert (questions(tmp_path / str(seed), name) == questions(prepared, name)) == (seed == 0)


def test_the_problems_are_the_same_for_ever() -> None:
    # recorded once: reported accuracies belong to these problems
    first, second = make_problems(2, "test", seed="test 0")
    assert first.question == (
        "Ann has 14 apples. First she finds 3 more. Then she gives 8 to Sam. How many apples does Ann have now?"
    )
    assert first.answer == "First 14 + 3 = 17\nThen 17 - 8 = 9\n#### 9"
    assert second.question == (
        "Mia has 12 cards. First she buys 4 more. Then she gets 8 from Ben. How many cards does Mia have now?"
    )
    assert second.answer == "First 12 + 4 = 16\nThen 16 + 8 = 24\n#### 24"


def test_wrong_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_test=0: expected a number above 0"):
        prepare_arithmetic(tmp_path, num_test=0)
    with pytest.raises(ConfigError, match=r"right_share=1.5: expected a share between 0 and 1"):
        prepare_arithmetic(tmp_path, right_share=1.5)


def test_more_problems_than_there_are() -> None:
    with pytest.raises(DataError, match=r"only \d+ different test problems were found, 999 are wanted. Ask for fewer."):
        make_problems(999, "test", seed="0", kinds=["twice2"])
