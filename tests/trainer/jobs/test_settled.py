"""A PPO run whose defaults are larger than its model and its data."""

from __future__ import annotations

import json

from steepest.trainer.main_ppo import main
from tests.support.toy_run import make_toy, toy_overrides

LEFT_OPEN = ("data.train_batch_size=", "data.max_", "actor_rollout_ref.actor.ppo_mini", "trainer.logger=")


def test_defaults_larger_than_model_and_data_are_no_error(tmp_path, capsys):
    """24 positions and 21 rows against 512 + 512 tokens and 1024 prompts. The start says each long part in a pipe."""
    toy = make_toy(tmp_path / "toy", num_rows=21)
    file = toy["model"] / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 24}))
    argv = [word for word in toy_overrides(toy, tmp_path / "run") if not word.startswith(LEFT_OPEN)]
    words = ["trainer.total_training_steps=2", "trainer.val_before_train=False", "trainer.log_freq=10"]
    assert main([*argv, *words]) == 0
    said = capsys.readouterr().out
    lengths = [f"data.{name}_length=" for name in ("max_prompt", "max_response")]
    assert all(name in said for name in lengths)
    assert "the model takes sequences of at most 24 tokens, prompt and response together." in said
    assert "data.train_batch_size=20 was chosen: about 128 responses a step on a CPU (1 a prompt, 21 rows), 5 " in said
    for part in ("loading PyTorch and transformers", "reading the rows", "loading the models and the engine"):
        assert f"{part} ...\n" in said
    lines = [line for line in said.splitlines() if line.startswith("step:")]
    assert [line.split(" - ")[0] for line in lines] == ["step:1", "step:2"]  # the first and the last
    assert " - eta_s:" in lines[0] and " - eta_s:" not in lines[1]
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "  train_batch_size: 20  # derived from device and rows\n" in saved
    assert "    ppo_mini_batch_size: 5  # derived from device and rows\n" in saved
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and not any("eta_s" in row for row in rows)
