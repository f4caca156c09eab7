"""What a run is made from: rows, prompts, chat template, tokenizer, code of the user, models, versions.

It is kept in the run folder (`inputs.json`). A start that goes on compares, and says what is not as it was: then the
steps from here are not those of the unbroken run. The date that a chat template writes stays that of the first start.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import steepest
from steepest.config.schema import Config
from steepest.config.sections.sft import SFTTrainerConfig
from steepest.config.sections.trainer import TrainerConfig
from steepest.console import say
from steepest.process.files import replace_text
from steepest.registry import is_own_code
from steepest.rewards.given import is_given, source_of
from steepest.trainer.run.model_sources import folder_that_goes_on
from steepest.versions import installed

FILE = "inputs.json"
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
"""How a chat template asks for the date. A call in another form gives today's: then the prompts differ, and that is
reported."""
_SAMPLE = 1 << 16
"""Bytes of a weight file that are compared at its start, middle and end; smaller files are compared whole."""


@dataclass
class Inputs:
    """The inputs of this start, by name, and those of the start that it continues."""

    began: datetime = field(default_factory=datetime.now)
    """When the run first started."""
    earlier: dict[str, str] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)

    def template_kwargs(self, given: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Arguments for the chat template: those of the user, and where it writes a date, the template with that of the
        first start."""
        template = given.get("chat_template", getattr(tokenizer, "chat_template", None))
        if isinstance(template, dict):  # several by name
            template = template.get("default")
        if not isinstance(template, str) or not _DATE.search(template):
            return dict(given)
        return {**given, "chat_template": _DATE.sub(lambda call: repr(self.began.strftime(call[2])), template)}

    def add(self, name: str, parts: Iterable[Any], count: str = "") -> None:
        """Note what an input is: the digest of its parts, each as JSON, and a number that a reader understands."""
        digest = hashlib.sha256()
        for part in parts:
            text = part if isinstance(part, bytes) else json.dumps(part, default=str, sort_keys=True).encode()
            digest.update(b"%d:" % len(text) + text)
        self.found[name] = " ".join(filter(None, (count, digest.hexdigest()[:12])))

    def add_tokenizer(self, tokenizer: Any) -> None:
        """Its vocabulary and rules, and the chat template."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        whole = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str().encode()
        self.add("tokenizer", [whole, tokenizer.all_special_ids], f"{len(tokenizer)} tokens")
        self.add("chat template", [getattr(tokenizer, "chat_template", None)])

    def add_code(self, config: Config) -> None:
        """Files of the user's own that score or learn: `file.py:function`, and the custom reward."""
        names = [config.algorithm.adv_estimator, config.actor_rollout_ref.actor.policy_loss.loss_mode]
        files = [str(name).rpartition(":")[0] for name in (*names, *config.reward.functions) if is_own_code(str(name))]
        for name in filter(is_given, config.reward.functions):
            self.add(name, [source_of(name)])
        for file in dict.fromkeys([*filter(None, [config.custom_reward_function.path]), *files]):
            if file.endswith(".py"):
                self.add(file, [Path(file).expanduser().read_bytes()])

    def add_models(self, folders: Mapping[str, Path]) -> None:
        """Key -> folder (or GGUF file) on this machine; of a weight file, size and samples. A hub's are pinned."""
        for key, path in folders.items():
            files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
            wanted = [p for p in files if p.suffix in (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model")]
            self.add(key, (part for p in wanted for part in (p.name, *_samples(p))), f"{len(wanted)} files")

    def add_machine(self, device: str) -> None:
        """What decides about the last bit besides the inputs."""
        for name in ("torch", "transformers"):
            self.found[name] = str(installed(name))
        self.found |= {"steepest": steepest.__version__, "device": device, "threads": str(torch.get_num_threads())}

    def changes(self) -> list[str]:
        """`name: before -> now` for what is not as it was."""
        known = [(name, before, self.found.get(name)) for name, before in self.earlier.items()]
        return [f"{name}: {before} -> {now}" for name, before, now in known if now is not None and now != before]

    def save(self, folder: Path) -> None:
        """Say what changed, and write `inputs.json` into the run folder."""
        if changed := self.changes():
            say(
                "warning: inputs of this run are not those of its last start: " + "; ".join(changed) + ". The steps "
                "from here are not those of an unbroken run. Restore them to go on exactly, or choose another "
                "trainer.experiment_name to start afresh."
            )
        kept = {"first start": self.began.isoformat(timespec="seconds"), "inputs": self.found}
        replace_text(folder / FILE, json.dumps(kept, indent=1) + "\n")


def inputs_of(trainer: TrainerConfig | SFTTrainerConfig) -> Inputs:
    """The inputs of this start, still empty, with those of the run that it resumes, if it does."""
    folder = folder_that_goes_on(trainer)
    if folder is None or not (folder / FILE).exists():
        return Inputs()
    try:
        kept = json.loads((folder / FILE).read_text(encoding="utf-8"))
        earlier = {str(name): str(value) for name, value in kept["inputs"].items()}
        return Inputs(datetime.fromisoformat(kept["first start"]), earlier)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        say(
            f"warning: {folder / FILE} cannot be read ({error!r}), so it is not known whether the inputs of this run "
            "changed since its last start; it is written again."
        )
        return Inputs()


def _samples(file: Path) -> Sequence[bytes | int]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 16 * _SAMPLE or file.suffix == ".json":
            return [stream.read()]
        samples: list[bytes | int] = [size]
        for place in (0, size // 2, size - _SAMPLE):
            stream.seek(place)
            samples.append(stream.read(_SAMPLE))
        return samples
