"""The SFT job: it learns, it resumes bit for bit, it takes each form of rows, and its model loads as it lies."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steepest.config.load import load_sft_config
from steepest.loggers.rows import read_rows
from steepest.process.entry import run_entry
from steepest.trainer.jobs.sft import run_sft
from steepest.trainer.main_sft import main
from tests.support.full_memory import FullMemory
from tests.support.toy_run import make_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> dict[str, Path]:
    made = make_toy(tmp_path_factory.mktemp("toy"))
    folder = made["data"].parent
    rows = [(f"say {i % 10}", f" {i % 10}") for i in range(64)]
    pairs = [{"prompt": question, "response": answer} for question, answer in rows]
    talks = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in rows
    ]
    for name, records in (("pairs", pairs), ("messages", talks)):
        made[name] = folder / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


def overrides(toy: dict[str, Path], folder: Path, *more: str, rows: str = "pairs") -> list[str]:
    return [
        f"data.train_files={toy[rows]}",
        "data.train_batch_size=16",
        "data.max_length=32",
        f"model.path={toy['model']}",
        "optim.lr=1e-2",
        "trainer.logger=jsonl",
        f"trainer.default_local_dir={folder}",
        *more,
    ]


def test_it_learns_and_its_model_loads_as_it_lies(toy, tmp_path):
    more = ("trainer.total_training_steps=30", f"data.val_files={toy['messages']}", "trainer.test_freq=10")
    result = run_sft(load_sft_config(overrides(toy, tmp_path, *more)))
    assert sorted(result.history) == [10, 20, 30]
    assert result.history[30] < 0.1 < result.history[10]
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "train/loss" in row]
    assert len(rows) == 30 and rows[-1]["train/loss"] < 0.1 and rows[0]["train/loss"] > 1
    # " 7" and the end token: two targets a row, 16 rows; the prompt counts for nothing
    assert {row["train/num_target_tokens"] for row in rows} == {32}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f'"steps":{list(range(1, 31))},'.replace(" ", "") in page and '"val/loss":[null,' in page
    model = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) > 0


def test_both_forms_of_rows_are_one_data_set(toy, tmp_path):
    ends = []
    for name in ("pairs", "messages"):
        config = load_sft_config(
            overrides(toy, tmp_path / name, "trainer.total_training_steps=3", "data.shuffle=False", rows=name)
        )
        ends.append(load_file(run_sft(config).model / "model.safetensors"))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_resume_equals_no_resume(toy, tmp_path, capsys):
    more = ("trainer.total_training_steps=6", "trainer.save_freq=2", "optim.lr_scheduler_type=cosine")
    whole = run_sft(load_sft_config(overrides(toy, tmp_path / "whole", *more))).model
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / f"global_step_{step}")
    again = run_sft(load_sft_config(overrides(toy, tmp_path / "cut", *more))).model
    said = capsys.readouterr().out
    assert "resuming from step 2" in said
    assert re.search(
        r"\n  dtype       (float32|bfloat16): as at the run's last start. engine.dtype gives another.", said
    )
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(again / file), load_file(whole / file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), file


def test_micro_batches_do_not_change_the_result(toy, tmp_path):
    losses = []
    for number, more in enumerate((["data.micro_batch_size_per_gpu=3"], ["data.max_token_len_per_gpu=64"], [])):
        words = ("trainer.total_training_steps=5", "engine.dtype=float32", *more)  # equal to float32's rounding
        run_sft(load_sft_config(overrides(toy, tmp_path / str(number), *words)))
        losses.append([row["train/loss"] for row in read_rows(tmp_path / str(number) / "metrics.jsonl")])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "more, words",
    [
        (["optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        (["data.train_batch_size=100"], ["data.train_batch_size=100", "64"]),
        (["data.response_key=answer"], ["answer", "response"]),
        (["data.max_length=4"], ["data.max_length"]),
        (["model.path=./nowhere"], ["model.path", "nowhere"]),
    ],
)
def test_a_wrong_value(toy, tmp_path, capsys, more, words):
    key = more[0].split("=")[0]
    argv = [item for item in overrides(toy, tmp_path / "run") if not item.startswith(f"{key}=")] + more
    assert run_entry(main, argv) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said


def said_of_model(toy, tmp_path, capsys, change) -> str:
    """What a run prints on standard error over a copy of the toy's model that `change` was given."""
    folder = tmp_path / "model"
    shutil.copytree(toy["model"], folder)
    change(folder)
    argv = [item for item in overrides(toy, tmp_path / "run") if not item.startswith("model.path=")]
    assert run_entry(main, [*argv, f"model.path={folder}"]) == 2
    said = capsys.readouterr().err
    assert "actor_rollout_ref" not in said and "\x02" not in said
    return str(said)


def needs_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.MineConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_mine.py").write_text("raise SystemError\n")


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<{i}>" for i in range(4096)])
    tokenizer.save_pretrained(folder)


def too_short(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "chat_template.jinja").unlink(), " model.custom_chat_template."),
        (needs_code, "Read it, then allow it with model.trust_remote_code=true."),
        (more_tokens, "error: model.path: the tokenizer has "),
        (too_short, "positions for 16 only (max_position_embeddings). Lower data.max_length.\n"),
    ],
)
def test_messages_about_a_model_name_the_keys_of_this_job(toy, tmp_path, capsys, change, words):
    assert words in said_of_model(toy, tmp_path, capsys, change)


def test_a_run_out_of_memory_names_the_keys_of_this_job(toy, tmp_path, capsys):
    for more, words in (
        ([], ". Lower data.max_token_len_per_gpu below "),
        (["data.micro_batch_size_per_gpu=4"], ". Lower data.micro_batch_size_per_gpu below 4 (now 4), "),
        (["data.micro_batch_size_per_gpu=1"], ". One sequence alone is too much: lower data.max_length, "),
    ):
        with FullMemory("embedding_dense_backward"):
            assert run_entry(main, [*overrides(toy, tmp_path / "run"), *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: model update: a micro-batch of ") and words in said
        assert "or set model.enable_gradient_checkpointing=true, or take a smaller model." in said


def test_defaults_larger_than_model_and_data_are_no_error(toy, tmp_path, capsys):
    """A model with 100 positions, and fewer rows than the default batch: neither key was given."""
    folder = tmp_path / "model"
    shutil.copytree(toy["model"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100}))
    taken = ("model.path=", "data.max_length=", "data.train_batch_size=", "trainer.total_training_steps=")
    argv = [item for item in overrides(toy, tmp_path / "run") if not item.startswith(taken)]
    assert main([*argv, f"model.path={folder}", "trainer.total_training_steps=1"]) == 0
    said = capsys.readouterr().out
    assert "data.max_length=100 was chosen: the model takes no longer sequences (the default is 1024)." in said
    assert "was chosen: there are no more rows." in said
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "  max_length: 100  # derived from model.path\n" in saved
