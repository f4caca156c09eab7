"""docs/own_data.md: its files are those of examples/own_data, and its commands run from a table to a trained model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from steepest.config.load import load_config
from steepest.errors import DataError
from steepest.loggers.rows import read_rows
from steepest.models.tiny import build_tiny_model
from steepest.process.entry import run_entry
from steepest.trainer.jobs.ppo import load_rows
from steepest.trainer.main_ppo import main

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "own_data"
PAGE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
SMALL = [
    "data.max_prompt_length=32",
    "data.max_response_length=8",
    "actor_rollout_ref.rollout.n=2",
    "reward.num_workers=1",
    "reward.timeout_s=120",
    "trainer.logger=jsonl",
    "trainer.device=cpu",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.S)


def commands() -> list[list[str]]:
    """The words of each command that is run in the folder of the example."""
    found = [block.replace("\\\n", " ").splitlines() for block in blocks("bash")]
    return [shlex.split(lines[1]) for lines in found if lines[0] == "cd examples/own_data"]


def test_the_page_shows_the_files_of_the_example() -> None:
    assert blocks("csv") == [(EXAMPLE / "my_data.csv").read_text(encoding="utf-8")]
    assert blocks("python") == [(EXAMPLE / "my_reward.py").read_text(encoding="utf-8")]


def test_the_problems_of_both_data_sets_are_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,answer\nx,1\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "", "answer": 1}\n')
    files = [f"data.train_files={tmp_path}/a.csv", f"data.val_files={tmp_path}/b.jsonl", "reward.functions=numeric"]
    config = load_config([*files, "actor_rollout_ref.model.path=m", "critic.model.path=m"])
    with pytest.raises(DataError) as caught:
        load_rows(config)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/a.csv: there is no column 'prompt'; it has question, answer. prompt_key=question names another "
        "column.",
        f"{tmp_path}/b.jsonl, row 0 (counted from 0), column 'prompt': found '' (str); expected a text, or a list of "
        "messages {'role': ..., 'content': ...}.",
        'A right row: {"prompt": "What is 2 + 3?", "answer": "5"}',
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = (EXAMPLE / "my_data.csv").read_text(encoding="utf-8")
    return build_tiny_model(
        tmp_path_factory.mktemp("model"), [text], hidden_size=32, intermediate_size=64, num_layers=2
    )


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_commands_of_the_page_train(
    number: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLE)
    words = commands()[number]
    assert words[:2] == ["steepest", "ppo"]
    path = f"actor_rollout_ref.model.path={model}"
    argv = [path if word.startswith("actor_rollout_ref.model.path=") else word for word in words[2:]]
    assert run_entry(main, [*argv, *SMALL, f"trainer.default_local_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    start = PAGE.split("how the function is called:\n\n```\n")[1].split("```")[0]
    assert [line for line in start.splitlines() if line not in said] == []
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "critic/score/mean" in row]
    assert len(rows) == 2 and all("actor/grad_norm" in row for row in rows)
    if number:
        for row in rows:
            sum_of_both = row["reward/compute_score/mean"] + 0.5 * row["reward/short/mean"]
            assert row["critic/score/mean"] == pytest.approx(sum_of_both, abs=1e-6) and row["reward/short/mean"] <= 0
        assert "reward short: has a parameter `completions`, so it is called as TRL calls it" in said
