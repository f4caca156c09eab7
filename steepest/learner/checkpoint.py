"""The checkpoints of a run folder: saved atomically, checked when read, pruned. No torch, no pickle.

    <folder>/global_step_N/{actor,critic}/...      Hugging Face folder, optimizer.safetensors, optimizer.json
    <folder>/global_step_N/trainer_state.json      plain JSON: everything else that a resumed run needs
    <folder>/global_step_N/manifest.json           size and SHA-256 of every file; written last
    <folder>/latest_checkpointed_iteration.txt     N, for people and scripts
    <folder>/best.json                             validation scores, and the best step that is still there

Names that start with a dot are ours and unfinished: `.tmp-` being written, `.old-` being replaced, `.del-` being
deleted. `remove_leftovers` clears what a kill left of them.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.errors import CheckpointError, setting
from steepest.learner.checkpoint_files import (
    MANIFEST,
    files_under,
    is_disk_full,
    read_manifest,
    seal,
    system_reason,
    what_is_wrong,
)
from steepest.process.files import free_bytes, replace_text, sync

_log = logging.getLogger(__name__)

STATE = "trainer_state.json"
LATEST = "latest_checkpointed_iteration.txt"
BEST = "best.json"
_STEP = re.compile(r"global_step_(\d+)")
_UNKNOWN = float("inf")
_NO_RENAME = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM})
_WRITING, _REPLACED, _DELETING = ".tmp-", ".old-", ".del-"


@dataclass(frozen=True)
class Start:
    """Step 0 and no checkpoint, or the step and folder to resume from."""

    step: int
    checkpoint: Path | None
    state: dict[str, Any]

    def folder(self, name: str, otherwise: Path) -> Path:
        """The checkpoint's own `name` folder, or `otherwise` for a run that starts from nothing.

        Raises CheckpointError when the checkpoint has no such folder.
        """
        if self.checkpoint is None:
            return otherwise
        if not (self.checkpoint / name).is_dir():
            raise self._of_another_job(f"no {name}")
        return self.checkpoint / name

    def entry(self, name: str) -> Any:
        """An entry of the checkpoint's state. Raises CheckpointError when it is not there."""
        if name not in self.state:
            raise self._of_another_job(f"no {name}")
        return self.state[name]

    def refuse_entry(self, name: str) -> None:
        """Raises CheckpointError when the state has an entry that the present job's checkpoints never have."""
        if name in self.state:
            raise self._of_another_job(f"a {name}")

    def _of_another_job(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint} cannot be resumed from: it holds {found}, so another kind of job wrote it "
            f"(another {setting('adv_estimator')}, or supervised fine-tuning). Choose another "
            f"{setting('experiment_name')} or {setting('default_local_dir')}; to begin with its weights set the "
            f"model's path to {self.checkpoint}/actor there."
        )


FROM_NOTHING = Start(0, None, {})


class CheckpointStore:
    """The checkpoints in one run folder. One process writes at a time.

    `keep` newest checkpoints stay, and the best one in addition; None keeps all. "Newest" is the order of saving,
    not of step numbers: a run that went back to step 4 and saves step 6 must not be shadowed by an older step 10.
    `warn` takes the sentence about a damaged checkpoint; by default it is logged.
    """

    def __init__(
        self, folder: Path | str, keep: int | None = None, *, warn: Callable[[str], None] | None = None
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: at least one checkpoint has to stay; None keeps all")
        self.folder, self.keep, self._warn = Path(folder), keep, warn or _log.warning
        self._own: set[Path] = set()

    # -- writing --------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        writers: Mapping[str, Callable[[Path], None]],
        state: Mapping[str, Any],
        *,
        expected_bytes: int | None = None,
    ) -> Path:
        """Write `global_step_<step>`: each writer into a sub-folder of its name, `state` as `trainer_state.json`.

        The checkpoint appears whole or not at all; one of the same step is replaced. Afterwards older ones are
        pruned. `expected_bytes` is compared with the free space first (default: the size of the newest checkpoint).

        Raises CheckpointError, with free and needed bytes, when the disk is full before or while writing, and with the
        system's reason when the folder cannot be written; what was there before is untouched. Any other error of a
        writer passes through, equally without a trace on disk. Raises ValueError for a state that JSON cannot hold
        (NaN and inf included).
        """
        text = json.dumps(dict(state), indent=1, allow_nan=False) + "\n"
        needed, beside = expected_bytes or 0, self.folder / f"{_WRITING}{_name(step)}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = self._size_of_newest() if expected_bytes is None else expected_bytes
            free = free_bytes(self.folder)
            if free is not None and free < needed:
                raise self._disk_full(step, needed)
            self._delete(beside)
            beside.mkdir()
            for name, write in writers.items():
                (beside / name).mkdir()
                write(beside / name)
            (beside / STATE).write_text(text, encoding="utf-8")
            seal(beside, {"step": step, "serial": self._next_serial()})
            target = self._publish(step, beside)
        except BaseException as error:
            written = sum(p.stat().st_size for p in files_under(beside)) if beside.is_dir() else 0
            shutil.rmtree(beside, ignore_errors=True)
            if is_disk_full(error):
                raise self._disk_full(step, max(needed, written), system_reason(error)) from error
            if isinstance(error, Exception) and (reason := system_reason(error)) is not None:
                raise self._not_written(step, reason) from error
            raise
        self.prune(protect=step)
        return target

    def settle(self, step: int) -> None:
        """Do what a kill right after the checkpoint of `step` appeared left undone: the two small files, pruning."""
        replace_text(self.folder / LATEST, f"{step}\n", synced=True)
        self._write_best(self.scores())
        self.prune(protect=step)

    def _publish(self, step: int, beside: Path) -> Path:
        """Put a finished folder in its place, and name it in `latest_checkpointed_iteration.txt`."""
        target, scores = self.folder / _name(step), self.scores()
        if target.exists() and scores.pop(step, None) is not None:
            self._write_best(scores)  # first: the old weights' score must never stand next to the new ones
        self._put_in_place(beside, target)
        self._own.add(target)
        replace_text(self.folder / LATEST, f"{step}\n", synced=True)
        self._write_best(scores)
        return target

    def remove_leftovers(self) -> list[str]:
        """Clear what a killed run left: unfinished and half-deleted folders go, a half-replaced one comes back.

        Returns the names removed. Call it at the start of a run, never while another process writes here.
        """
        try:
            self._restore_replaced()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: what a killed run left there cannot be put in order ({error}). See to the folder, or "
                f"choose another {setting('default_local_dir')}."
            ) from error
        found = [p for p in self._entries() if p.name.startswith((_WRITING, _REPLACED, _DELETING))]
        return [path.name for path in found if self._discarded(path)]

    def prune(self, *, protect: int | None = None) -> list[int]:
        """Delete all but the `keep` newest, the best and `protect`; returns the steps deleted.

        A folder is renamed before its files go, so a kill cannot leave a half one that looks whole.
        """
        if self.keep is None:
            return []
        # A folder without a readable manifest takes nobody's place; it stays for its owner to look at.
        steps = [step for step, path in self._newest_first() if _serial(path) != _UNKNOWN]
        best = self.best()
        kept = {*steps[: self.keep], protect, best[0] if best else None}
        return [step for step in steps if step not in kept and self._discarded(self.folder / _name(step))]

    def mark_best(self, step: int, score: float) -> bool:
        """Record the validation score of a step in `best.json`. True when no other checkpoint scored as high.

        Recorded before or after the step is saved. Ties go to the earlier step.
        """
        scores = {**self.scores(), step: float(score)}
        try:
            self._write_best(scores)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / BEST}: the score of step {step} cannot be written ({error.strerror or error}). Make "
                f"room or see to the folder of {setting('default_local_dir')}, then start the same command again."
            ) from error
        return all(value < score for other, value in scores.items() if other != step and self.has(other))

    # -- reading --------------------------------------------------------------------------------------------

    def has(self, step: int) -> bool:
        """Whether there is a folder of this step; it is not checked."""
        return (self.folder / _name(step)).is_dir()

    def steps(self) -> list[int]:
        """Steps with a folder, ascending; not checked."""
        return sorted(step for step, _ in self._newest_first())

    def goes_on_from(self, path: Path) -> None:
        """Note the checkpoint that this run starts from; see `holds`."""
        self._own.add(path)

    def holds(self, step: int) -> bool:
        """Whether the folder of this step holds this run's weights: saved here, or what the run resumed from.

        A folder of the same step may also lie there from before a run went back to an earlier step. What is measured
        now says nothing about it.
        """
        target = self.folder / _name(step)
        return self.has(step) and any(path.resolve() == target.resolve() for path in self._own)

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole, or None. Every damaged one passed over is named in a warning."""
        self._restore_replaced()
        for _, path in self._newest_first():
            fault = what_is_wrong(path)
            if fault is None:
                return path
            self._warn(f"checkpoint {path} is damaged and is passed over: {fault}.")
        return None

    def best(self) -> tuple[int, float] | None:
        """(step, score) of the best checkpoint that is still there; None without one."""
        scores = {step: score for step, score in self.scores().items() if self.has(step)}
        if not scores:
            return None
        step = min(scores, key=lambda s: (-scores[s], s))
        return step, scores[step]

    @staticmethod
    def open(path: Path | str) -> Path:
        """A checkpoint that was asked for by name. Raises CheckpointError when it is missing or damaged."""
        fault = what_is_wrong(Path(path))
        if fault is not None:
            raise CheckpointError(
                f"checkpoint {path} cannot be used: {fault}. Give the path of a whole global_step_N folder, or use "
                f"{setting('resume_mode')}=auto for the newest whole one."
            )
        return Path(path)

    @staticmethod
    def state(path: Path | str) -> dict[str, Any]:
        """`trainer_state.json` of a checkpoint that `latest` or `open` gave."""
        try:
            found = json.loads((Path(path) / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{Path(path) / STATE} cannot be read ({error}).") from error
        if not isinstance(found, dict) or type(found.get("step")) is not int:
            raise CheckpointError(f"{Path(path) / STATE} names no step: it was not written by Steepest.")
        return found

    # -- inside ---------------------------------------------------------------------------------------------

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _newest_first(self) -> list[tuple[int, Path]]:
        """(step, path) of every checkpoint folder, last saved first; one without a readable manifest comes first,
        so that it is reported."""
        found = [(int(m[1]), p) for p in self._entries() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
        return sorted(found, key=lambda item: (_serial(item[1]), item[0]), reverse=True)

    def _next_serial(self) -> int:
        known = [serial for _, path in self._newest_first() if (serial := _serial(path)) != _UNKNOWN]
        return 1 + int(max(known, default=0))

    def _put_in_place(self, beside: Path, target: Path) -> None:
        if not target.exists():
            os.rename(beside, target)
        else:
            # No rename replaces a folder that holds files. Between these two the old one is `.old-`, from where
            # `latest` and `remove_leftovers` bring it back.
            replaced = self.folder / f"{_REPLACED}{target.name}"
            self._delete(replaced)
            os.rename(target, replaced)
            os.rename(beside, target)
            self._delete(replaced)
        sync(self.folder)

    def _restore_replaced(self) -> None:
        for path in self._entries():
            target = self.folder / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not target.exists():
                os.rename(path, target)

    def _discarded(self, path: Path) -> bool:
        """Delete a folder. One that cannot be deleted (a reader on NFS holds a file) takes room and ends no run."""
        doomed = path if path.name.startswith(".") else self.folder / f"{_DELETING}{path.name}"
        try:
            if path != doomed:
                self._delete(doomed)
                _rename_to_delete(path, doomed)
            self._delete(doomed)
            self._delete(path)
        except OSError as error:
            self._warn(f"{path} is no longer needed and cannot be deleted ({error}). Delete it by hand.")
            return False
        return True

    def _delete(self, path: Path) -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _size_of_newest(self) -> int:
        sizes = [sum(p.stat().st_size for p in files_under(path)) for _, path in self._newest_first()[:1]]
        return sizes[0] if sizes else 0

    def scores(self) -> dict[int, float]:
        """Step -> score of the weights that were saved then, of every validation so far."""
        try:
            found = json.loads((self.folder / BEST).read_text(encoding="utf-8"))
            return {int(step): float(score) for step, score in found["scores"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            self._warn(f"{self.folder / BEST} cannot be read ({error}); scores of earlier validations are forgotten.")
            return {}

    def _write_best(self, scores: Mapping[int, float]) -> None:
        if not scores and not (self.folder / BEST).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        there = {step: score for step, score in scores.items() if self.has(step)}
        best = min(there, key=lambda s: (-there[s], s)) if there else None
        record = {
            "step": best,
            "score": None if best is None else there[best],
            "scores": {str(step): scores[step] for step in sorted(scores)},
        }
        replace_text(self.folder / BEST, json.dumps(record, indent=1) + "\n", synced=True)

    def _disk_full(self, step: int, needed: int, reason: str | None = None) -> CheckpointError:
        """`reason`: what the system answered; a limit on the size of a file, or a quota, is no matter of free bytes."""
        free = free_bytes(self.folder)
        room = "no space" if free is None else f"{free} bytes free ({_human(free)})"
        why = f" ({reason})" if reason else ""
        return CheckpointError(
            f"checkpoint {_name(step)} cannot be written{why}: the disk of {self.folder} has {room}, about {needed} "
            f"bytes ({_human(needed)}) are needed. {self._kept()} Free some space, point "
            f"{setting('default_local_dir')} at another disk, or keep fewer with {setting('max_ckpt_to_keep')}."
        )

    def _not_written(self, step: int, reason: str) -> CheckpointError:
        return CheckpointError(
            f"checkpoint {_name(step)} cannot be written into {self.folder}: {reason}. {self._kept()} See to that "
            f"folder, or choose another {setting('default_local_dir')}, then start the same command again."
        )

    def _kept(self) -> str:
        good = self._newest_first()
        return f"The last one, {good[0][1]}, is untouched." if good else "There is no earlier one."


def _name(step: int) -> str:
    return f"global_step_{step}"


def _rename_to_delete(path: Path, doomed: Path) -> None:
    """Where no folder can be renamed (a lower layer of a container), one without its manifest counts as unfinished."""
    try:
        os.rename(path, doomed)
    except OSError as error:
        if error.errno not in _NO_RENAME:
            raise
        (path / MANIFEST).unlink(missing_ok=True)


def _serial(path: Path) -> float:
    manifest = read_manifest(path)
    serial = None if manifest is None else manifest.get("serial")
    return float(serial) if type(serial) is int else _UNKNOWN


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
