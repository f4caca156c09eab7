"""The sections of supervised fine-tuning (`python -m steepest.trainer.main_sft`): `data`, `trainer`, and its rules.

`model`, `engine` and `optim` are those of sections/model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from steepest.config.checks import Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.sections.batch_sizes import TOKEN_BUDGET
from steepest.config.sections.data import a_batch_is_full
from steepest.config.sections.model import (
    adapter_problems,
    hub_switches_are_clear,
    model_without_effect,
    optim_without_effect,
    resolve_hub,
    template_problems,
)
from steepest.config.sections.trainer import (
    names_make_a_folder,
    one_process,
    resolve_folder,
    resume_path_is_given,
    resume_path_without_effect,
    saves_anything,
    saving_without_effect,
)
from steepest.config.types import (
    DERIVED,
    DeviceName,
    File,
    Files,
    Hub,
    LoggerName,
    Mapping,
    MinusOneOr,
    NonNegative,
    Positive,
    PositiveFloat,
    RequiredFiles,
    Seed,
)

if TYPE_CHECKING:
    from steepest.config.schema import SFTConfig

SECTION = Section()


@dataclass(frozen=True)
class SFTDataConfig:
    """`data`: conversations, or prompts with answers."""

    train_files: RequiredFiles = ()
    """What to train on, one name or a list: a file (parquet, jsonl, json, csv, tsv), or a data set on a hub
    (`OWNER/NAME:CONFIG:SPLIT`)."""
    val_files: Files = ()
    """What to validate on, as `train_files`; none: no validation."""
    train_batch_size: Positive = 256
    """Samples an optimizer step. The last incomplete batch of an epoch is left out. Where it is not given, it is no
    more than there are rows."""
    max_length: Positive = 1024
    """Longest sample in tokens, prompt and answer; see `truncation`. Where it is not given, it is no more than the
    model takes."""
    micro_batch_size_per_gpu: Positive | None = None
    """Samples a forward and backward; null: filled to `max_token_len_per_gpu`."""
    max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: 4096, or `max_length` if that is more."""
    messages_key: str = "messages"
    """Column with a whole conversation; the loss is on the assistant's turns. Read when the file has it."""
    prompt_key: str = "prompt"
    """Column with the prompt (text or messages), for files without `messages_key`."""
    response_key: str = "response"
    """Column with the answer (text or messages), for files without `messages_key`."""
    ignored_columns: tuple[str, ...] = ()
    """Columns, such as `tools` or `images`, whose content need not reach the model; otherwise it stops the run."""
    hub: Hub = DERIVED
    """Hub of data sets that are no local files; null: the model's."""
    truncation: Literal["error", "left", "right"] = "error"
    """An overlong sample: stop the run, or cut tokens at its left or right."""
    shuffle: bool = True
    """A new order of the samples each epoch."""
    seed: Seed = 42
    """Seed of order and subset."""
    train_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many training rows; -1: all."""
    val_max_samples: Annotated[int, MinusOneOr(1)] = -1
    """Random subset of this many validation rows; -1: all."""
    apply_chat_template_kwargs: Mapping = field(default_factory=dict)
    """Arguments for the chat template."""


@dataclass(frozen=True)
class SFTTrainerConfig:
    """`trainer`: the run."""

    total_epochs: Positive = 1
    """Passes over the training data."""
    total_training_steps: Positive | None = None
    """Steps of the run; null: steps an epoch times `total_epochs`. Wins over `total_epochs` when given."""
    project_name: str = "steepest"
    """Folder and logger project."""
    experiment_name: str = "sft"
    """Folder and logger run."""
    logger: tuple[LoggerName, ...] = ("console",)
    """Where metrics go, one name or a list. metrics.jsonl is always written."""
    log_freq: Positive = 1
    """Steps from one line on the console to the next; files and services get every step."""
    device: DeviceName | None = None
    """null: the best one present."""
    nnodes: Positive = 1
    """Machines."""
    n_gpus_per_node: Positive = 1
    """Accelerators a machine."""
    save_freq: Annotated[int, MinusOneOr(0)] = -1
    """Steps between checkpoints; -1: none but that of the last step; 0: none at all."""
    save_last: bool = True
    """Save the last step too, whatever `save_freq` is (0 apart)."""
    grace_seconds: PositiveFloat = 25.0
    """Seconds a run may take to end its step and save it after SIGTERM, Ctrl-C or another stop signal."""
    test_freq: Annotated[int, MinusOneOr(1)] = -1
    """Steps between validations, and one at the end; -1: none."""
    default_local_dir: File = DERIVED
    """Run folder; null: checkpoints/<project_name>/<experiment_name>."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """auto: resume from the newest good checkpoint of the run folder, if any."""
    resume_from_path: File | None = None
    """Checkpoint folder (global_step_N) for resume_mode=resume_path."""
    max_ckpt_to_keep: Positive | None = None
    """Newest checkpoints kept, besides the best; null: all."""
    report_freq: NonNegative = 100
    """Steps between two writings of report.html in the run folder, which is also written at the end; 0: none."""


@SECTION.null
def resolve(d: Deriver) -> None:
    resolve_hub(d, "model.hub")
    d.copy("model.hub", "data.hub")
    d.fill("model.tokenizer_path", d["model.path"] or None, "model.path")
    d.fill("data.max_token_len_per_gpu", max(TOKEN_BUDGET, d["data.max_length"]), "data.max_length")
    resolve_folder(d)


SECTION.rule("model.hub")(hub_switches_are_clear)


@SECTION.rule("model.custom_chat_template")
def chat_template_is_one(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from template_problems("model.custom_chat_template", c.model.custom_chat_template)


@SECTION.rule("data.max_length", "data.max_token_len_per_gpu")
def one_sample_fits(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    tokens = c.data.max_token_len_per_gpu
    if tokens is not None and tokens < c.data.max_length:
        yield (
            f"data.max_token_len_per_gpu={tokens}: one sample may have data.max_length={c.data.max_length} tokens. "
            f"Use at least {c.data.max_length}."
        )


SECTION.rule("trainer.project_name", "trainer.experiment_name")(names_make_a_folder)
SECTION.rule("trainer.nnodes", "trainer.n_gpus_per_node")(one_process)
SECTION.rule("trainer.resume_mode", "trainer.resume_from_path")(resume_path_is_given)
SECTION.rule("data.train_max_samples", "data.train_batch_size")(a_batch_is_full)


@SECTION.rule("model.target_modules", "model.exclude_modules")
def adapter_has_layers(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from adapter_problems("model", c.model.target_modules, c.model.exclude_modules)


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        resume_path_without_effect(),
        *saving_without_effect(),
        NoEffect(("trainer.max_ckpt_to_keep",), lambda c: not saves_anything(c.trainer), "no checkpoint is written"),
        NoEffect(names_of("data", "val_max_samples"), lambda c: not c.data.val_files, "there are no data.val_files"),
        NoEffect(("trainer.test_freq",), lambda c: not c.data.val_files, "there are no data.val_files"),
        *model_without_effect("model", lambda c: c.model),
        *optim_without_effect("optim", lambda c: c.optim),
    ]
