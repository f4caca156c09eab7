"""The embedded job: made-up problems, a tiny policy from nothing, a supervised warm-up, PPO. CPU only, no download.

Every part is the real one: the commands it prints can be run by hand. The warm-up's demonstrations are imperfect on
purpose (see data/prepare/arithmetic.py), so that there is something left for reinforcement learning to teach.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from steepest.config.arguments import PRESETS
from steepest.console import shortened
from steepest.errors import ConfigError
from steepest.registry import nearest
from steepest.trainer.run.resume import set_aside

PPO = "ppo"
SFT_LOG_FREQ = 50
RESPONSES = 256
"""Responses of a step, whatever the size of groups; half of them make an update."""


NEXT = """What to do next
  the same job on a real model and real problems:
    steepest prepare gsm8k --local-save-dir data/gsm8k
    steepest ppo {preset}data.train_files=data/gsm8k/train.parquet \\
      data.val_files=data/gsm8k/test.parquet actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct \\
      trainer.test_freq=10 trainer.save_freq=10
  {others}"""


def next_steps(algorithm: str) -> str:
    """What to do after the quickstart, with the algorithm that was chosen."""
    if algorithm == PPO:
        return NEXT.format(preset="", others="GRPO instead of PPO, without a critic: add --config-name grpo")
    others = ", ".join(name for name in algorithms() if name not in (PPO, algorithm))
    return NEXT.format(
        preset=f"--config-name {algorithm} ", others=f"other presets: {others}; without --config-name it is PPO"
    )


@dataclass(frozen=True)
class Settings:
    """What the quickstart does. The defaults take a few minutes on two cores."""

    folder: str = "outputs/quickstart"
    seed: int = 0
    algorithm: str = PPO
    """ppo, or a preset."""
    sft_steps: int = 800
    ppo_steps: int = 40
    num_train: int = 8192
    num_test: int = 512
    num_sft: int = 16384

    @property
    def data(self) -> Path:
        return Path(self.folder) / "data"

    @property
    def model(self) -> Path:
        return Path(self.folder) / "model"


def main(*, seed: int = 0, folder: Path | str = "outputs/quickstart", algorithm: str = PPO) -> int:
    """The `steepest quickstart` command. Raises ConfigError for an algorithm that there is no preset for."""
    check_algorithm(algorithm)
    return run_quickstart(Settings(folder=str(folder), seed=seed, algorithm=algorithm))


def algorithms() -> list[str]:
    """What the quickstart can train by: ppo, and the presets."""
    return [PPO, *sorted(path.stem for path in PRESETS.glob("*.yaml"))]


def check_algorithm(name: str) -> None:
    if name not in algorithms():
        guess = nearest(name, algorithms())
        hint = f" Did you mean {guess}?" if guess else ""
        raise ConfigError(f"--algorithm {name}: there is no such preset.{hint} There are: {', '.join(algorithms())}.")


def run_quickstart(settings: Settings) -> int:
    """Run the job and print its story; the last line is for scripts."""
    began = time.perf_counter()
    moved = set_aside(Path(settings.folder))
    if moved:
        say(f"the earlier run in {settings.folder} was moved to {moved}")
    make_inputs(settings)
    before_sft = ppo(settings, "before_sft", settings.model, ["trainer.val_only=True"])
    warm = sft(settings)
    trained = ppo(settings, "ppo", warm, ppo_overrides(settings))
    first, last = min(trained.history), max(trained.history)
    samples_before = read_samples(Path(settings.folder) / "samples" / f"{first}.jsonl")
    samples_after = read_samples(Path(settings.folder) / "samples" / f"{last}.jsonl")
    print(story(before_sft.history[0], trained.history, samples_before, samples_after))
    print(next_steps(settings.algorithm))
    print(
        f"quickstart: before_sft={before_sft.history[0]:.4f} before_ppo={trained.history[first]:.4f} "
        f"after_ppo={trained.history[last]:.4f} seconds={time.perf_counter() - began:.0f}",
        flush=True,
    )
    return 0


def make_inputs(settings: Settings) -> None:
    from steepest.data.prepare.arithmetic import arithmetic_corpus, prepare_arithmetic
    from steepest.models.tiny import build_tiny_model

    say(f"1. problems: steepest prepare arithmetic --local-save-dir {settings.data} --seed {settings.seed}")
    prepare_arithmetic(
        settings.data,
        num_train=settings.num_train,
        num_test=settings.num_test,
        num_sft=settings.num_sft,
        seed=settings.seed,
    )
    say("2. a tiny model from nothing, with a tokenizer of whole words and numbers")
    build_tiny_model(settings.model, arithmetic_corpus(), intermediate_size=256, seed=settings.seed)


def sft(settings: Settings) -> Path:
    """The supervised warm-up; returns the model's folder."""
    from steepest.config.load import load_sft_config
    from steepest.trainer.jobs.sft import run_sft

    overrides = [
        f"data.train_files={settings.data}/sft.parquet",
        "data.response_key=answer",
        "data.train_batch_size=32",
        "data.max_length=96",
        f"data.seed={settings.seed}",
        f"model.path={settings.model}",
        "optim.lr=5e-3",
        "optim.lr_scheduler_type=cosine",
        "optim.lr_warmup_steps=40",
        "optim.betas=[0.9,0.98]",
        f"trainer.total_training_steps={settings.sft_steps}",
        "trainer.logger=brief",
        f"trainer.log_freq={SFT_LOG_FREQ}",
        f"trainer.default_local_dir={settings.folder}/sft",
    ]
    say("3. supervised warm-up on imperfect demonstrations: steepest sft " + shlex.join(overrides))
    return run_sft(load_sft_config(overrides)).model


def ppo_overrides(settings: Settings) -> list[str]:
    critic = ["critic.optim.lr=1e-3"] if settings.algorithm == PPO else []
    return [
        *critic,
        f"trainer.total_training_steps={settings.ppo_steps}",
        "actor_rollout_ref.actor.optim.lr=2e-4",
        "trainer.test_freq=5",
        "trainer.save_freq=10",
        "trainer.max_actor_ckpt_to_keep=1",
        f"trainer.validation_data_dir={settings.folder}/samples",
    ]


def job_overrides(settings: Settings, name: str, model: Path) -> list[str]:
    """What every PPO command of the quickstart has in common; its run folder is `name`."""
    preset, prompts = [], RESPONSES
    if settings.algorithm != PPO:
        preset = ["--config-name", settings.algorithm]
        prompts //= group_size(settings.algorithm)
    return [
        *preset,
        f"data.train_files={settings.data}/train.parquet",
        f"data.val_files={settings.data}/test.parquet",
        f"data.train_batch_size={prompts}",
        "data.max_prompt_length=64",
        "data.max_response_length=32",
        f"data.seed={settings.seed}",
        f"actor_rollout_ref.rollout.seed={settings.seed}",
        f"actor_rollout_ref.model.path={model}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={prompts // 2}",
        "trainer.logger=brief",
        f"trainer.default_local_dir={settings.folder}/{name}",
    ]


def group_size(preset: str) -> int:
    """Responses a prompt by a preset."""
    found = yaml.safe_load((PRESETS / f"{preset}.yaml").read_text(encoding="utf-8"))
    n: int = found.get("actor_rollout_ref", {}).get("rollout", {}).get("n", 1)
    return n


def ppo(settings: Settings, name: str, model: Path, more: Sequence[str]) -> Any:
    """The PPO command on a model; with `trainer.val_only=True` only its validation."""
    from steepest.config.load import load_config
    from steepest.trainer.jobs.ppo import run_ppo

    overrides = [*job_overrides(settings, name, model), *more]
    what = "accuracy of the untrained model" if "trainer.val_only=True" in more else "4. PPO"
    say(f"{what}: steepest ppo " + shlex.join(overrides))
    return run_ppo(load_config(overrides))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def read_samples(path: Path) -> list[dict[str, Any]]:
    from steepest.loggers.rows import read_rows

    return list(read_rows(path))


def story(
    before_sft: float,
    history: Mapping[int, float],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
) -> str:
    """Accuracy on the held-out problems over the run, and three answers before and after PPO."""
    first, last = min(history), max(history)
    lines = [
        "",
        f"Accuracy on {len(after)} held-out problems (greedy)",
        f"  before the warm-up  {before_sft:.3f}",
        f"  before PPO          {history[first]:.3f}",
        f"  after PPO           {history[last]:.3f}",
        "",
        "The curve of PPO",
    ]
    lines += [f"  step {step:>3}  {score:.3f}  {'#' * round(40 * score)}" for step, score in sorted(history.items())]
    lines += ["", "Three problems, before and after PPO"]
    for old, new in telling_pairs(before, after):
        lines += [
            f"  {new['prompt'][-1]['content']}  (right answer: {new['ground_truth']})",
            f"    before: {shortened(old['response'])}   score {old['score']:g}",
            f"    after:  {shortened(new['response'])}   score {new['score']:g}",
        ]
    return "\n".join([*lines, ""])


def telling_pairs(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], num: int = 3
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The first problems that PPO got right and one that is still wrong, where there are such."""
    pairs = list(zip(before, after, strict=True))
    learned = [i for i, (old, new) in enumerate(pairs) if new["score"] and not old["score"]]
    wrong = [i for i, (_, new) in enumerate(pairs) if not new["score"]]
    order = dict.fromkeys([*learned[: num - 1], *wrong[:1], *learned, *range(len(pairs))])
    return [pairs[i] for i in list(order)[:num]]
