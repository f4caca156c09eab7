"""A run folder as an object: its metrics, samples, checkpoints and models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from steepest.config.load import load_config
from steepest.config.schema import Config
from steepest.errors import CheckpointError
from steepest.loggers.jsonl import read_metrics
from steepest.loggers.rows import read_rows

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Checkpoint:
    """One `global_step_N` folder of a run."""

    step: int
    path: Path
    score: float | None
    """Accuracy of the validation of these weights; None if they were not validated."""

    def model(self, dtype: str = "float32") -> PreTrainedModel:
        """The policy as a transformers model, a LoRA adapter merged."""
        from transformers import AutoModelForCausalLM

        from steepest.trainer.jobs.export import export

        with TemporaryDirectory() as folder:
            written = export(self.path, Path(folder) / "model", dtype=dtype)
            found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(written, dtype=dtype)
        return found

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the run used."""
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path / "actor")
        return found


@dataclass(frozen=True)
class Run:
    """What a run has left in its folder. It is read when it is asked for, also while the run still trains."""

    folder: Path

    @property
    def metrics(self) -> pyarrow.Table:
        """A row a step, and a column `step`; null where a step has no such number. `.to_pandas()` gives a frame."""
        import pyarrow

        file = self.folder / "metrics.jsonl"
        rows = [{"step": step, **values} for step, values in sorted(read_metrics(file).items())]
        names = dict.fromkeys(name for row in rows for name in row)
        return pyarrow.table({name: [row.get(name) for row in rows] for name in names})

    def samples(self, *, step: int | None = None, split: Literal["train", "val"] | None = None) -> list[dict[str, Any]]:
        """The responses that the run has kept in samples.jsonl: of each validation those to the first
        `trainer.report_prompts` prompts, or `trainer.log_val_generations` if that is more."""
        file = self.folder / "samples.jsonl"
        rows = read_rows(file) if file.exists() else iter(())
        return [row for row in rows if step in (None, row["step"]) and split in (None, row["split"])]

    def report(self, to: str | Path | None = None) -> Path:
        """Write the run's page with its curves and samples, by default `report.html` in its folder; where it is."""
        from steepest.report import write_report

        return write_report(self.folder, None if to is None else Path(to))

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """In the order of their steps."""
        store = self._store
        scores = store.scores()
        return [Checkpoint(step, self.folder / f"global_step_{step}", scores.get(step)) for step in store.steps()]

    @property
    def best(self) -> Checkpoint | None:
        """The checkpoint with the best validation; None if none was validated."""
        scored = [(one.score, -one.step, one) for one in self.checkpoints if one.score is not None]
        return max(scored)[2] if scored else None

    def checkpoint(self, step: int | None = None) -> Checkpoint:
        """That of a step; without one the newest that is whole. Raises CheckpointError if there is none."""
        found = self.checkpoints
        if step is not None:
            chosen = next((one for one in found if one.step == step), None)
            if chosen is None:
                there = ", ".join(str(one.step) for one in found) or "none"
                raise CheckpointError(f"{self.folder} has no checkpoint of step {step}; it has {there}.")
            return chosen
        newest = self._store.latest()
        if newest is None:
            raise CheckpointError(f"{self.folder} has no checkpoint that is whole.")
        return next(one for one in found if one.path.name == newest.name)

    def model(self, step: int | None = None, dtype: str = "float32") -> PreTrainedModel:
        """The policy after a step as a transformers model; without `step` the newest."""
        return self.checkpoint(step).model(dtype)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the run used."""
        return self.checkpoint().tokenizer()

    def evaluate(self, step: int | None = None, *, samples: int | None = None, **settings: Any) -> dict[str, Any]:
        """Score a checkpoint (without `step` the newest) on the run's validation data: data source -> estimates with
        intervals, as `steepest evaluate` has them. `settings` change keys of the run, such as `data.val_files`."""
        from steepest.trainer.main_evaluate import main

        words = [f"{key}={value}" for key, value in settings.items()]
        found = main(str(self.checkpoint(step).path), words, samples=samples)
        (results,) = found["evaluated"].values()
        return dict(results)

    @cached_property
    def config(self) -> Config:
        """The configuration of the run's last start."""
        return load_config(["--config", str(self.folder / "config.yaml")])

    @property
    def _store(self) -> Any:
        from steepest.learner.checkpoint import CheckpointStore

        return CheckpointStore(self.folder)


def load_run(folder: str | Path) -> Run:
    """The run in a folder. Raises CheckpointError if there is none."""
    run = Run(Path(folder).expanduser())
    if not (run.folder / "config.yaml").is_file():
        raise CheckpointError(f"{run.folder} is no run folder: it has no config.yaml. Give trainer.default_local_dir.")
    return run
