"""`trainer`: the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from steepest.config.checks import Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.types import (
    DERIVED,
    NAME_BYTES,
    DeviceName,
    File,
    LoggerName,
    MinusOneOr,
    NonNegative,
    Positive,
    PositiveFloat,
)

if TYPE_CHECKING:
    from steepest.config.schema import Config, SFTConfig
    from steepest.config.sections.sft import SFTTrainerConfig

SECTION = Section()


@dataclass(frozen=True)
class TrainerConfig:
    """`trainer`: the run."""

    total_epochs: Positive = 30
    """Passes over the training data."""
    total_training_steps: Positive | None = None
    """Steps of the run; null: steps an epoch times `total_epochs`. Wins over `total_epochs` when given."""
    project_name: str = "steepest"
    """Folder and logger project."""
    experiment_name: str = "ppo"
    """Folder and logger run. Another name starts another run."""
    logger: tuple[LoggerName, ...] = ("console",)
    """Where metrics go, one name or a list. metrics.jsonl is always written."""
    log_freq: Positive = 1
    """Steps from one line on the console to the next; files and services get every step."""
    device: DeviceName | None = None
    """null: the best one present."""
    nnodes: Positive = 1
    """Machines."""
    n_gpus_per_node: Positive = 1
    """Accelerators a machine (on CPU: processes). verl: 8."""
    save_freq: Annotated[int, MinusOneOr(0)] = -1
    """Steps between checkpoints; -1: none but that of the last step; 0: none at all."""
    save_last: bool = True
    """Save the last step too, whatever `save_freq` is (0 apart). Ours, not verl's."""
    grace_seconds: PositiveFloat = 25.0
    """Seconds a run may take to end its step and save it after SIGTERM, Ctrl-C or another stop signal. Ours."""
    test_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between validations, and one at the end; -1: none."""
    on_problem: Literal["warn", "stop"] = "warn"
    """What a health check that counts as a problem does (docs/health.md): print its sentence, or end the run after the
    step is saved. Ours, not verl's."""
    val_before_train: bool = True
    """Validate before the first step."""
    val_only: bool = False
    """Validate, then stop."""
    critic_warmup: NonNegative = 0
    """First steps in which only the critic learns."""
    critic_warmup_returns: Literal["estimator", "monte_carlo"] = "estimator"
    """What the critic learns in those steps: the estimator's returns, or the rewards that followed, as with
    `algorithm.lam=1` (VC-PPO's value pretraining). Ours, not verl's."""
    default_local_dir: File = DERIVED
    """Run folder; null: checkpoints/<project_name>/<experiment_name>."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto: resume from the newest good checkpoint of the run folder, if any."""
    resume_from_path: File | None = None
    """Checkpoint folder (global_step_N) for resume_mode=resume_path."""
    max_actor_ckpt_to_keep: Positive | None = None
    """Newest checkpoints kept, besides the best; null: all."""
    max_critic_ckpt_to_keep: Positive | None = None
    """Another name for the key above: a checkpoint holds actor and critic together."""
    log_val_generations: NonNegative = 0
    """Validation answers shown on the console and kept in samples.jsonl each time."""
    rollout_data_dir: File | None = None
    """Folder for every training response, one jsonl file a step; null: not written."""
    validation_data_dir: File | None = None
    """Folder for every validation response, one jsonl file each time; null: not written."""


@SECTION.null
def resolve(d: Deriver) -> None:
    resolve_folder(d)
    d.copy("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep")
    d.copy("trainer.max_critic_ckpt_to_keep", "trainer.max_actor_ckpt_to_keep")


def resolve_folder(d: Deriver) -> None:
    """The run folder."""
    folder = f"checkpoints/{d['trainer.project_name']}/{d['trainer.experiment_name']}"
    d.fill("trainer.default_local_dir", folder, "trainer.experiment_name")


@SECTION.rule("trainer.project_name", "trainer.experiment_name")
def names_make_a_folder(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    """Also where the folder is given: loggers make folders and addresses of the names."""
    for name in ("project_name", "experiment_name"):
        value = str(getattr(c.trainer, name))
        if problem := _no_folder_name(value):
            yield f"trainer.{name}={value[:60]!r}: {problem}, and it names a folder. Choose another."


_LONGEST_NAME = NAME_BYTES - len(".old-999") - len(".lock")
"""Longest name of a run folder: its lock and an earlier run set aside stand next to it."""


def _no_folder_name(value: str) -> str | None:
    if value.startswith("~/"):
        return "begins with ~/, which a shell takes for a home folder"
    if any(character < " " or character in "\x7f\x85\u2028\u2029" for character in value):
        return "holds a control character or a line break"
    for part in value.split("/"):
        if part.strip() in ("", ".", ".."):
            return "is empty" if not value.strip() else "has an empty part, . or .. between slashes"
        if len(part.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
            return f"is longer than {_LONGEST_NAME} bytes"
    return None


@SECTION.rule("trainer.nnodes", "trainer.n_gpus_per_node")
def one_process(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    world = c.trainer.nnodes * c.trainer.n_gpus_per_node
    if world > 1:
        yield (
            f"trainer.nnodes={c.trainer.nnodes} times trainer.n_gpus_per_node={c.trainer.n_gpus_per_node} is {world}: "
            "one process in this version. Set both to 1."
        )


@SECTION.rule("trainer.resume_mode", "trainer.resume_from_path")
def resume_path_is_given(c: Config | SFTConfig, is_set: IsSet) -> Iterator[str]:
    if c.trainer.resume_mode == "resume_path" and not c.trainer.resume_from_path:
        yield (
            "trainer.resume_mode=resume_path: needs trainer.resume_from_path=.../global_step_N, "
            "or use trainer.resume_mode=auto."
        )


@SECTION.rule("trainer.critic_warmup", "trainer.total_training_steps")
def actor_is_trained(c: Config, is_set: IsSet) -> Iterator[str]:
    steps = c.trainer.total_training_steps
    if steps and c.trainer.critic_warmup >= steps:
        yield (
            f"trainer.critic_warmup={c.trainer.critic_warmup}: the actor would never be trained in "
            f"trainer.total_training_steps={steps}. Use less."
        )


@SECTION.rule("trainer.val_only", "trainer.val_before_train")
def something_to_do(c: Config, is_set: IsSet) -> Iterator[str]:
    if c.trainer.val_only and not c.trainer.val_before_train:
        yield "trainer.val_only=True with trainer.val_before_train=False: nothing to do. Remove one of them."


@SECTION.rule("trainer.max_actor_ckpt_to_keep", "trainer.max_critic_ckpt_to_keep")
def checkpoints_are_kept_together(c: Config, is_set: IsSet) -> Iterator[str]:
    actor, critic = c.trainer.max_actor_ckpt_to_keep, c.trainer.max_critic_ckpt_to_keep
    if actor != critic:
        yield (
            f"trainer.max_actor_ckpt_to_keep={actor} and trainer.max_critic_ckpt_to_keep={critic}: a checkpoint holds "
            "actor and critic together. Give one of them, or the same number."
        )


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            ("trainer.critic_warmup_returns",), lambda c: c.trainer.critic_warmup == 0, "trainer.critic_warmup is 0"
        ),
        NoEffect(
            names_of("trainer", "max_actor_ckpt_to_keep max_critic_ckpt_to_keep"),
            lambda c: not saves_anything(c.trainer),
            "no checkpoint is written",
        ),
        *saving_without_effect(),
        NoEffect(
            names_of("trainer", "log_val_generations validation_data_dir"),
            lambda c: not c.trainer.val_before_train and c.trainer.test_freq < 0,
            "there is no validation: trainer.val_before_train is off and trainer.test_freq is -1",
        ),
        resume_path_without_effect(),
    ]


def saves_anything(trainer: TrainerConfig | SFTTrainerConfig) -> bool:
    """Whether a run writes any checkpoint."""
    return trainer.save_freq > 0 or (trainer.save_freq < 0 and trainer.save_last)


def saving_without_effect() -> list[NoEffect]:
    """Entries that both jobs have."""
    return [
        NoEffect(("trainer.save_last",), lambda c: c.trainer.save_freq == 0, "trainer.save_freq is 0"),
        NoEffect(("trainer.grace_seconds",), lambda c: not saves_anything(c.trainer), "no checkpoint is written"),
    ]


def resume_path_without_effect() -> NoEffect:
    """An entry that both jobs have."""
    return NoEffect(
        ("trainer.resume_from_path",),
        lambda c: c.trainer.resume_mode != "resume_path",
        "resume_mode is not resume_path",
    )
