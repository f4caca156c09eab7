"""The PPO job from configuration to result: data, models, run folder, the loop, the summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import steepest
from steepest.assembly.engine import build_engine, frees_engine, longest_sequence
from steepest.assembly.roles import Models, build_models
from steepest.config.plan import Plan, make_plan
from steepest.config.schema import Config
from steepest.config.sections.reward import WeightedFunction, functions_of
from steepest.console import say
from steepest.core.advantages import ADVANTAGE_ESTIMATORS
from steepest.data.chat import encode_prompts
from steepest.data.prompts import Prompt, load_prompts
from steepest.data.sampler import PromptSampler
from steepest.devices.api import Device
from steepest.devices.gemm_rate import describe_rate, gemm_rate
from steepest.errors import DataError
from steepest.learner.checkpoint import CheckpointStore, Start
from steepest.learner.rng import rng_state, set_rng_state
from steepest.loggers.jsonl import SampleLog, read_metrics
from steepest.models.load import check_vocabulary
from steepest.process.openmp_waiting import adaptive_waiting
from steepest.process.start_timing import Laps
from steepest.process.threads import describe_threads
from steepest.rewards.weighted import ground_truth_problem
from steepest.rollout.api import RolloutEngine
from steepest.rollout.weights import LocalWeights
from steepest.trainer import build_step
from steepest.trainer.algorithm.row_selection import build_curation, build_shaping
from steepest.trainer.build_rewards import Rewards, add_reward_model, build_rewards
from steepest.trainer.experience.dynamic_sampling import PromptPosition
from steepest.trainer.experience.scoring import Scorer, StepScorer, with_costs
from steepest.trainer.experience.single_turn import StepRollouts
from steepest.trainer.loop import Schedule, run_steps
from steepest.trainer.run.folder import begin, hold, naming, open_run_folder, open_store, open_tokenizer
from steepest.trainer.run.health import Health, Limits
from steepest.trainer.run.hooks import Run, validation_history, write_jsonl
from steepest.trainer.run.model_sources import ModelSources, sources_of
from steepest.trainer.run.resume import find_start, require_work
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


def run_ppo(config: Config, laps: Laps | None = None) -> Result:
    """The whole job. Cheap checks come first: the device, the loggers, every row, every reward; then the models.

    `laps` has what the command did before this call.
    """
    laps = laps or Laps()
    device = begin(config, seed=config.actor_rollout_ref.rollout.seed)
    with adaptive_waiting(), build_rewards(config) as rewards:
        rewards.start()  # the workers import what they need while the rows are read
        rows = load_rows(config)
        rewards.check({prompt.data_source for prompt in (*rows.train, *rows.val)})
        model = config.actor_rollout_ref.model
        sources, section = sources_of(config.trainer), "actor_rollout_ref.model"
        folders = {"actor": sources.folder(f"{section}.path", model.path, model.hub, model.revision)}
        trust = config.data.trust_remote_code
        tokenizer = open_tokenizer(model, section, folders["actor"], sources, trust_remote_code=trust)
        data = encode_rows(config, rows, tokenizer)
        laps.lap("data")
        add_reward_model(rewards, config, sources, device)
        job = Job(config, device, rewards, sources, folders, tokenizer, data)
        with hold(job.folder):
            return job.run(laps)


def load_rows(config: Config) -> Data:
    """Both files' rows, checked cell by cell."""
    data = config.data
    load = partial(load_prompts, prompt_key=data.prompt_key, reward_fn_key=data.reward_fn_key, seed=data.seed, note=say)
    train = load(data.train_files, max_samples=data.train_max_samples, key="data.train_files")
    val = load(data.val_files, max_samples=data.val_max_samples, key="data.val_files")
    if config.custom_reward_function.path is None:
        check_ground_truths([*train, *val], functions_of(config.reward.functions))
    return Data(train, val)


def check_ground_truths(prompts: Sequence[Prompt], functions: Sequence[WeightedFunction] = ()) -> None:
    """Raises DataError for the first row whose ground truth no answer could equal by one of the rewards."""
    for prompt in prompts:
        problem = ground_truth_problem(prompt.data_source, prompt.ground_truth, functions)
        if problem is not None:
            raise DataError(
                f"row {prompt.uid} (file:row, from 0), column reward_model: {problem}. Mend the row, or score it with "
                "a function of your own (custom_reward_function.path)."
            )


def encode_rows(config: Config, rows: Data, tokenizer: Any) -> Data:
    data = config.data
    encode = partial(
        encode_prompts,
        tokenizer=tokenizer,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        filter_overlong=data.filter_overlong_prompts,
        template_kwargs=data.apply_chat_template_kwargs,
    )
    train, train_report = encode(rows.train)
    val, val_report = encode(rows.val)
    return Data(train, val, (f"train: {train_report.describe()}", f"validation: {val_report.describe()}"))


class Job:
    """The parts of one run, from its data to its end summary."""

    def __init__(
        self,
        config: Config,
        device: Device,
        rewards: Rewards,
        sources: ModelSources,
        folders: dict[str, Path],
        tokenizer: Any,
        data: Data,
    ) -> None:
        self.sources = sources
        self.config, self.device, self.folders, self.tokenizer, self.data = config, device, folders, tokenizer, data
        self.scorer = Scorer(rewards, tokenizer, rewards.costs)
        self.folder = Path(str(config.trainer.default_local_dir))
        self.plan: Plan = make_plan(
            config,
            len(data.train),
            ADVANTAGE_ESTIMATORS.get(config.algorithm.adv_estimator).spec,
            half_precision=build_step.half_precision(config, device),
        )
        self.position = PromptPosition()
        self.sampler = PromptSampler(
            len(data.train), config.data.train_batch_size, shuffle=config.data.shuffle, seed=config.data.seed
        )

    def run(self, laps: Laps) -> Result:
        config = self.config
        store = open_store(self.folder, config.trainer.max_actor_ckpt_to_keep)
        start = find_start(
            store, mode=config.trainer.resume_mode, resume_from_path=config.trainer.resume_from_path, say=say
        )
        if not config.trainer.val_only:
            require_work(start, self.plan.total_steps)
        models = self._load_models(start)
        laps.lap("models")
        engine = build_engine(config, models.actor, self.tokenizer, self.folders["actor"], self.device)
        engine.load_weights(LocalWeights(models.actor.model), start.step)
        for note in engine.notes:
            say(note)
        laps.lap("engine")
        machine = self._machine(models, laps)
        say(
            start_summary(
                config,
                self.plan,
                self.data.notes,
                self.device,
                models,
                str(self.folder),
                machine=machine,
                engine_copy_bytes=engine.copied_bytes,
            )
        )
        controller = build_step.build_controller(config)
        if start.checkpoint is not None:
            controller.load_state_dict(start.entry("kl_controller"))
            set_rng_state(start.entry("random"), self.device)
        self.position.restore(start.state.get("prompts"), start.step)
        run = self._make_run(store, start, models, engine, controller)
        try:
            self._train(run, start, models, engine, controller)
        finally:
            run.close()
        steps = 0 if config.trainer.val_only else self.plan.total_steps - start.step
        seconds = time.perf_counter() - laps.began
        say(end_summary(run.history, seconds=seconds, steps=steps, folder=str(self.folder)))
        return Result(self.folder, dict(run.history))

    def _machine(self, models: Models, laps: Laps) -> list[tuple[str, str]]:
        """What the summary says of the machine; the limit that `perf/mfu` is a share of is measured here."""
        rows = [("threads", describe_threads())]
        if not self.config.trainer.val_only:
            dtype = getattr(torch, models.actor.compute.dtype)
            self.limit = gemm_rate(self.device, dtype)
            laps.lap("limit")
            rows.append(("limit", describe_rate(self.limit, dtype, self.device)))
        return [*rows, ("start-up", laps.describe())]

    def _load_models(self, start: Start) -> Models:
        if self.plan.needs_critic:
            critic = self.config.critic.model
            self.folders["critic"] = self.sources.folder("critic.model.path", critic.path, critic.hub, critic.revision)
        models = build_models(self.config, self.plan, start, self.folders, self.device)
        longest = longest_sequence(self.config)
        for key, part in (("actor_rollout_ref.model", models.actor), ("critic.model", models.critic)):
            if part is not None:
                with naming(f"{key}.path"):
                    check_vocabulary(part.model, self.tokenizer)
                    part.model.check_length(longest)
        return models

    def _make_run(
        self, store: CheckpointStore, start: Start, models: Models, engine: RolloutEngine, controller: Any
    ) -> Run:
        trainer = self.config.trainer
        history = validation_history(self.folder / "metrics.jsonl")
        kept = self._records_kept(start)
        total = self.plan.total_steps
        loggers = open_run_folder(self.config, trainer, self.folder, self.sources, total=total, start=kept)
        return Run(
            folder=self.folder,
            loggers=loggers,
            store=store,
            writers=self._writers(models),
            state=lambda: {
                "version": steepest.__version__,
                "kl_controller": controller.state_dict(),
                "random": rng_state(self.device),
                "prompts": self.position.state_dict(),
            },
            checkpoint_bytes=sum(part.checkpoint_bytes() for part in (models.actor, models.critic) if part is not None),
            evaluator=self._evaluator(engine),
            schedule=Schedule(self.plan.total_steps, trainer.save_freq, trainer.test_freq),
            health=Health(Limits.for_dtype(models.actor.compute.dtype)),
            val_before_train=trainer.val_before_train or trainer.val_only,
            steps_per_epoch=self.plan.steps_per_epoch,
            sample_log=SampleLog(self.folder / "samples.jsonl", start_step=kept),
            num_logged_samples=trainer.log_val_generations,
            validation_data_dir=trainer.validation_data_dir,
            history={step: score for step, score in history.items() if start.step > 0 and step <= start.step},
        )

    def _records_kept(self, start: Start) -> int:
        """The last step whose records stay. A run does the later steps again; one that only validates does none."""
        file = self.folder / "metrics.jsonl"
        if start.step == 0 or not self.config.trainer.val_only or not file.exists():
            return start.step
        return max((start.step, *read_metrics(file)))

    def _writers(self, models: Models) -> dict[str, Callable[[Path], None]]:
        writers: dict[str, Callable[[Path], None]] = {"actor": partial(models.actor.save, tokenizer=self.tokenizer)}
        if models.critic is not None:
            writers["critic"] = partial(models.critic.save, tokenizer=self.tokenizer)
        return writers

    def _evaluator(self, engine: RolloutEngine) -> Evaluator:
        return Evaluator(
            engine=engine,
            prompts=self.data.val,
            sampling=build_step.val_sampling(self.config),
            scorer=self.scorer,
            batch_size=self.config.data.val_batch_size,
            pad_id=self.tokenizer.pad_token_id,
        )

    def _train(self, run: Run, start: Start, models: Models, engine: RolloutEngine, controller: Any) -> None:
        if self.config.trainer.val_only:
            run.validate(start.step)
            return
        rollouts = StepRollouts(
            engine,
            self.data.train,
            self.sampler,
            build_step.train_sampling(self.config),
            self.tokenizer.pad_token_id,
            **({"release": engine.sleep} if frees_engine(self.config, self.device) else {}),
        )
        scorer = StepScorer(
            self.scorer, self._rollout_writer(), build_shaping(self.config), build_curation(self.config)
        )
        generate, score = build_step.build_sampling(
            self.config, self.plan, rollouts, scorer, self.position, models.actor.model
        )
        step = build_step.build_step(
            self.config,
            self.plan,
            models,
            controller,
            generate=generate,
            score=with_costs(score, self.scorer.costs),
            engine=engine,
            device=self.device,
            limit=self.limit,
        )
        run_steps(step, step.timed, run.schedule, run, start.step)

    def _rollout_writer(self) -> Callable[[int, list[dict[str, Any]]], None] | None:
        target = self.config.trainer.rollout_data_dir
        if target is None:
            return None
        return lambda step, rows: write_jsonl(
            Path(target) / f"{step}.jsonl", [{"step": step, "split": "train", **row} for row in rows]
        )
