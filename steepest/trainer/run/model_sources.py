"""Where a run's models come from: each is looked up once, and what it was is kept in the run folder (`models.json`).

A resumed run takes its weights from the checkpoint, but the reference, the tokenizer and the end tokens come from the
start model again. The pin makes sure that this is the same one, whatever happened on the hub in between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from steepest.config.sections.sft import SFTTrainerConfig
from steepest.config.sections.trainer import TrainerConfig
from steepest.config.types import Hub
from steepest.console import say
from steepest.errors import CheckpointError
from steepest.hub import MODEL_FILES, Found, Pin, Source, find
from steepest.process.files import replace_text
from steepest.trainer.run.checkpoint_models import is_checkpoint, is_run, model_in, start_checkpoint

FILE = "models.json"


class ModelSources:
    """Finds the folders of a run's models. `earlier`: configuration key -> pin of the run that goes on."""

    def __init__(self, earlier: Mapping[str, Pin] | None = None) -> None:
        self.earlier = dict(earlier or {})
        self.pins: dict[str, Pin] = {}
        self.local: dict[str, Path] = {}
        """Configuration key -> what was found for it on this machine, without a pin."""
        self._found: dict[tuple[Source, tuple[str, ...], Pin | None], Found] = {}

    def folder(
        self,
        key: str,
        path: str,
        hub: Hub,
        revision: str | None = None,
        *,
        files: Sequence[str] = MODEL_FILES,
        critic: bool = False,
    ) -> Path:
        """The local folder (or GGUF file) of the model under `key`; in a run's folder and in a checkpoint that of the
        policy, or of the `critic`. Raises ModelError or CheckpointError that name the key."""
        section = key.rpartition(".")[0]
        if (inside := self._in_a_run(key, path, hub, critic)) is not None:
            return inside
        source = Source(path, hub, key, f"{section}.hub=", revision=revision, revision_option=f"{section}.revision=")
        pin = self.earlier.get(key)
        if pin is not None and (pin.name, pin.hub, pin.revision) != (path, hub, revision):
            pin = None  # the configuration now names another model, and the run says so
        asked = replace(source, key="", hub_option="", revision_option=""), tuple(files), pin
        if asked not in self._found:  # the critic mostly starts from the actor's model
            self._found[asked] = find(source, files=files, pin=pin, note=say)
        found = self._found[asked]
        if found.pin is not None:
            self.pins[key] = found.pin
        else:
            self.local[key] = found.path
        return found.path

    def _in_a_run(self, key: str, path: str, hub: Hub, critic: bool) -> Path | None:
        """The model in a run's folder or in a checkpoint; None for another path. The checkpoint that a run's folder
        stood for is pinned."""
        folder, label = Path(path).expanduser(), f"{key}={path}"
        if is_run(folder):
            pin = self.earlier.get(key)
            earlier = pin.commit if pin is not None and pin.name == path else None
            begun = {pin.commit for pin in self.pins.values() if pin.name == path}  # the other run may go on
            checkpoint = start_checkpoint(folder, label, earlier or next(iter(begun), None))
            self.pins[key] = Pin(path, hub, None, checkpoint.name)
        elif is_checkpoint(folder):
            checkpoint = folder
        else:
            return None
        found = self.local[key] = model_in(checkpoint, label, critic=critic)
        say(f"{label}: taken from {found}")
        return found

    def save(self, folder: Path) -> None:
        """Write `models.json` into the run folder; without a model from a hub or a run, none."""
        if not self.pins:
            return
        rows = {
            key: {
                "path": pin.name,
                "hub": pin.hub,
                "revision": pin.revision,
                "commit": pin.commit,
                "files": dict(pin.digests),
            }
            for key, pin in self.pins.items()
        }
        replace_text(folder / FILE, json.dumps(rows, indent=1) + "\n")


def sources_of(trainer: TrainerConfig | SFTTrainerConfig) -> ModelSources:
    """The sources of this start's models, with the pins of the run that it resumes, if it does.

    Raises CheckpointError for a `models.json` that cannot be read: without it the reference might be another model.
    """
    folder = folder_that_goes_on(trainer)
    return ModelSources(read_pins(folder) if folder is not None and (folder / FILE).exists() else None)


def folder_that_goes_on(trainer: TrainerConfig | SFTTrainerConfig) -> Path | None:
    """The folder of the run that this start resumes, or None."""
    if trainer.resume_mode == "resume_path":
        return Path(str(trainer.resume_from_path)).parent
    folder = Path(str(trainer.default_local_dir))
    return folder if trainer.resume_mode == "auto" and any(folder.glob("global_step_*")) else None


def read_pins(folder: Path) -> dict[str, Pin]:
    """Configuration key -> pin, from the `models.json` of a run folder. Raises CheckpointError."""
    try:
        rows = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return {
            str(key): Pin(row["path"], row["hub"], row["revision"], row["commit"], tuple(row["files"].items()))
            for key, row in rows.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / FILE} says which models this run began with, and it cannot be read ({error!r}). Restore it, or "
            "delete it: then the models are looked up again, and the reference may be another one."
        ) from error
