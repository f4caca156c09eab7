"""`steepest export`: from a run, a checkpoint or an adapter to a folder that others load."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch

from steepest.config.key_names import PPO_KEYS
from steepest.console import say
from steepest.errors import CheckpointError, ModelError, SteepestError, key_names
from steepest.hub import Source, find
from steepest.hub.find import Pin
from steepest.learner.checkpoint import CheckpointStore
from steepest.learner.checkpoint_files import system_reason
from steepest.models import lora
from steepest.models.causal_lm import save_folder
from steepest.models.load import load_causal_lm, load_tokenizer
from steepest.trainer.run.model_sources import FILE, read_pins

_NOT_OF_THE_MODEL = ("optimizer.", lora.BASE_FILE)


@key_names({**PPO_KEYS, "trust_remote_code=true": "--trust-remote-code"})
def export(
    source: Path, to: Path, *, as_adapter: bool = False, base: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Write the trained policy as a Hugging Face folder, an adapter merged; or, `as_adapter`, as peft's folder.

    `source`: a run folder (its newest checkpoint), a global_step_N folder, or a folder of a model or an adapter.
    `base`: the adapter's base model, where it is no longer at the place that the adapter names. Returns `to`.

    Raises CheckpointError: no such source, a damaged one, a target that is not empty.
    """
    folder = policy_folder(source)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise CheckpointError(f"--to {to}: something is there already. Choose another folder, or remove it first.")
    adapted = lora.is_adapter(folder)
    if as_adapter and not adapted:
        raise CheckpointError(
            f"{folder} holds a whole model, all of whose weights were trained: there is no adapter. Leave --adapter "
            "out."
        )
    try:
        to.mkdir(parents=True, exist_ok=True)
        if adapted and not as_adapter:
            _merge(folder, to, base, trust_remote_code)
        else:
            _copy(folder, to, besides=_NOT_OF_THE_MODEL)
    except Exception as error:
        shutil.rmtree(to, ignore_errors=True)  # it was empty: no part of a model stays
        if isinstance(error, SteepestError) or (reason := system_reason(error)) is None:
            raise
        raise CheckpointError(
            f"--to {to}: cannot be written: {reason}. Make room, or choose another folder."
        ) from error
    return to


def _copy(folder: Path, to: Path, *, besides: tuple[str, ...]) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(besides):
            shutil.copy2(file, to / file.name)


def policy_folder(source: Path) -> Path:
    """Where the policy lies that `source` names. Raises CheckpointError when there is none."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such folder. Give a run folder or a checkpoint (global_step_N).")
    if _is_policy(source):
        return source
    if any(source.glob("global_step_*")):
        newest = CheckpointStore(source, warn=lambda text: say(f"warning: {text}")).latest()
        if newest is not None:
            say(f"the newest checkpoint of {source} is {newest.name}")
            source = newest
    if _is_policy(source / "actor"):
        return CheckpointStore.open(source) / "actor"
    raise CheckpointError(
        f"{source}: no checkpoint and no model. A run writes checkpoints with trainer.save_freq=N; give its folder, or "
        "one of its global_step_N folders."
    )


def _is_policy(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / lora.CONFIG_FILE).is_file()


def _merge(folder: Path, to: Path, base: str | None, trust_remote_code: bool) -> None:
    """By peft's own reader, so that any LoRA adapter will do."""
    from peft import PeftModel

    model = lora.base_of(folder)
    path = _base_folder(folder, model, base)
    say(f"merging into {path}")
    hf = load_causal_lm(
        path, dtype=torch.float32, trust_remote_code=trust_remote_code, override_config=model.override_config
    ).hf
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
            merged: Any = PeftModel.from_pretrained(hf, str(folder)).merge_and_unload()
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # what peft raises over files that do not fit
        raise ModelError(f"{folder}: peft cannot put this adapter on {path}: {error}") from error
    if (folder / "tokenizer_config.json").is_file():
        save_folder(merged, to, None)
        _copy(folder, to, besides=(*_NOT_OF_THE_MODEL, "adapter_", "README"))
    else:
        save_folder(merged, to, load_tokenizer(path, trust_remote_code=trust_remote_code))


def _base_folder(folder: Path, model: lora.BaseModel, given: str | None) -> Path:
    pin: Pin | None = None
    run = folder.absolute().parents[1]
    if given is None and (run / FILE).is_file():  # the files that the run began with, whatever the hub has now
        pin = next((p for p in read_pins(run).values() if (p.name, p.hub) == (model.path, model.hub)), None)
    name = model.path if given is None else given
    source = Source(name, cast(Any, model.hub), "--base", "", revision=model.revision if given is None else None)
    return find(source, pin=pin, note=say).path
