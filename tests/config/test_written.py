"""A key that takes text gets what was written, on the command line and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from steepest.config.load import config_dict, load_config, load_sft_config, save_config
from steepest.errors import ConfigError

GIVEN = ["data.train_files=a.parquet", "data.val_files=b.parquet", "actor_rollout_ref.model.path=m"]
WORDS = (
    "3.1", "3.10", "007", "1_000", "1e5", "1E5", "1.", ".5", "+5", "-0", "0x1F", "0o17", "010", "1:30", "inf", "nan",
    "true", "True", "yes", "off", "null", "NULL", "None", "~", "2026-12-01", "001.50", "1.0", "a b",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_name_is_the_text_that_was_written(word: str, tmp_path: Path) -> None:
    config = load_config([*GIVEN, f"trainer.experiment_name={word}"])
    assert config.trainer.experiment_name == word
    assert config.trainer.default_local_dir == f"checkpoints/steepest/{word}"
    (tmp_path / "mine.yaml").write_text(f"trainer: {{experiment_name: {word}}}\n")
    from_file = load_sft_config(
        ["--config-name", f"{tmp_path}/mine.yaml", "data.train_files=a", "model.path=m", f"data.prompt_key={word}"]
    )
    assert (from_file.trainer.experiment_name, from_file.data.prompt_key) == (word, word)


@pytest.mark.parametrize("word", ("3.10", "007", "1e5", "0x1F", "inf", "true", "null", "~", "2026-12-01", "a b"))
def test_a_saved_configuration_keeps_the_text(word: str, tmp_path: Path) -> None:
    config = load_config([*GIVEN, f"trainer.experiment_name={word}", f"actor_rollout_ref.model.path={word}x"])
    save_config(config, tmp_path / "config.yaml")
    assert config_dict(load_config(["--config-name", str(tmp_path / "config.yaml")])) == config_dict(config)


def test_two_spellings_of_one_number_are_two_runs() -> None:
    folders = [
        load_config([*GIVEN, f"trainer.project_name={name}"]).trainer.default_local_dir for name in ("3.1", "3.10")
    ]
    assert folders == ["checkpoints/3.1/ppo", "checkpoints/3.10/ppo"]


def test_lists_of_texts_on_the_command_line() -> None:
    config = load_config([*GIVEN[1:], "data.train_files=[007, 1e5, '3.10', 3.10, true]"])
    assert config.data.train_files == ("007", "1e5", "3.10", "3.10", "true")
    config = load_config([*GIVEN[1:], "data.train_files=[~/1.0, 3.10, 2026-12-01]"])  # not of Hydra's grammar
    assert config.data.train_files[1:] == ("3.10", "2026-12-01")


def test_a_revision_of_digits_is_text() -> None:
    assert (
        load_config([*GIVEN, "actor_rollout_ref.model.revision=1234e56"]).actor_rollout_ref.model.revision == "1234e56"
    )
    assert load_config([*GIVEN, "actor_rollout_ref.model.revision=null"]).actor_rollout_ref.model.revision is None


def test_functions_of_the_grammar_and_quotes() -> None:
    assert load_config([*GIVEN, "trainer.experiment_name=str(3.10)"]).trainer.experiment_name == "3.10"
    assert load_config([*GIVEN, "trainer.experiment_name='3.10'"]).trainer.experiment_name == "3.10"
    assert load_config([*GIVEN, "trainer.total_epochs=int(3.0)"]).trainer.total_epochs == 3


def test_a_file_of_several_files_and_types(tmp_path: Path) -> None:
    """verl's form: a defaults list and a search path of Hydra's. Numbers stay numbers."""
    (tmp_path / "base.yaml").write_text("trainer: {project_name: 007, total_epochs: 1e1}\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, base, _self_]\n"
        f"hydra: {{searchpath: ['file://{tmp_path}']}}\n"
        "data: {train_files: [1e5, 3.10, 2026-12-01, 'x'], val_files: 1_000, prompt_key: yes}\n"
        "actor_rollout_ref: {model: {path: m, revision: 0123e4, use_shm: false}}\n"
        "trainer: {experiment_name: 'run-${trainer.project_name}', save_freq: 0x10, val_before_train: off}\n"
    )
    config = load_config(["--config-path", str(tmp_path), "--config-name", "mine"])
    assert config.data.train_files == ("1e5", "3.10", "2026-12-01", "x")
    assert (config.data.val_files, config.data.prompt_key) == (("1_000",), "yes")
    assert config.actor_rollout_ref.model.revision == "0123e4"
    assert (config.trainer.project_name, config.trainer.experiment_name) == ("007", "run-007")
    assert (config.trainer.total_epochs, config.trainer.save_freq, config.trainer.val_before_train) == (10, 16, False)


def test_a_value_that_is_left_empty_in_a_file_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer:\n  experiment_name:\n")
    with pytest.raises(ConfigError, match="experiment_name=null: expected text"):
        load_config([*GIVEN, "--config-name", f"{tmp_path}/mine.yaml"])


def test_a_delete_with_a_value_compares_the_text() -> None:
    config = load_config([*GIVEN, "trainer.experiment_name=3.10", "~trainer.experiment_name=3.10"])
    assert config.trainer.experiment_name == "ppo"
    with pytest.raises(ConfigError, match=r"~trainer.experiment_name=3.1: the value is 3.10."):
        load_config([*GIVEN, "trainer.experiment_name=3.10", "~trainer.experiment_name=3.1"])
