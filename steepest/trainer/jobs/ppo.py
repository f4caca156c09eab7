"""The PPO job from configuration to result: data, models, run folder, the loop, the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import steepest
from steepest.assembly.compute import overrides
from steepest.assembly.description import Description
from steepest.assembly.engine import frees_engine, longest_sequence
from steepest.assembly.roles import build_roles
from steepest.cluster.local import LocalCluster
from steepest.config.key_names import PPO_KEYS
from steepest.config.plan import Plan, make_plan
from steepest.config.schema import Config
from steepest.config.sections.reward import WeightedFunction, functions_of, reads_data_source, reads_ground_truth
from steepest.config.settle import settle_batch, settle_lengths
from steepest.console import say
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.data.chat import EncodeReport, encode_prompts
from steepest.data.hub_sets import FOR_VALIDATION, local_files
from steepest.data.prompts import Prompt, load_prompts
from steepest.data.sampler import PromptSampler
from steepest.devices.api import Accelerator, Device
from steepest.devices.gemm_rate import describe_rate, gemm_rate
from steepest.errors import DataError, key_names
from steepest.learner.checkpoint import CheckpointStore, Start
from steepest.learner.rng import rng_state, set_rng_state
from steepest.loggers.jsonl import SampleLog, read_metrics
from steepest.models.load import check_window, end_token_ids, longest_sequence_of, text_ids
from steepest.process.openmp_waiting import adaptive_waiting
from steepest.process.patience import waiting_for
from steepest.process.start_timing import Laps
from steepest.process.stopping import STOP
from steepest.process.threads import describe_threads
from steepest.progress import START
from steepest.rewards.weighted import ground_truth_problem
from steepest.trainer import build_step
from steepest.trainer.build_rewards import Rewards, add_reward_model, build_rewards
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.response_text import ResponseText
from steepest.trainer.experience.scoring import Scorer
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.loop import BYTES_A_SECOND, Schedule, run_steps
from steepest.trainer.ppo import Observer
from steepest.trainer.run.folder import begin, hold, open_run_folder, open_store, open_tokenizer
from steepest.trainer.run.health.watch import Health, build_checks
from steepest.trainer.run.hooks import (
    Run,
    is_finished,
    owes_validation,
    saved_values,
    unlogged_row,
    validation_history,
    write_jsonl,
)
from steepest.trainer.run.inputs import Inputs, inputs_of
from steepest.trainer.run.model_sources import ModelSources, folder_that_goes_on, sources_of
from steepest.trainer.run.resume import find_start, finished_message
from steepest.trainer.run.summary import end_summary, start_summary
from steepest.trainer.run.validation import Evaluator


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind."""

    folder: Path
    history: Mapping[int, float]
    """Step -> validation accuracy."""


@dataclass(frozen=True)
class Data:
    """The checked prompts, tokenised by `encode_rows`."""

    train: list[Prompt]
    val: list[Prompt]
    notes: tuple[str, ...] = ()
    """What tokenising has to say: how many were kept, dropped and cut."""
    reports: tuple[EncodeReport, ...] = ()
    """The same as numbers, of `train` and `val`."""

    def sources_and_columns(self) -> tuple[set[str], set[str]]:
        """The data sources of the rows, and the names that every row has in its extra_info."""
        rows = [*self.train, *self.val]
        return {row.data_source for row in rows}, set.intersection(*(set(row.extra_info) for row in rows))


@key_names(PPO_KEYS)
def run_ppo(config: Config, laps: Laps | None = None, *, observers: Sequence[Observer] = ()) -> Result:
    """The whole job. Cheap checks come first: the device, the loggers, every row, every reward; then the models.

    `laps` has what the command did before this call. Each of `observers` is called with a step's number and its
    experience once the step has been learnt from.
    """
    laps = laps or Laps()
    with opened(config, laps, partial(Job, observers=observers)) as job, hold(job.folder):
        return job.run(laps)


@contextmanager
def opened(config: Config, laps: Laps, make: Callable[..., Job]) -> Iterator[Job]:
    """The job with everything that comes before the models: checked rows, their tokens, rewards that are ready."""
    device = begin(config, seed=config.actor_rollout_ref.rollout.seed)
    with adaptive_waiting(), build_rewards(config) as rewards:
        rewards.start()  # the workers import what they need while the rows are read
        with START.activity("reading the rows"):
            rows = load_rows(config)
        for note in rewards.check(*rows.sources_and_columns()):
            say(note)
        model = config.actor_rollout_ref.model
        sources, inputs, section = sources_of(config.trainer), inputs_of(config.trainer), "actor_rollout_ref.model"
        folders = {"actor": sources.folder(f"{section}.path", model.path, model.hub, model.revision)}
        trust = config.data.trust_remote_code
        tokenizer = open_tokenizer(model, section, folders["actor"], sources, trust_remote_code=trust)
        with START.activity("making tokens of the prompts"):
            data = encode_rows(config, rows, tokenizer, inputs)
        inputs.add_code(config)
        inputs.add_machine(device.describe())
        config, data = settle(config, data, device, folders["actor"])
        check_model(config, folders["actor"])
        laps.lap("data")
        add_reward_model(rewards, config, sources, device)
        yield make(config, device, rewards, sources, inputs, folders, tokenizer, data)


def load_rows(config: Config) -> Data:
    """Both files' rows, checked cell by cell."""
    data = config.data
    load = partial(
        load_prompts,
        prompt_key=data.prompt_key,
        answer_key=data.answer_key,
        reward_fn_key=data.reward_fn_key,
        ignored_columns=data.ignored_columns,
        needs_source=reads_data_source(config),
        needs_truth=reads_ground_truth(config),
        seed=data.seed,
        note=say,
    )
    fetch = partial(local_files, hub=data.hub, note=say)
    train_files = fetch(data.train_files, key="data.train_files")
    val_files = fetch(data.val_files, key="data.val_files", splits=FOR_VALIDATION)
    found, problems = list[list[Prompt]](), list[str]()
    for files, most, key in (
        (train_files, data.train_max_samples, "data.train_files"),
        (val_files, data.val_max_samples, "data.val_files"),
    ):
        try:
            found.append(load(files, max_samples=most, key=key))
        except DataError as error:
            problems += [line for line in error.marked.splitlines() if line not in problems]
    if problems:  # the right row, which ends the error of each file, once and last
        raise DataError("\n".join(sorted(problems, key=lambda line: line.startswith("A right row: "))))
    train, val = found
    if config.custom_reward_function.path is None:
        check_ground_truths([*train, *val], functions_of(config.reward.functions))
    return Data(train, val)


def check_ground_truths(prompts: Sequence[Prompt], functions: Sequence[WeightedFunction] = ()) -> None:
    """Raises DataError for the first row whose ground truth no answer could equal by one of the rewards. Equal ground
    truths are checked once."""
    checked: set[tuple[str, str]] = set()
    for prompt in prompts:
        key = (prompt.data_source, repr(prompt.ground_truth))
        if key in checked:
            continue
        checked.add(key)
        problem = ground_truth_problem(prompt.data_source, prompt.ground_truth, functions)
        if problem is not None:
            raise DataError(
                f"row {prompt.uid} (file:row, from 0), column reward_model: {problem}. Fix the row, or score it with "
                "a function of your own (custom_reward_function.path)."
            )


def encode_rows(config: Config, rows: Data, tokenizer: Any, inputs: Inputs) -> Data:
    """The prompts as the model reads them. `inputs` gets what they are, before and after."""
    data = config.data
    inputs.add_tokenizer(tokenizer)
    encode = partial(
        encode_prompts,
        tokenizer=tokenizer,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong=data.filter_overlong_prompts,
        template_kwargs=inputs.template_kwargs(data.apply_chat_template_kwargs, tokenizer),
    )
    train, train_report = encode(rows.train)
    val, val_report = encode(rows.val)
    for key, prompts, encoded in (("train", rows.train, train), ("val", rows.val, val)):
        rows_of = ([p.messages, p.data_source, p.ground_truth, p.extra_info] for p in prompts)
        inputs.add(f"data.{key}_files", rows_of, f"{len(prompts)} rows")
        inputs.add(f"tokens of data.{key}_files", (p.token_ids for p in encoded), f"{len(encoded)} prompts")
    notes = (f"train: {train_report.describe()}", f"validation: {val_report.describe()}")
    return Data(train, val, notes, (train_report, val_report))


def settle(config: Config, data: Data, device: Device, folder: Path) -> tuple[Config, Data]:
    """Give keys that the user left open the values that suit device, rows and model; the data's notes say which."""
    model, lengths = config.actor_rollout_ref.model, config.data.max_prompt_length + config.data.max_response_length
    limit = longest_sequence_of(
        folder, lengths, trust_remote_code=model.trust_remote_code, override_config=overrides(model)
    )
    longest = max(len(prompt.token_ids) for prompt in (*data.train, *data.val))
    config, notes = settle_lengths(config, limit, longest)
    run = folder_that_goes_on(config.trainer)
    earlier = None if run is None else saved_values(run / "config.yaml")
    config, more = settle_batch(config, len(data.train), on_card=isinstance(device, Accelerator), earlier=earlier)
    return config, replace(data, notes=(*data.notes, *notes, *more))


def check_model(config: Config, folder: Path) -> None:
    """What can be seen without weights: that the actor has positions for the longest sequence."""
    model = config.actor_rollout_ref.model
    check_window(
        folder,
        longest_sequence(config),
        trust_remote_code=model.trust_remote_code,
        override_config=overrides(model),
    )


class Job:
    """The parts of one run, from its data to its end summary."""

    def __init__(
        self,
        config: Config,
        device: Device,
        rewards: Rewards,
        sources: ModelSources,
        inputs: Inputs,
        folders: dict[str, Path],
        tokenizer: Any,
        data: Data,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.sources, self.inputs, self.observers = sources, inputs, observers
        self.config, self.device, self.folders, self.tokenizer, self.data = config, device, folders, tokenizer, data
        ends = end_token_ids(folders["actor"], tokenizer)
        writer = ResponseText(tokenizer, config.reward.skip_special_tokens, ends)
        self.scorer = Scorer(rewards, writer, rewards.costs, text_ids(tokenizer), torch.tensor(ends))
        for note in writer.notes([*data.train, *data.val]):
            say(note)
        self.folder = Path(str(config.trainer.default_local_dir))
        self.plan: Plan = make_plan(
            config,
            len(data.train),
            ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator).spec,
            half_precision=build_step.half_precision(config, device),
        )
        trainer = config.trainer
        self.schedule = Schedule(self.plan.total_steps, trainer.save_freq, trainer.test_freq, trainer.save_last)
        self.position = PromptPosition()
        self.controller = build_step.build_controller(config)

    def run(self, laps: Laps) -> Result:
        config = self.config
        store = open_store(self.folder, config.trainer.max_actor_ckpt_to_keep)
        start = find_start(
            store, mode=config.trainer.resume_mode, resume_from_path=config.trainer.resume_from_path, say=say
        )
        metrics = self.folder / "metrics.jsonl"
        history = validation_history(metrics, start)
        if not config.trainer.val_only and is_finished(self.schedule, start, history, metrics):
            say(finished_message(start.step, self.plan.total_steps))
            return Result(self.folder, history)
        with START.activity("loading the models and the engine"):
            cluster = self.start_cluster(start, laps)
        roles = cluster.describe()
        for note in roles.engine_notes:
            say(note)
        limit = self._measure_limit(roles.compute, laps)
        machine = self._machine(limit, roles.compute, laps)
        say(
            start_summary(
                config,
                self.plan,
                self.data.notes,
                self.device,
                roles,
                str(self.folder),
                schedule=None if config.trainer.val_only else self.schedule,
                machine=machine,
            )
        )
        if start.checkpoint is not None:
            self.controller.load_state_dict(start.entry("kl_controller"))
            set_rng_state(start.entry("random"), self.device)
        self.health = Health(build_checks(config, roles.compute))
        if (earlier := start.state.get("health")) is not None:  # checkpoints of older versions have none
            self.health.load_state_dict(earlier)
        self.position.restore(start.state.get("prompts"), start.step)
        run = self._make_run(store, start, cluster, roles, history)
        try:
            if limit is None:
                run.validate(start.step)
            else:
                self._train(run, start, cluster, limit)
        finally:
            run.close()
        steps = 0 if config.trainer.val_only else self.plan.total_steps - start.step
        seconds, kept = time.perf_counter() - laps.began, self.schedule.saves_anything
        say(end_summary(run.history, seconds=seconds, steps=steps, folder=str(self.folder), kept=kept))
        return Result(self.folder, dict(run.history))

    def start_cluster(self, start: Start, laps: Laps) -> LocalCluster:
        if self.plan.needs_critic:
            critic = self.config.critic.model
            self.folders["critic"] = self.sources.folder(
                "critic.model.path", critic.path, critic.hub, critic.revision, critic=True
            )
        with waiting_for("models and engine to be loaded"):
            roles = build_roles(self.config, self.plan, start, self.folders, self.tokenizer, self.device, laps.lap)
        return LocalCluster(roles, self.device, frees_engine=frees_engine(self.config, self.device))

    def _measure_limit(self, compute: str, laps: Laps) -> float | None:
        """Operations a second that the device can do, which `perf/mfu` is a share of. None: the run only validates."""
        if self.config.trainer.val_only:
            return None
        with START.activity("measuring the device"):
            limit = gemm_rate(self.device, getattr(torch, compute))
        laps.lap("limit")
        return limit

    def _machine(self, limit: float | None, compute: str, laps: Laps) -> list[tuple[str, str]]:
        """Rows of the summary about the machine."""
        rows = [("threads", describe_threads())]
        if limit is not None:
            rows.append(("limit", describe_rate(limit, getattr(torch, compute), self.device)))
        return [*rows, ("start-up", laps.describe())]

    def _make_run(
        self, store: CheckpointStore, start: Start, cluster: LocalCluster, roles: Description, history: dict[int, float]
    ) -> Run:
        trainer = self.config.trainer
        kept, owes = self._records_kept(start), owes_validation(self.schedule, start, history)
        total = self.plan.total_steps
        lost = unlogged_row(self.folder / "metrics.jsonl", start)
        sources, inputs = self.sources, self.inputs
        loggers = open_run_folder(self.config, trainer, self.folder, sources, inputs, total=total, start=kept)
        if lost is not None:
            loggers.log(start.step, lost)
        return Run(
            folder=self.folder,
            loggers=loggers,
            store=store,
            writers=cluster.writers(self.tokenizer),
            state=lambda: {
                "version": steepest.__version__,
                "kl_controller": self.controller.state_dict(),
                "random": rng_state(self.device),
                "prompts": self.position.state_dict(),
                "health": self.health.state_dict(),
            },
            checkpoint_bytes=roles.checkpoint_bytes,
            evaluator=self._evaluator(cluster),
            schedule=self.schedule,
            health=self.health,
            ends_on_problem=trainer.on_problem == "stop",
            val_before_train=trainer.val_before_train or trainer.val_only,
            steps_per_epoch=self.plan.steps_per_epoch,
            sample_log=SampleLog(self.folder / "samples.jsonl", start_step=kept, redo=start.step if owes else None),
            num_logged_samples=trainer.log_val_generations,
            validation_data_dir=trainer.validation_data_dir,
            owes_validation=owes,
            history=history,
        )

    def _records_kept(self, start: Start) -> int:
        """The last step whose records stay. A run does the later steps again; one that only validates does none."""
        file = self.folder / "metrics.jsonl"
        if start.step == 0 or not self.config.trainer.val_only or not file.exists():
            return start.step
        return max((start.step, *read_metrics(file)))

    def _evaluator(self, cluster: LocalCluster) -> Evaluator:
        return Evaluator(
            engine=cluster,
            prompts=self.data.val,
            sampling=build_step.val_sampling(self.config),
            scorer=self.scorer,
            batch_size=self.config.data.val_batch_size,
            pad_id=self.tokenizer.pad_token_id,
        )

    def _train(self, run: Run, start: Start, cluster: LocalCluster, limit: float) -> None:
        config, data = self.config, self.config.data
        sampler = PromptSampler(len(self.data.train), data.train_batch_size, shuffle=data.shuffle, seed=data.seed)
        rollouts = StepRollouts(
            cluster, self.data.train, sampler, build_step.train_sampling(config), self.tokenizer.pad_token_id
        )
        collect = build_step.build_collector(
            config,
            self.plan,
            cluster,
            rollouts,
            self.scorer,
            self.position,
            device=self.device,
            write=self._rollout_writer(),
        )
        learn = build_step.build_learn(config, self.plan, cluster, self.controller, device=self.device, limit=limit)
        STOP.grace, STOP.reserve = config.trainer.grace_seconds, run.checkpoint_bytes / BYTES_A_SECOND
        step = build_step.build_step(collect, learn, self.position, self.observers, STOP)
        run_steps(step, learn.timed, run.schedule, run, start.step, STOP)

    def _rollout_writer(self) -> Callable[[int, list[dict[str, Any]]], None] | None:
        target = self.config.trainer.rollout_data_dir
        if target is None:
            return None
        return lambda step, rows: write_jsonl(
            Path(target) / f"{step}.jsonl", [{"step": step, "split": "train", **row} for row in rows]
        )
