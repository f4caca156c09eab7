"""What holds for the project as a whole: versions, sizes, what importing it loads, what the command line says."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import steepest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "steepest").rglob("*.py"))
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
HEAVY = ("torch", "transformers", "ray", "vllm", "numpy", "pyarrow", "hydra", "wandb", "mlflow", "swanlab")


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.splitlines()}


def test_importing_the_package_loads_nothing_heavy() -> None:
    # 0.2 s is the promise; a clock on a busy machine proves little, the absence of what takes the time proves it
    loaded = loaded_by("import steepest")
    assert "steepest" in loaded
    assert not loaded & {*HEAVY, "typer", "rich", "click", "dataclasses", "typing_extensions"}


def test_the_command_loads_nothing_heavy_before_it_is_told_what_to_do() -> None:
    loaded = loaded_by("import steepest.__main__")
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "room", ["steepest.config", "steepest.rewards.api", "steepest.data.prompts", "steepest.loggers"]
)
def test_rooms_without_torch_do_not_load_it(room: str) -> None:
    assert "torch" not in loaded_by(f"import {room}")


def test_changelog_and_package_have_one_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", text, flags=re.MULTILINE)
    assert versions and versions[0] == steepest.__version__


def functions_longer_than(source: str, limit: int) -> list[tuple[int, str, int]]:
    """(line, name, lines) of each function with more lines than `limit`."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    sizes = [(node.lineno, node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in nodes]
    return [entry for entry in sizes if entry[2] > limit]


def test_functions_and_files_fit_on_a_screen() -> None:
    found = []
    for file in FILES:
        source, where = file.read_text(encoding="utf-8"), file.relative_to(ROOT)
        long = functions_longer_than(source, MAX_FUNCTION_LINES)
        found += [f"{where}:{line}: {name} has {size} lines" for line, name, size in long]
        if source.count("\n") > MAX_FILE_LINES:
            found.append(f"{where}: {source.count(chr(10))} lines")
    assert not found, "\n" + "\n".join(found)


def test_the_size_check_can_fail() -> None:
    body = "    x = 1\n" * 60
    assert functions_longer_than(f"def f():\n{body}", 60) == [(1, "f", 61)]
    assert functions_longer_than(f"async def f():\n{body}", 61) == []


def test_every_extra_of_a_logger_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    from steepest.loggers import LOGGERS

    for name in LOGGERS.names():
        if LOGGERS.get(name).facts.get("package"):
            assert re.search(rf"^{name} = \[", extras, flags=re.MULTILINE), name


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    line = [sys.executable, "-m", "steepest", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_version_option() -> None:
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"steepest {steepest.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["quickstart", "ppo", "sft", "prepare"]),
        (["preflight", "--help"], ["data.train_files=", "--cfg job"]),
        (["quickstart", "--help"], ["Example:", "--seed", "--folder"]),
        (["ppo", "--help"], ["Example:", "data.train_files=", "--cfg job"]),
        (["sft", "--help"], ["Example:", "data.train_files="]),
        (["prepare", "gsm8k", "--help"], ["Example:", "--local-dataset-path"]),
        (["prepare", "arithmetic", "--help"], ["Example:", "--num-train"]),
    ],
)
def test_help_shows_what_there_is_and_an_example(arguments: list[str], words: list[str]) -> None:
    done = command(*arguments)
    assert done.returncode == 0
    assert [word for word in words if word not in done.stdout] == []


def test_a_wrong_command_line_is_refused() -> None:
    done = command("trian")
    assert done.returncode == 2 and "trian" in done.stderr and "Traceback" not in done.stderr


def test_an_error_of_the_user_is_one_message_and_code_2(tmp_path: Path) -> None:
    done = command("prepare", "gsm8k", "--local_save_dir", str(tmp_path), "--local_dataset_path", str(tmp_path / "no"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and str(tmp_path / "no") in done.stderr
    assert "Traceback" not in done.stderr and "\033" not in done.stderr


def test_prepare_arithmetic_writes_what_it_says(tmp_path: Path) -> None:
    sizes = ["--num-train", "30", "--num-test", "10", "--num-sft", "20"]
    done = command("prepare", "arithmetic", "--local-save-dir", str(tmp_path), *sizes)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"(\w+)\.parquet \((\d+) rows\)", done.stdout) == [("train", "30"), ("test", "10"), ("sft", "20")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sft.parquet", "test.parquet", "train.parquet"]


UNKNOWN = ["--config-name", "grpo", "a.b=1", "+c='[x, y]'", "~d", "++e=-1", "--cfg", "job", "f=--g"]
SHOWN = [
    "trainer.project_name='[x, y]'",
    "trainer.total_training_steps=7",
    "trainer.experiment_name=--g",
    "--cfg",
    "job",
]


@pytest.mark.parametrize("job", ["ppo", "sft"])
@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (UNKNOWN, 2, [f"{key}: no such key" for key in ("a.b", "c", "d", "e", "f")]),
        (SHOWN, 0, ["project_name: '[x, y]'", "total_training_steps: 7", "experiment_name: --g"]),
    ],
)
def test_keys_and_options_reach_the_job_unchanged(
    job: str, line: list[str], code: int, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from steepest.__main__ import app
    from steepest.process.entry import run_entry

    module = importlib.import_module(f"steepest.trainer.main_{job}")
    with pytest.raises(SystemExit) as left:
        sys.exit(run_entry(module.main, line))
    direct = capsys.readouterr()
    through = CliRunner().invoke(app, [job, *line])
    assert left.value.code == code
    assert (through.exit_code, through.stdout, through.stderr) == (code, direct.out, direct.err)
    for text in words:
        assert text in direct.out + direct.err


def test_a_wrong_key_is_one_message_and_code_2_on_both_ways_in() -> None:
    line = [
        "data.train_files=a",
        "data.val_files=b",
        "actor_rollout_ref.model.path=c",
        "actor_rollout_ref.actor.optim.lrr=1",
    ]
    module = [sys.executable, "-m", "steepest.trainer.main_ppo", *line]
    direct = subprocess.run(module, cwd=ROOT, capture_output=True, text=True)
    through = command("ppo", *line)
    for done in (direct, through):
        assert done.returncode == 2
        assert "Did you mean actor_rollout_ref.actor.optim.lr?" in done.stderr and "Traceback" not in done.stderr
    assert direct.stderr == through.stderr
