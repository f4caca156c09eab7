"""Tiny real runs with one sickness each: a reward, a key or a rollout engine that makes it happen."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from steepest.assembly.engine import build_engine
from steepest.cluster.local import LocalCluster
from steepest.config.key_names import PPO_KEYS
from steepest.config.load import load_config
from steepest.errors import key_names
from steepest.learner.checkpoint import Start
from steepest.loggers.jsonl import read_metrics
from steepest.models.tiny import build_tiny_model
from steepest.process.start_timing import Laps
from steepest.rollout import RolloutEngine
from steepest.rollout.api import Completion, GenerationRequest, WeightSource
from steepest.rollout.weights import ModelDescription
from steepest.trainer.jobs.ppo import Job, opened
from steepest.trainer.run.folder import hold

REWARDS = """
def digit(data_source, solution_str, ground_truth, extra_info):
    return float(ground_truth in solution_str)

def nothing(data_source, solution_str, ground_truth, extra_info):
    return 0.0

def of_the_prompt(data_source, solution_str, ground_truth, extra_info):
    if ground_truth == "9":
        raise ValueError("no nine")
    return float(int(ground_truth) % 2)

def seven(data_source, solution_str, ground_truth, extra_info):
    return float(solution_str.strip().startswith("7"))

def huge(data_source, solution_str, ground_truth, extra_info):
    return 3e38 if ground_truth in solution_str else -3e38

def length(data_source, solution_str, ground_truth, extra_info):
    return len(solution_str.split()) / 10
"""


def make_world(folder: Path) -> dict[str, Path]:
    """Rows that ask for a digit, the same rows with another digit as their answer, rewards, and a tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shift in (("rows", 0), ("wrong", 1)):
        rows = [
            {
                "data_source": "toy",
                "prompt": [{"role": "user", "content": f"say {i % 10}"}],
                "reward_model": {"ground_truth": str((i + shift) % 10), "style": "rule"},
            }
            for i in range(80)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARDS)
    texts = ["say" + "".join(f" {digit}" for digit in range(10))]
    build_tiny_model(folder / "model", texts, hidden_size=32, intermediate_size=64, num_layers=1)
    names = {"rows": "rows.jsonl", "wrong": "wrong.jsonl", "reward": "reward.py", "model": "model"}
    return {key: folder / name for key, name in names.items()}


def words(world: dict[str, Path], run_folder: Path, reward: str, *more: str) -> list[str]:
    """A healthy job but for `reward` and `more`."""
    return [
        f"data.train_files={world['rows']}",
        f"data.val_files={world['rows']}",
        "data.train_batch_size=32",
        "data.val_max_samples=10",
        "data.max_prompt_length=16",
        "data.max_response_length=24",
        f"actor_rollout_ref.model.path={world['model']}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=32",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.fsdp_config.dtype=float32",
        "critic.optim.lr=3e-3",
        f"custom_reward_function.path={world['reward']}",
        f"custom_reward_function.name={reward}",
        "reward.num_workers=1",
        "trainer.logger=jsonl",
        "trainer.device=cpu",
        "trainer.save_freq=0",
        f"trainer.default_local_dir={run_folder}",
        *more,
    ]


class SickEngine:
    """A rollout engine that has something wrong with it; everything else is the engine's own."""

    def __init__(self, job: Job, cluster: LocalCluster) -> None:
        self.engine = cluster.roles.engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class HotEngine(SickEngine):
    """Samples at twice the temperature that it is asked for."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        hot = [replace(r, sampling=replace(r.sampling, temperature=2 * r.sampling.temperature)) for r in requests]
        return self.engine.generate(hot)


class EndlessEngine(SickEngine):
    """Takes the end token away from each response, as one that cuts padding off does where pad and end are one."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        return [[self._cut(answer) for answer in group] for group in self.engine.generate(requests)]

    def _cut(self, answer: Completion) -> Completion:
        if answer.finish_reason != "stop" or len(answer.token_ids) == 1:
            return answer
        return replace(answer, token_ids=answer.token_ids[:-1], log_probs=answer.log_probs[:-1])


class StaleEngine(SickEngine):
    """Has a copy of the first weights, and takes no others."""

    def __init__(self, job: Job, cluster: LocalCluster) -> None:
        model = cluster.roles.actor.model
        self.named = [(name, tensor.detach().clone()) for name, tensor in model.named_weights()]
        description = ModelDescription.of(model)
        self.engine = build_engine(job.config, description, job.tokenizer, job.folders["actor"], job.device)
        self.engine.load_weights(self, 0)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.named)

    def load_weights(self, source: WeightSource, version: int) -> None:
        """The weights are not taken."""


class SickJob(Job):
    """A job whose engine is replaced by a sick one once the models are there."""

    def __init__(self, *parts: Any, engine: Callable[[Job, LocalCluster], SickEngine]) -> None:
        super().__init__(*parts)
        self._engine = engine

    def start_cluster(self, start: Start, laps: Laps) -> LocalCluster:
        cluster = super().start_cluster(start, laps)
        cluster.roles.engine = cast(RolloutEngine, self._engine(self, cluster))
        return cluster


def run(
    overrides: list[str], engine: Callable[[Job, LocalCluster], SickEngine] | None = None
) -> dict[int, dict[str, float]]:
    """The rows of the metrics of a job, whose engine may be a sick one."""
    config, laps = load_config(overrides), Laps()
    make = Job if engine is None else partial(SickJob, engine=engine)
    with key_names(PPO_KEYS), opened(config, laps, make) as job, hold(job.folder):
        job.run(laps)
    return read_metrics(job.folder / "metrics.jsonl")
