"""A task with a known optimum: answer with the digit that stands in the prompt. One response token, ten classes."""

from __future__ import annotations

import json
from pathlib import Path

from steepest.models.tiny import build_tiny_model

REWARD = '''
import random

def digit(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str.strip() == ground_truth)

def shuffled(data_source, solution_str, ground_truth, extra_info):
    """As often 1 as `digit` is for a lucky guess, whatever the answer."""
    return float(random.random() < 0.1)
'''


def make_toy(folder: Path, *, num_rows: int = 512, hidden_size: int = 32) -> dict[str, Path]:
    """Rows, a reward file and a model of about 20,000 parameters in `folder`; its 4 heads share `hidden_size`."""
    rows = [
        {
            "data_source": "toy",
            "prompt": [{"role": "user", "content": f"say {i % 10}"}],
            "reward_model": {"ground_truth": str(i % 10), "style": "rule"},
        }
        for i in range(num_rows)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    data, reward = folder / "rows.jsonl", folder / "reward.py"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward.write_text(REWARD)
    texts = ["say" + "".join(f" {digit}" for digit in range(10))]
    model = build_tiny_model(folder / "model", texts, hidden_size=hidden_size, intermediate_size=64, num_layers=2)
    return {"data": data, "reward": reward, "model": model}


def toy_overrides(toy: dict[str, Path], run_folder: Path, *more: str, reward: str = "digit") -> list[str]:
    """A PPO job on the toy; `more` overrides."""
    return [
        f"data.train_files={toy['data']}",
        f"data.val_files={toy['data']}",
        "data.train_batch_size=128",
        "data.val_max_samples=40",
        "data.max_prompt_length=16",
        "data.max_response_length=1",
        f"actor_rollout_ref.model.path={toy['model']}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=64",
        "actor_rollout_ref.actor.optim.lr=3e-3",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "critic.optim.lr=3e-3",
        f"custom_reward_function.path={toy['reward']}",
        f"custom_reward_function.name={reward}",
        "reward.num_workers=1",
        "trainer.logger=jsonl",
        "trainer.device=cpu",
        "trainer.save_freq=0",
        f"trainer.default_local_dir={run_folder}",
        *more,
    ]
