"""How every job starts: notes, device, tokenizer, run folder. What can be refused cheaply is refused first."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from steepest.assembly.compute import check_attention
from steepest.config.load import config_dict, save_config
from steepest.config.schema import Config, SFTConfig
from steepest.config.sections.model import ModelConfig
from steepest.config.sections.sft import SFTTrainerConfig
from steepest.config.sections.trainer import TrainerConfig
from steepest.console import say
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.core.policy_losses import POLICY_LOSSES
from steepest.devices.api import Device, select_device
from steepest.errors import CheckpointError, ConfigError
from steepest.hub import TOKENIZER_FILES
from steepest.learner.checkpoint import CheckpointStore
from steepest.loggers.api import Loggers, check_loggers, make_loggers
from steepest.models.load import load_tokenizer
from steepest.process.files import lock
from steepest.process.threads import set_threads
from steepest.rollout import ROLLOUT_ENGINES
from steepest.trainer.run.hooks import changed_values
from steepest.trainer.run.inputs import Inputs
from steepest.trainer.run.model_sources import ModelSources


def begin(config: Config | SFTConfig, *, seed: int) -> Device:
    """Say what the configuration has to say, choose the device and seed it.

    Raises ConfigError for a logger that cannot run, a folder that cannot be written and functions of the user's own
    that are not there, and RolloutError for an engine that is not installed or does not fit the device.
    """
    for message in (*config.provenance.notes, *(f"warning: {text}" for text in config.provenance.warnings)):
        say(message)
    problems = [*check_loggers(config.trainer.logger), *folder_problems(config.trainer)]
    if problems:
        raise ConfigError(problems)
    if isinstance(config, Config):  # now, not when the models have been loaded
        POLICY_LOSSES.get(config.actor_rollout_ref.actor.policy_loss.loss_mode)
        ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator)
    device = select_device(config.trainer.device)
    check_attention(config, device)
    if isinstance(config, Config):
        check_engine(config, device)
    set_threads()
    device.prepare()
    device.seed(seed)
    return device


def check_engine(config: Config, device: Device) -> None:
    """Ask the rollout engine whether it can run on the device, before anything is downloaded or loaded for it."""
    check = ROLLOUT_ENGINES.get(config.actor_rollout_ref.rollout.name).facts.get("check")
    if check is not None:
        check(device)


def folder_problems(trainer: TrainerConfig | SFTTrainerConfig) -> list[str]:
    """What is wrong with the folders that a run writes, one message a key. Nothing is made."""
    keys = ("default_local_dir", "rollout_data_dir", "validation_data_dir")
    named = [(key, getattr(trainer, key, None)) for key in keys]
    return [
        f"trainer.{key}={value}: {problem}. Choose another folder."
        for key, value in named
        if value and (problem := _cannot_write(Path(value).absolute()))
    ]


def _cannot_write(folder: Path) -> str | None:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        return f"{there} is no folder"
    try:
        with TemporaryFile(dir=there):  # os.access knows nothing of /proc, of quotas and of what root may not do
            return None
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror or error})"


def open_tokenizer(
    model: ModelConfig, key: str, folder: Path, sources: ModelSources, *, trust_remote_code: bool
) -> Any:
    """The tokenizer of `model`, whose section of the configuration is `key` and whose weights lie in `folder`."""
    if model.tokenizer_path != model.path:  # `model.revision` is one of `path`
        folder = sources.folder(f"{key}.tokenizer_path", model.tokenizer_path, model.hub, files=TOKENIZER_FILES)
    return load_tokenizer(
        folder,
        custom_chat_template=model.custom_chat_template,
        trust_remote_code=trust_remote_code,
    )


@contextmanager
def hold(folder: Path, flock: Callable[[IO[str], int], None] = fcntl.flock) -> Iterator[None]:
    """Keep other runs out of a run folder. The lock file lies next to it and ends with the process, however that ends.

    Where the file system has no locks (NFS, Lustre), or the folder next to it takes no file (a mounted volume), the run
    goes on with a warning. Raises CheckpointError when another run holds the folder, since two runs would write over
    each other, and when it cannot be made.
    """
    path = folder.absolute().with_name(f".{folder.name}.lock")
    remedy = "choose another trainer.experiment_name or trainer.default_local_dir."
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"the run folder {folder} cannot be made: {error}. See to that, or {remedy}"
            ) from error
        try:
            fault = lock(stack.enter_context(path.open("w")), flock)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is writing to {folder} at this moment. Wait for it or end it, or {remedy}"
            ) from error
        except OSError as error:
            fault = error.strerror or str(error)
        if fault is not None:
            say(
                f"warning: {path} cannot be locked ({fault}): nothing keeps a second run out of {folder}. See to it "
                "that there is none, since two runs would write over each other."
            )
        yield


def open_store(folder: Path, keep: int | None) -> CheckpointStore:
    return CheckpointStore(folder, keep, warn=lambda text: say(f"warning: {text}"))


def open_run_folder(
    config: Config | SFTConfig,
    trainer: TrainerConfig | SFTTrainerConfig,
    folder: Path,
    sources: ModelSources,
    inputs: Inputs,
    *,
    total: int,
    start: int,
) -> Loggers:
    """The loggers of the run, `config.yaml`, `models.json` and `inputs.json`. A run that goes on says what changed
    since its last start.

    Raises CheckpointError for a folder that cannot be written, a full disk for example.
    """
    path = folder / "config.yaml"
    try:
        changed = changed_values(path, config_dict(config))
        if changed:
            say("the configuration differs from that of the run's last start: " + "; ".join(changed))
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, path)
        sources.save(folder)
        inputs.add_models(sources.local)
        inputs.save(folder)
        return make_loggers(
            trainer.logger,
            folder,
            trainer.project_name,
            trainer.experiment_name,
            config_dict(config),
            total_steps=total,
            start_step=start,
            log_freq=trainer.log_freq,
        )
    except OSError as error:
        raise CheckpointError(
            f"the run folder {folder} cannot be written: {error}. Make room, or choose another with "
            "trainer.default_local_dir."
        ) from error
