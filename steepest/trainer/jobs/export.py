"""`steepest export`: from a run, a checkpoint or an adapter to a folder that others load."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import torch

from steepest.console import say
from steepest.errors import CheckpointError, ModelError, SteepestError, key_names
from steepest.hub import Source, find
from steepest.hub.find import Pin
from steepest.learner.checkpoint_files import system_reason
from steepest.models import lora
from steepest.models.causal_lm import save_folder
from steepest.models.file_weights import read_tensors
from steepest.models.load import SOURCE_DTYPE, load_causal_lm, load_tokenizer
from steepest.trainer.run.checkpoint_models import (
    POLICY,
    is_checkpoint,
    is_model,
    is_run,
    model_in,
    newest_checkpoint,
    require_undamaged,
    start_checkpoint,
)
from steepest.trainer.run.model_sources import FILE, read_pins

_NAMES = {
    "trust_remote_code=true": "--trust-remote-code",
    "override_config": "the run's override_config",
    "path": "--base",
}
"""What this command calls the settings that errors of lower layers name."""
_NOT_OF_THE_MODEL = ("optimizer.", lora.BASE_FILE)


@key_names(_NAMES)
def export(
    source: Path,
    to: Path,
    *,
    as_adapter: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | None = None,
) -> Path:
    """Write the trained policy as a Hugging Face folder, an adapter merged; or, `as_adapter`, as peft's folder.

    `source`: a run folder (its newest checkpoint), a global_step_N folder, or a folder of a model or an adapter.
    `base`: the adapter's base model, where it is no longer at the place that the adapter names. `dtype`: that of the
    written weights; None: that of the model that the run began with. Returns `to`.

    Raises CheckpointError: no such source, a damaged one, a target that is not empty.
    """
    folder = policy_folder(source)
    if to.suffix == ".gguf":
        raise CheckpointError(
            f"--to {to}: export writes Hugging Face folders. Give a folder, and convert it by convert_hf_to_gguf.py of "
            "llama.cpp, which knows the names of each family."
        )
    if as_adapter and dtype is not None:
        raise CheckpointError(f"--dtype {dtype}: an adapter stays as it was trained. Leave --adapter or --dtype out.")
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
            _merge(folder, to, base, trust_remote_code, dtype)
        else:
            _copy(folder, to, besides=_NOT_OF_THE_MODEL)
            if not as_adapter:
                _convert(folder, to, trust_remote_code, dtype)
    except Exception as error:
        shutil.rmtree(to, ignore_errors=True)  # it was empty: no part of a model stays
        if isinstance(error, SteepestError) or (reason := system_reason(error)) is None:
            raise
        raise CheckpointError(
            f"--to {to}: cannot be written: {reason}. Make room, or choose another folder."
        ) from error
    return to


def _convert(folder: Path, to: Path, trust_remote_code: bool, dtype: str | None) -> None:
    """Write the weights of a whole model again where another dtype than theirs is asked for."""
    entries = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    held = entries.get("dtype") or entries.get("torch_dtype")
    if (dtype or entries.get(SOURCE_DTYPE) or held) in (held, None):
        return
    hf = load_causal_lm(folder, trust_remote_code=trust_remote_code).hf
    for file in to.glob("model*.safetensors*"):
        file.unlink()
    _save(hf, to, None, dtype)


def _save(hf: Any, to: Path, tokenizer: Any, dtype: str | None) -> None:
    """Write a float32 model in `dtype`; None: in that of its source. Says which, where it is not float32."""
    chosen = dtype or getattr(hf.config, SOURCE_DTYPE, None) or "float32"
    hf.config.__dict__.pop(SOURCE_DTYPE, None)
    if chosen != "float32":
        say(f"the weights are written in {chosen}; --dtype float32 keeps all of their digits")
    save_folder(hf.to(getattr(torch, chosen)), to, tokenizer)


def _copy(folder: Path, to: Path, *, besides: tuple[str, ...]) -> None:
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith(besides):
            shutil.copy2(file, to / file.name)


def policy_folder(source: Path) -> Path:
    """Where the policy lies that `source` names. Raises CheckpointError when there is none."""
    if not source.is_dir():
        raise CheckpointError(f"{source}: there is no such folder. Give a run folder or a checkpoint (global_step_N).")
    if is_model(source):
        return source
    if is_run(source):
        source = newest_checkpoint(source) or source
    if is_checkpoint(source):
        require_undamaged(source)
        return source / POLICY
    raise CheckpointError(
        f"{source}: no whole checkpoint and no model. Give the folder of a run that has saved one, one of its "
        "global_step_N folders, or a folder with config.json or adapter_config.json."
    )


def _merge(folder: Path, to: Path, base: str | None, trust_remote_code: bool, dtype: str | None) -> None:
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
            adapted = PeftModel.from_pretrained(hf, str(folder))
            _require_same_names(folder, adapted)
            merged: Any = adapted.merge_and_unload()
    except (ValueError, KeyError, RuntimeError, OSError) as error:  # what peft raises over files that do not fit
        raise ModelError(f"{folder}: peft cannot put this adapter on {path}: {error}") from error
    if (folder / "tokenizer_config.json").is_file():
        _save(merged, to, None, dtype)
        _copy(folder, to, besides=(*_NOT_OF_THE_MODEL, "adapter_", "README"))
    else:
        _save(merged, to, load_tokenizer(path, trust_remote_code=trust_remote_code), dtype)


def _require_same_names(folder: Path, adapted: Any) -> None:
    """Raises ModelError for weights of the adapter that peft did not place, or did not find: it only warns, if it does.
    And for NaN."""
    from peft import get_peft_model_state_dict

    if not (folder / lora.WEIGHTS_FILE).is_file():
        return
    there = read_tensors(folder / lora.WEIGHTS_FILE, wrong=ModelError)
    if strange := sorted(set(there) ^ set(get_peft_model_state_dict(adapted))):
        raise ModelError(
            f"{folder}: {len(strange)} weights of the adapter do not fit its adapter_config.json and the base model: "
            f"{', '.join(strange[:3])}. Name the base that it was trained on with --base."
        )


def _base_folder(folder: Path, model: lora.BaseModel, given: str | None) -> Path:
    pin: Pin | None = None
    run = folder.absolute().parents[1]
    if given is None and (run / FILE).is_file():  # the files that the run began with, whatever the hub has now
        pin = next((p for p in read_pins(run).values() if (p.name, p.hub) == (model.path, model.hub)), None)
    name = model.path if given is None else given
    path = Path(name).expanduser()
    if is_run(path):
        path = start_checkpoint(path, f"--base {name}", None if pin is None else pin.commit)
    if is_checkpoint(path):
        return model_in(path, f"--base {name}", critic=False)
    source = Source(name, cast(Any, model.hub), "--base", "", revision=model.revision if given is None else None)
    return find(source, pin=pin, note=say).path
