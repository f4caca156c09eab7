"""What a user can get wrong: one screen, no traceback, exit code 2, and the key, the value and the remedy named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steepest.models.tiny import build_tiny_model
from steepest.process.cores import usable_cores
from steepest.process.entry import run_entry
from steepest.trainer.main_ppo import main
from steepest.trainer.run.folder import hold
from tests.support.toy_run import make_toy, toy_overrides

MODEL = "actor_rollout_ref.model.path"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def assert_fails(capsys, argv: list[str], *words: str) -> str:
    """Run the command in this process; returns what it says on standard error after checking its form."""
    assert run_entry(main, argv) == 2
    out, said = capsys.readouterr()
    assert said.startswith("error: ") and "Traceback" not in said
    assert "\x02" not in out + said, "each setting is named"
    assert len(said.splitlines()) <= 25
    for word in words:
        assert word in said, f"{word!r} is not in {said!r}"
    return said


def with_value(argv: list[str], key: str, value: object) -> list[str]:
    return [item for item in argv if not item.startswith(f"{key}=")] + [f"{key}={value}"]


@pytest.mark.parametrize(
    "change, words",
    [
        ("actor_rollout_ref.actor.optim.lrr=1", ["optim.lrr", "Did you mean actor_rollout_ref.actor.optim.lr?"]),
        ("data.train_batch_size=many", ["data.train_batch_size", "many", "whole number"]),
        ("actor_rollout_ref.actor.ppo_mini_batch_size=48", ["ppo_mini_batch_size=48", "data.train_batch_size=128"]),
        ("algorithm.adv_estimator=grpo", ["actor_rollout_ref.rollout.n=1", "every advantage", "n >= 2"]),
        ("algorithm.adv_estimator=gpro", ["gpro", "Did you mean grpo?"]),
        ("actor_rollout_ref.rollout.temperature=0", ["temperature=0"]),
        ("trainer.resume_mode=resume_path", ["resume_from_path"]),
        ("actor_rollout_ref.actor.strategy=megatron", ["strategy"]),
        ("data.train_files=nowhere.parquet", ["data.train_files", "nowhere.parquet"]),
        (f"{MODEL}=./nowhere", [MODEL, "nowhere"]),
        ("custom_reward_function.path=nowhere.py", ["custom_reward_function.path", "nowhere.py"]),
        ("custom_reward_function.name=digt", ["digt", "digit"]),
        ("data.max_prompt_length=3", ["data.max_prompt_length is 3", "data.filter_overlong_prompts=True"]),
        ("data.train_batch_size=1024", ["1024", "512"]),
        ("trainer.device=npu", ["npu"]),
        ("trainer.device=cuda", ["cuda"]),
    ],
)
def test_a_wrong_value(toy, tmp_path, capsys, change, words):
    key = change.split("=")[0]
    assert_fails(capsys, with_value(toy_overrides(toy, tmp_path / "run"), key, change.split("=", 1)[1]), *words)
    assert not (tmp_path / "run").exists(), "nothing is left behind by a run that did not start"


def test_all_problems_at_once(toy, tmp_path, capsys):
    argv = [*toy_overrides(toy, tmp_path), "trainer.lr=1", "data.shufle=True", "actor_rollout_ref.rollout.top_p=2"]
    assert_fails(capsys, argv, "3 problems", "trainer.lr", "data.shuffle", "top_p=2")


def test_an_empty_file(toy, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert_fails(capsys, with_value(toy_overrides(toy, tmp_path), "data.train_files", empty), "empty.jsonl")


def test_a_parquet_without_prompt(toy, tmp_path, capsys):
    file = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"text": ["a", "b"]}), file)
    argv = with_value(toy_overrides(toy, tmp_path), "data.val_files", file)
    assert_fails(capsys, argv, "odd.parquet", "'prompt'", "it has text", "data.prompt_key")


def broken_rows(tmp_path):
    """A file of rows that cannot be read."""
    (tmp_path / "broken.jsonl").write_text("{")
    return tmp_path / "broken.jsonl"


def broken_model(tmp_path):
    """A folder of a model that does not load."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    return tmp_path / "broken"


def test_missing_files_are_told_together_and_first(toy, tmp_path, capsys):
    argv = toy_overrides(toy, tmp_path / "run")
    for key in ("data.train_files", "data.val_files"):
        argv = with_value(argv, key, f"{tmp_path}/{key}.parquet")
    argv = with_value(with_value(argv, MODEL, "./nowhere"), "custom_reward_function.path", "nowhere.py")
    said = assert_fails(
        capsys, argv, "data.train_files=", "data.val_files=", f"{MODEL}=", "custom_reward_function.path="
    )
    assert said.startswith("error: 4 problems:")


def test_a_window_that_is_too_short_is_told_before_the_weights_are_read(toy, tmp_path, capsys):
    shutil.copytree(toy["model"], tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    argv = with_value(toy_overrides(toy, tmp_path / "run"), MODEL, tmp_path / "model")
    argv = with_value(argv, "data.max_response_length", 100_000)
    assert_fails(capsys, argv, MODEL, "a sequence may reach 100016 tokens", "max_position_embeddings")


def test_a_prompt_of_a_whole_file_is_refused_by_its_length(toy, tmp_path, capsys):
    row = json.loads(toy["data"].read_text().splitlines()[0])
    row["prompt"][0]["content"] = "say 1 " * 200_000
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 128)
    argv = with_value(toy_overrides(toy, tmp_path / "run"), "data.train_files", tmp_path / "rows.jsonl")
    assert_fails(
        capsys, argv, "row rows:0: 1,20", "characters, which are far more than data.max_prompt_length=16 tokens"
    )


def test_more_workers_than_a_machine_can_use(toy, tmp_path, capsys):
    argv = with_value(toy_overrides(toy, tmp_path / "run"), "reward.num_workers", 1_000_000)
    most = 16 * usable_cores()
    assert_fails(capsys, argv, f"reward.num_workers=1000000: at most {most} on this machine (16 for each of")


def test_a_wrong_row_is_named_before_a_model_loads(toy, tmp_path, capsys):
    rows = toy["data"].read_text().splitlines()
    row = json.loads(rows[7])
    row["prompt"][0]["role"] = "usr"
    rows[7] = json.dumps(row)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows) + "\n")
    argv = with_value(toy_overrides(toy, tmp_path), "data.train_files", file)
    argv = with_value(argv, MODEL, broken_model(tmp_path))  # the data is looked at first
    assert_fails(capsys, argv, "rows.jsonl", "row 7", "usr", "user")


def test_a_ground_truth_that_no_answer_can_equal_is_named_before_a_model_loads(tmp_path, toy, capsys):
    row = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "say 1"}]}
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({**row, "reward_model": {"ground_truth": truth}}) for truth in ("1", "2", "three")]
    file.write_text("\n".join(lines) + "\n")
    argv = [item for item in toy_overrides(toy, tmp_path) if not item.startswith("custom_reward_function")]
    argv = with_value(with_value(argv, "data.train_files", file), MODEL, broken_model(tmp_path))
    assert_fails(capsys, argv, "rows:2", "reward_model", "'three'", "plain number")


def test_a_second_run_in_the_same_folder_is_kept_out(tmp_path, toy, capsys):
    with hold(tmp_path / "run"):
        assert_fails(capsys, toy_overrides(toy, tmp_path / "run"), "another run is writing", "trainer.experiment_name")
    with hold(tmp_path / "run"):
        pass  # the lock went with its holder


def test_a_model_without_chat_template(toy, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(toy["model"], folder)
    for file in folder.glob("*.jinja"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    argv = with_value(toy_overrides(toy, tmp_path), MODEL, folder)
    assert_fails(capsys, argv, "chat template", "actor_rollout_ref.model.custom_chat_template")


def test_a_reward_that_raises_ends_the_run_and_is_named(toy, tmp_path, capsys):
    reward = tmp_path / "bad.py"
    reward.write_text("def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 1 / 0\n")
    argv = with_value(toy_overrides(toy, tmp_path / "run"), "custom_reward_function.path", reward)
    argv = with_value(argv, "custom_reward_function.name", "compute_score")
    assert_fails(capsys, argv, "ZeroDivisionError", "sample rows:", "bad.py:2", "reward.max_error_rate")


def test_folders_that_cannot_be_written_are_told_before_anything_is_read(toy, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = with_value(toy_overrides(toy, tmp_path), "trainer.default_local_dir", tmp_path / "file")
    argv += [f"trainer.rollout_data_dir={tmp_path}/file/a", f"trainer.validation_data_dir={tmp_path}/file"]
    argv = with_value(argv, "data.train_files", broken_rows(tmp_path))
    said = assert_fails(capsys, argv, "3 problems", "trainer.default_local_dir", "trainer.rollout_data_dir")
    assert said.count(f"{tmp_path}/file is no folder") == 3


def test_a_loss_of_the_users_own_is_looked_up_before_the_data(toy, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def loss(x): ...\n")
    mode = "actor_rollout_ref.actor.policy_loss.loss_mode"
    argv = [*toy_overrides(toy, tmp_path / "run"), f"{mode}={tmp_path}/mine.py:los"]
    assert_fails(
        capsys, with_value(argv, "data.train_files", broken_rows(tmp_path)), mode, "defines no 'los'", "'loss'"
    )


def damaged_model(toy, folder: Path) -> Path:
    shutil.copytree(toy["model"], folder)
    return folder


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("model.safetensors", b"\x10", ["damaged or cut off"]),
        ("tokenizer_config.json", b"{broken", ["tokenizer (tokenizer_config.json)"]),
        ("chat_template.jinja", b"hello", ["the same text of all 512 prompts, 'hello'"]),
    ],
)
def test_a_damaged_model_folder(toy, tmp_path, capsys, file, content, words):
    folder = damaged_model(toy, tmp_path / "model")
    (folder / file).write_bytes(content)
    assert_fails(capsys, with_value(toy_overrides(toy, tmp_path / "run"), MODEL, folder), *words)


def test_a_model_folder_without_tokenizer_is_not_read_as_an_empty_one(toy, tmp_path, capsys):
    folder = damaged_model(toy, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert_fails(
        capsys, with_value(toy_overrides(toy, tmp_path / "run"), MODEL, folder), "no tokenizer", "tokenizer.json"
    )


def test_a_config_that_does_not_fit_the_weights(toy, tmp_path, capsys):
    argv = toy_overrides(toy, tmp_path / "run")
    key = "actor_rollout_ref.model.override_config"
    assert_fails(capsys, [*argv, f"+{key}.hidden_size=64"], "have another shape", "override_config")
    assert_fails(capsys, [*argv, f"+{key}.num_hidden_layers=5"], "override_config")


def test_a_critic_of_another_vocabulary_is_named_as_the_critic(toy, tmp_path, capsys):
    other = build_tiny_model(tmp_path / "critic", ["a"], hidden_size=32, intermediate_size=64, num_layers=1)
    argv = [*toy_overrides(toy, tmp_path / "run"), f"critic.model.path={other}"]
    assert_fails(capsys, argv, "critic.model.path: ", "tokens", "do not fit")


@pytest.mark.parametrize("section", ["actor_rollout_ref.model", "critic.model"])
def test_a_model_with_code_of_its_own_names_the_key_of_its_section(toy, tmp_path, capsys, section):
    folder = tmp_path / "model"
    shutil.copytree(toy["model"], folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text("raise SystemError\n")
    argv = with_value(toy_overrides(toy, tmp_path / "run"), f"{section}.path", folder)
    assert_fails(capsys, argv, f"Read it, then allow it with {section}.trust_remote_code=true.")


def test_an_unknown_data_source(toy, tmp_path, capsys):
    argv = [item for item in toy_overrides(toy, tmp_path) if not item.startswith("custom_reward_function")]
    assert_fails(capsys, argv, "toy", "custom_reward_function.path", "openai/gsm8k")


def test_the_process_itself_exits_with_2(toy, tmp_path):
    argv = [*toy_overrides(toy, tmp_path), "trainer.lr=1"]
    done = subprocess.run(
        [sys.executable, "-m", "steepest.trainer.main_ppo", *argv],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: trainer.lr") and "Traceback" not in done.stderr
