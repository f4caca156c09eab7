"""How every job starts: notes, device, tokenizer, run folder. What can be refused cheaply is refused first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steepest.config.load import config_dict, save_config
from steepest.config.schema import Config, TrainerConfig
from steepest.config.schema_model import Hub, ModelConfig
from steepest.config.schema_sft import SFTConfig, SFTTrainerConfig
from steepest.devices.api import Device, select_device
from steepest.errors import ConfigError, ModelError
from steepest.loggers.api import Loggers, check_loggers, make_loggers
from steepest.models.load import load_tokenizer, resolve_model
from steepest.trainer.run import changed_values, say
from steepest.training.checkpoint import CheckpointStore


def begin(config: Config | SFTConfig, *, seed: int) -> Device:
    """Say what the configuration has to say, choose the device and seed it. Raises for a logger that cannot run."""
    for message in (*config.provenance.notes, *(f"warning: {text}" for text in config.provenance.warnings)):
        say(message)
    problems = check_loggers(config.trainer.logger)
    if problems:
        raise ConfigError(problems)
    device = select_device(config.trainer.device)
    device.seed(seed)
    return device


def model_folder(key: str, path: str, hub: Hub) -> Path:
    """The local folder (or GGUF file) of a model. Raises ModelError that names the configuration key."""
    try:
        return resolve_model(path, hub=hub)
    except ModelError as error:
        raise ModelError(f"{key}: {error}") from error


def open_tokenizer(model: ModelConfig, key: str, folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of `model`, whose section of the configuration is `key` and whose weights lie in `folder`."""
    same = model.tokenizer_path == model.path
    return load_tokenizer(
        folder if same else model_folder(f"{key}.tokenizer_path", model.tokenizer_path, model.hub),
        custom_chat_template=model.custom_chat_template,
        trust_remote_code=trust_remote_code,
    )


def open_store(folder: Path, keep: int | None) -> CheckpointStore:
    return CheckpointStore(folder, keep, warn=lambda text: say(f"warning: {text}"))


def open_run_folder(
    config: Config | SFTConfig, trainer: TrainerConfig | SFTTrainerConfig, folder: Path, *, total: int, start: int
) -> Loggers:
    """The loggers of the run, and `config.yaml`. A run that goes on says what changed since its last start."""
    loggers = make_loggers(
        trainer.logger,
        folder,
        trainer.project_name,
        trainer.experiment_name,
        config_dict(config),
        total_steps=total,
        start_step=start,
    )
    path = folder / "config.yaml"
    changed = changed_values(path, config_dict(config))
    if changed:
        say("the configuration differs from that of the run's last start: " + "; ".join(changed))
    save_config(config, path)
    return loggers
