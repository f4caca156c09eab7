"""`steepest evaluate`: a checkpoint or a model answers the validation set, by prompts, grader and engine of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steepest.assembly.compute import ACTOR_MODEL, compute_settings
from steepest.assembly.engine import build_engine
from steepest.assembly.lora import halves_base, load_policy
from steepest.assembly.roles import build_actor
from steepest.config.key_names import PPO_KEYS
from steepest.config.load import load_config
from steepest.config.schema import Config
from steepest.console import say
from steepest.errors import CheckpointError, ConfigError, key_names
from steepest.learner.checkpoint import FROM_NOTHING, CheckpointStore, Start
from steepest.process.start_timing import Laps
from steepest.rewards.answers import last_line, statements, visible
from steepest.rollout import RolloutEngine
from steepest.rollout.weights import LocalWeights, ModelDescription
from steepest.trainer import build_step
from steepest.trainer.jobs.ppo import Job, opened
from steepest.trainer.run.checkpoint_models import is_checkpoint, is_run, newest_checkpoint, require_undamaged
from steepest.trainer.run.hooks import write_jsonl
from steepest.trainer.run.statistics import Answered, Paired, compare, summary
from steepest.trainer.run.validation import Evaluator

ALL = "all"
"""Stands for every data source together."""
VAL_KWARGS = "actor_rollout_ref.rollout.val_kwargs"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the configuration that it is evaluated by, and the checkpoint of a run, if it is one."""

    name: str
    config: Config
    start: Start


@dataclass(frozen=True)
class Evaluated:
    """The answers of one subject."""

    name: str
    records: Sequence[Mapping[str, Any]]
    """One a response, in the order of the prompts: prompt, response, score, accuracy, ground_truth, truncated, ..."""

    def groups(self) -> dict[str, list[Answered]]:
        """Data source -> its prompts' answers; under ALL those of every source, if there are several."""
        by_prompt: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
        for record in self.records:
            by_prompt[record["data_source"], record["id"]].append(record)
        found: dict[str, list[Answered]] = defaultdict(list)
        for (source, _), records in by_prompt.items():
            accuracies = tuple(float(record["accuracy"]) for record in records)
            found[source].append(Answered(accuracies, tuple(vote(record["response"]) for record in records)))
        if len(found) > 1:
            found[ALL] = [group for source in list(found) for group in found[source]]
        return dict(found)

    def results(self) -> dict[str, dict[str, Any]]:
        """Data source -> number of prompts, and every estimate with its interval."""
        return {
            source: {"prompts": len(groups)} | {name: asdict(one) for name, one in summary(groups).items()}
            for source, groups in self.groups().items()
        }


def vote(response: str) -> str:
    """The answer that a response states, as the majority counts it: the last statement, else the last line."""
    text = visible(response)
    found = statements(text)
    return "".join((found[-1].text if found else last_line(text)).split()).strip(".$*").lower()


@key_names(PPO_KEYS)
def evaluate(subject: Subject) -> Evaluated:
    """Answer and score the validation set."""
    with opened(subject.config, Laps(), Job) as job:
        evaluator = Evaluator(
            engine=_engine(job, subject.start),
            prompts=job.data.val,
            sampling=build_step.val_sampling(job.config),
            scorer=job.scorer,
            batch_size=job.config.data.val_batch_size,
            pad_id=job.tokenizer.pad_token_id,
        )
        found = evaluator()
        pairs = zip(found.samples, found.accuracies, strict=True)
        return Evaluated(subject.name, [{**record, "accuracy": accuracy} for record, accuracy in pairs])


def _engine(job: Job, start: Start) -> RolloutEngine:
    """The engine with the policy, made as in a run: the answers are those of the run's validation."""
    config, model = job.config, job.config.actor_rollout_ref.model
    dtype = config.actor_rollout_ref.actor.fsdp_config.dtype
    compute = compute_settings(model, ACTOR_MODEL, dtype, job.device)
    halve = halves_base(config, compute.dtype, job.device)
    policy = load_policy(model, start, job.folders["actor"], halve=halve)
    actor = build_actor(config, job.plan, policy, compute)
    engine = build_engine(config, ModelDescription.of(actor.model), job.tokenizer, job.folders["actor"], job.device)
    engine.load_weights(LocalWeights(actor.model), start.step)
    return engine


def subject_of(source: str, words: Sequence[str], *, like: Sequence[str] = ()) -> Subject:
    """What `source` names: the folder of a run (its newest checkpoint), a global_step_N folder, a model's folder or hub
    id. A run's configuration is that of its last start, under the settings of `words`.

    `like`: the settings by which another subject is evaluated; a model that is no run's takes them over.
    Raises CheckpointError for a folder without a whole checkpoint, ConfigError for a model without data.
    """
    folder = Path(source).expanduser()
    if is_run(folder):
        found = newest_checkpoint(folder)
        if found is None:
            raise CheckpointError(f"{source}: this folder of a run holds no whole checkpoint.")
        folder = found
    if is_checkpoint(folder) and (folder.parent / "config.yaml").is_file():
        require_undamaged(folder)
        config = load_config([*settings_of(folder, []), *words])
        state = CheckpointStore.state(folder)
        return Subject(source, config, Start(int(state["step"]), folder, state))
    given = [word for word in (*like, *words) if not word.startswith("actor_rollout_ref.model.path=")]
    files = [word.partition("=")[2] for word in given if word.startswith("data.val_files=")]
    if not files and not like:
        raise ConfigError(f"{source} is a model, and no run says what to evaluate it on: give data.val_files=FILE.")
    if files and not any(word.startswith("data.train_files=") for word in given):
        given.append(f"data.train_files={files[-1]}")  # nothing is trained
    return Subject(source, load_config([*given, f"actor_rollout_ref.model.path={source}"]), FROM_NOTHING)


def settings_of(source: str | Path, words: Sequence[str]) -> list[str]:
    """The settings that evaluate another model as `source` is evaluated. A run's folder may have been moved since."""
    folder = Path(source).expanduser()
    run = folder if is_run(folder) else folder.parent
    if not (run / "config.yaml").is_file():
        return list(words)
    return ["--config", str(run / "config.yaml"), f"trainer.default_local_dir={run}", *words]


def sampling_words(samples: int | None) -> list[str]:
    """The settings of `--samples N`: greedy responses would all be the same."""
    if samples is None:
        return []
    sampled = [f"{VAL_KWARGS}.temperature=1.0", f"{VAL_KWARGS}.do_sample=True"] if samples > 1 else []
    return [f"{VAL_KWARGS}.n={samples}", *sampled]


def run_evaluation(
    source: str,
    words: Sequence[str],
    *,
    other: str | None = None,
    samples: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """The command: evaluate one source, or two on the same prompts. Returns what `--json` prints.

    Raises ConfigError if the two were asked different prompts.
    """
    words = [*sampling_words(samples), *words]
    found = [evaluate(subject_of(source, words))]
    if other is not None:
        found.append(evaluate(subject_of(other, words, like=settings_of(source, words))))
    if output is not None:
        for one, path in zip(found, (output, output.with_name(f"{output.stem}-2{output.suffix}")), strict=False):
            write_jsonl(path, [dict(record) for record in one.records])
            say(f"the responses of {one.name}: {path}")
    result: dict[str, Any] = {"evaluated": {one.name: one.results() for one in found}}
    if other is not None:
        result["compared"] = {source: asdict(pair) for source, pair in compared(*found).items()}
    return result


def compared(first: Evaluated, second: Evaluated) -> dict[str, Paired]:
    """Data source -> the second against the first."""
    ids = [[record["id"] for record in one.records] for one in (first, second)]
    if ids[0] != ids[1]:
        raise ConfigError(
            f"{first.name} and {second.name} answered other prompts, so they cannot be compared. Give both the same "
            f"data.val_files, data.max_prompt_length and {VAL_KWARGS}.n."
        )
    groups = second.groups()
    return {source: compare(mine, groups[source]) for source, mine in first.groups().items()}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints: a line an estimate."""
    lines = []
    for name, sources in result["evaluated"].items():
        lines.append(name)
        for source, found in sources.items():
            lines.append(f"  {source}, {found['prompts']:,} prompts")
            lines += [f"    {key:<10}{_interval(one)}" for key, one in found.items() if key != "prompts"]
    for source, pair in result.get("compared", {}).items():
        lines.append(f"second less first, {source}")
        lines.append(f"    difference {_interval(pair['difference'])}")
        counts = f"{pair['better']} better, {pair['worse']} worse"
        lines.append(f"    prompts    {counts}; p = {pair['p_value']:.3g} ({pair['test']})")
    return "\n".join(lines)


def _interval(one: Mapping[str, float]) -> str:
    return f"{one['value']:.4f}   95 %: {one['low']:.4f} to {one['high']:.4f}"
