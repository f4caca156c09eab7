"""Where a run starts: from nothing, from the newest good checkpoint of its folder, or from one that is named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.errors import CheckpointError
from steepest.training.checkpoint import CheckpointStore


@dataclass(frozen=True)
class Start:
    """Step 0 and no checkpoint, or the step and folder to go on from."""

    step: int
    checkpoint: Path | None
    state: dict[str, Any]

    def folder(self, name: str, otherwise: Path) -> Path:
        """The checkpoint's own `name` folder, or `otherwise` for a run that starts from nothing."""
        return self.checkpoint / name if self.checkpoint else otherwise


FROM_NOTHING = Start(0, None, {})


def find_start(store: CheckpointStore, *, mode: str, resume_from_path: str | None, say: Callable[[str], None]) -> Start:
    """Resolve `trainer.resume_mode`.

    auto: the newest valid checkpoint of the run's folder, if there is one. disable: start from nothing; an older
    run in the same folder is moved aside, never overwritten. resume_path: exactly that checkpoint or an error.
    """
    if mode == "disable":
        moved = set_aside(store.folder)
        if moved:
            say(f"resume_mode=disable: the earlier run in {store.folder} was moved to {moved}.")
        return FROM_NOTHING
    if mode == "resume_path":
        assert resume_from_path is not None, "checked by config.rules"
        found: Path | None = store.open(resume_from_path)
    else:
        store.remove_leftovers()
        found = store.latest()
    if found is None:
        return FROM_NOTHING
    store.goes_on_from(found)
    state = store.state(found)
    say(f"resuming from step {state['step']}: {found}")
    return Start(int(state["step"]), found, state)


def set_aside(folder: Path) -> Path | None:
    """Rename a run folder that holds anything to the first free `<folder>.old-<k>`; None when there was nothing."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    k = 1
    while (target := folder.with_name(f"{folder.name}.old-{k}")).exists():
        k += 1
    folder.rename(target)
    return target


def require_work(start: Start, total_steps: int) -> None:
    """A run that has nothing left to do ends with an error, not with success and no result."""
    if start.step >= total_steps:
        raise CheckpointError(
            f"nothing to do: the run stands at step {start.step} and trainer.total_training_steps is {total_steps}. "
            "Raise trainer.total_training_steps or trainer.total_epochs to go on, set trainer.val_only=True to "
            "validate, or choose another trainer.experiment_name (or trainer.resume_mode=disable) to start afresh."
        )
