"""Models inside of runs: which folder a run's folder, or one of its checkpoints, stands for."""

from __future__ import annotations

from pathlib import Path

from steepest.console import say
from steepest.errors import CheckpointError, ModelError
from steepest.learner.checkpoint import CheckpointStore
from steepest.learner.checkpoint_files import MANIFEST, what_is_wrong
from steepest.models import lora

POLICY, CRITIC = "actor", "critic"
"""Folders of a checkpoint."""


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model or an adapter."""
    return (folder / "config.json").is_file() or (folder / lora.CONFIG_FILE).is_file()


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, a damaged one included."""
    return not is_model(folder) and (is_model(folder / POLICY) or (folder / MANIFEST).is_file())


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, with checkpoints in it."""
    return folder.is_dir() and not is_model(folder) and any(folder.glob("global_step_*"))


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, named on the screen; None without one."""
    newest = CheckpointStore(run, warn=lambda text: say(f"warning: {text}")).latest()
    if newest is not None:
        say(f"the newest checkpoint of {run} is {newest.name}")
    return newest


def require_undamaged(checkpoint: Path) -> None:
    """Raises CheckpointError for a damaged checkpoint."""
    if (fault := what_is_wrong(checkpoint)) is not None:
        raise CheckpointError(
            f"{checkpoint} is damaged: {fault}. Give another global_step_N folder, or the run's folder for the newest "
            "whole one."
        )


def start_checkpoint(run: Path, label: str, earlier: str | None) -> Path:
    """The checkpoint of a run that another run begins with. `earlier`: the name of the one that it began with, if it is
    resumed: the reference stays that one, whatever the other run has written since.

    Raises CheckpointError if there is none, or not that one any more.
    """
    if earlier is not None:
        if not is_checkpoint(run / earlier):
            raise CheckpointError(
                f"{label}: this run began with {earlier} of that run, which is not there any more. Bring it back, or "
                "begin a new run."
            )
        return run / earlier
    found = newest_checkpoint(run)
    if found is None:
        raise CheckpointError(f"{label}: this folder of a run holds no whole checkpoint. Give another run, or a model.")
    return found


def model_in(checkpoint: Path, label: str, *, critic: bool) -> Path:
    """The model of a checkpoint that a new run begins with: the policy; for a `critic` the checkpoint's critic, if it
    holds a whole one.

    Raises CheckpointError for a damaged checkpoint and ModelError for an adapter.
    """
    require_undamaged(checkpoint)
    if critic and (checkpoint / CRITIC / "config.json").is_file():
        return checkpoint / CRITIC
    if lora.is_adapter(checkpoint / POLICY):
        raise ModelError(
            f"{label}: {checkpoint} holds a LoRA adapter, which is no model without its base. Merge it into a model "
            f"(steepest export {checkpoint} --to {checkpoint.absolute().parent.name}-{checkpoint.name}) and give that "
            "folder."
        )
    return checkpoint / POLICY
