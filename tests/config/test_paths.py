"""Paths and texts that no file, no folder or no tokenizer can have are refused with the configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from steepest.config.load import load_config, load_sft_config
from steepest.errors import ConfigError
from tests.support.commands import REQUIRED

ROOT = Path(__file__).parents[2]


def problem_of(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config([*REQUIRED, *words])
    [problem] = caught.value.problems
    return problem


@pytest.mark.parametrize(
    "words, said",
    [
        ("trainer.default_local_dir=" + "n" * 256, "a name in a path has at most 255 bytes."),
        ("trainer.default_local_dir=" + "\u7b54" * 86, "a name in a path has at most 255 bytes."),
        ("trainer.default_local_dir=" + "n/" * 2048, "a path has at most 4095 bytes."),
        ("trainer.experiment_name=" + "n" * 300, "a name in a path has at most 255 bytes."),
        ("data.train_files=[a,\udcff]", "holds bytes that cannot be read."),
        ("trainer.experiment_name=\udcc3", "holds bytes that cannot be read."),
        ("actor_rollout_ref.model.custom_chat_template={{\udcff}}", "holds bytes that cannot be read."),
        ("data.apply_chat_template_kwargs={a: [\udcff]}", "holds bytes that cannot be read."),
    ],
)
def test_a_path_or_text_of_the_command_line(words: str, said: str) -> None:
    found = problem_of(words)
    assert found.startswith(f"{words.split('=')[0]}=") and found.endswith(said)


def test_a_path_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text('trainer: {default_local_dir: "a\\0b"}\n')
    assert "holds a NUL character, which no path can. (in file" in problem_of("--config-name", f"{tmp_path}/mine.yaml")


@pytest.mark.parametrize("text", [b"trainer: {total_epochs: " + b"1" * 5000 + b"}", b"a: \xff", b"a: \0", b"[" * 9000])
def test_a_file_that_cannot_be_read(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    assert problem_of("--config-name", f"{tmp_path}/mine.yaml").startswith(f"--config-name={tmp_path}/mine.yaml: ")


@pytest.mark.parametrize(
    "name", ["..", "a/../b", "./a", "a//b", "/a", "a/", " ", "a\nb", "a\x1b[31m", "n" * 243, "a/" + "n" * 243]
)
def test_a_name_that_is_no_folder(name: str) -> None:
    for load, words in ((load_config, REQUIRED), (load_sft_config, ["data.train_files=a", "model.path=m"])):
        with pytest.raises(ConfigError, match="and it names a folder. Choose another."):
            load([*words, f"trainer.experiment_name='{name}'"])


@pytest.mark.parametrize("name", ["a/b", "a b", "a.b", "..a", "\u7b54\u6848", "n" * 242, "~", "-x", "%s", "a:b"])
def test_a_name_that_is_a_folder(name: str) -> None:
    config = load_config([*REQUIRED, f"trainer.experiment_name='{name}'"])
    assert config.trainer.default_local_dir == f"checkpoints/steepest/{name}"


def test_variables_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    config = load_config([*REQUIRED, "data.train_files=[$DATA/a.jsonl,$NOT_THERE/b]", "trainer.experiment_name=$DATA"])
    assert config.data.train_files == ("/data/a.jsonl", "$NOT_THERE/b")
    assert config.trainer.experiment_name == "$DATA", "a name is no path"


def test_a_process_that_can_name_only_ascii_files(tmp_path: Path) -> None:
    """It would train, and end at the first file that is not written by Python."""
    (tmp_path / "mine.yaml").write_text("trainer: {default_local_dir: /tmp/\u00f6}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    for words in (["trainer.default_local_dir=/tmp/\u00f6"], ["--config-name", f"{tmp_path}/mine.yaml"]):
        command = [sys.executable, "-m", "steepest.trainer.main_ppo", *REQUIRED, *words]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        said = done.stderr.decode("ascii")
        assert done.returncode == 2 and "trainer.default_local_dir=/tmp/" in said
        assert "LC_ALL=C.UTF-8 or PYTHONUTF8=1." in said and "Traceback" not in said
