"""Where a run starts: from nothing, from the newest good checkpoint of its folder, or from one that is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from steepest.errors import CheckpointError, setting
from steepest.learner.checkpoint import FROM_NOTHING, CheckpointStore, Start

UNREADABLE = (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException)
"""What reading a `config.yaml` raises that is not there, is damaged or is none."""


def find_start(store: CheckpointStore, *, mode: str, resume_from_path: str | None, say: Callable[[str], None]) -> Start:
    """Resolve `trainer.resume_mode`.

    auto: the newest valid checkpoint of the run's folder; from nothing if it holds none, and an error if all that it
    holds are damaged. disable: start from nothing; an older run in the same folder is moved aside, never overwritten.
    resume_path: exactly that checkpoint or an error; a folder that holds another run is moved aside, so that no curve
    is made of two.
    """
    if mode == "disable":
        moved = set_aside(store.folder)
        if moved:
            say(f"resume_mode=disable: the earlier run in {store.folder} was moved to {moved}.")
        return FROM_NOTHING
    if mode == "resume_path":
        assert resume_from_path is not None, "checked by config.sections.trainer"
        named = store.open(resume_from_path)
        moved = None if _is_of_the_run(store.folder, named) else set_aside(store.folder)
        if moved:
            say(f"{store.folder} held another run than {resume_from_path}; it was moved to {moved}.")
        found: Path | None = named
    else:
        store.remove_leftovers()
        found = store.latest()
    if found is None:
        if mode == "auto" and (steps := store.steps()):
            raise CheckpointError(_none_is_whole(store.folder, steps))
        return FROM_NOTHING
    store.goes_on_from(found)
    state = store.state(found)
    if mode == "auto":
        store.settle(int(state["step"]))
    say(f"resuming from step {state['step']}: {found}")
    return Start(state["step"], found, state)


def _none_is_whole(folder: Path, steps: list[int]) -> str:
    """A run that began again at step 0 would in time replace what may still be repaired."""
    names = ", ".join(f"global_step_{step}" for step in steps)
    return (
        f"no checkpoint in {folder} is whole ({names}; the warnings above name the faults). Bring a whole copy back, "
        f"or start afresh with {setting('resume_mode')}=disable, which moves this folder aside and deletes nothing."
    )


def _is_of_the_run(folder: Path, checkpoint: Path) -> bool:
    """Whether a run that resumes from `checkpoint` may continue the records of `folder`.

    Either the checkpoint lies in it, or the run there resumed from the same checkpoint and is started again.
    """
    if folder.resolve() in checkpoint.resolve().parents:
        return True
    try:
        origin = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "trainer.resume_from_path")
    except UNREADABLE:  # none there, or none that says where its run came from
        return False
    return isinstance(origin, str) and Path(origin).resolve() == checkpoint.resolve()


def set_aside(folder: Path) -> Path | None:
    """Rename a run folder that holds anything to the first free `<folder>.old-<k>`; None when there was nothing.

    Raises CheckpointError for a folder that cannot be renamed, such as the root of a mounted volume.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    k = 1
    while (target := folder.with_name(f"{folder.name}.old-{k}")).exists():
        k += 1
    try:
        folder.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"{folder} holds an earlier run and cannot be renamed to {target.name} ({error.strerror or error}). Move "
            f"what is in it yourself, or choose another {setting('default_local_dir')}."
        ) from error
    return target


def finished_message(step: int, total_steps: int, *, can_validate: bool = True) -> str:
    """What the command of a run says that is finished already. It is no error: scripts start a run again until it is
    done."""
    validate = "trainer.val_only=True validates again; " if can_validate else ""
    return (
        f"the run is finished: it stands at step {step} and trainer.total_training_steps is {total_steps}. To go on, "
        f"raise trainer.total_training_steps or trainer.total_epochs; {validate}another trainer.experiment_name (or "
        "trainer.resume_mode=disable) starts afresh."
    )
