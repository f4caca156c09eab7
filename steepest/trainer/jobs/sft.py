"""The SFT job: the same data checks, checkpoints, resume and loggers as PPO, around one supervised update a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import steepest
from steepest.assembly.compute import SFT_MODEL, compute_settings, micro_batches, overrides
from steepest.assembly.description import size_of
from steepest.assembly.lora import load_policy
from steepest.assembly.roles import optim_settings
from steepest.config.key_names import SFT_KEYS
from steepest.config.plan import SFTPlan, make_sft_plan
from steepest.config.schema import SFTConfig
from steepest.config.settle import settle_sft_batch, settle_sft_length
from steepest.console import say
from steepest.data.hub_sets import FOR_VALIDATION, local_files
from steepest.data.sampler import PromptSampler
from steepest.data.sft import SFTExample, encode_sft, load_sft_rows
from steepest.devices.api import Device
from steepest.errors import key_names
from steepest.learner.checkpoint import CheckpointStore, Start
from steepest.learner.metrics import Metrics
from steepest.learner.supervised import Supervised
from steepest.loggers.api import Loggers
from steepest.models.load import check_vocabulary, check_window, end_token_ids, longest_sequence_of
from steepest.process.openmp_waiting import adaptive_waiting
from steepest.process.stopping import STOP
from steepest.progress import START
from steepest.trainer.loop import BYTES_A_SECOND, Schedule, Timer, run_steps
from steepest.trainer.run.folder import begin, hold, open_run_folder, open_store, open_tokenizer
from steepest.trainer.run.hooks import (
    GLOBAL_STEP,
    METRICS,
    is_finished,
    kept_row,
    owes_validation,
    unlogged_row,
    validation_history,
)
from steepest.trainer.run.inputs import Inputs, inputs_of
from steepest.trainer.run.metrics import memory_metrics
from steepest.trainer.run.model_sources import ModelSources, sources_of
from steepest.trainer.run.resume import find_start, finished_message
from steepest.trainer.run.summary import count, duration, saving, table

LOSS = "val/loss"


@dataclass(frozen=True)
class SFTResult:
    """The last checkpoint's model folder, and step -> validation loss."""

    model: Path
    history: dict[int, float]


@dataclass
class SFTStep:
    """One optimizer step on the sampler's examples."""

    model: Supervised
    examples: Sequence[SFTExample]
    sampler: PromptSampler
    timed: Timer
    device: Device
    learning: bool = False

    def __call__(self, step: int) -> Metrics:
        with self.timed("step"):
            chosen = [self.examples[i] for i in self.sampler.indices(step - 1)]
            self.learning = True
            metrics = self.model.update(chosen)
            self.learning = False
        metrics["perf/total_num_tokens"] = float(sum(len(example.token_ids) for example in chosen))
        return metrics | memory_metrics(self.device)


@dataclass
class SFTRun:
    """The hooks of `loop.run_steps`."""

    model: Supervised
    tokenizer: object
    val: Sequence[SFTExample]
    store: CheckpointStore
    loggers: Loggers
    steps_per_epoch: int
    history: dict[int, float]
    owes_validation: bool
    """See `hooks.owes_validation`; the start step is then validated first."""

    def before_training(self, start_step: int) -> None:
        if self.owes_validation:
            self.validate(start_step)

    def examine(self, step: int, metrics: Metrics) -> Metrics:
        """Supervised training has no health checks."""
        return {}

    def remember(self, step: int) -> None:
        """The model is all of the state."""

    def save(self, step: int, metrics: Metrics) -> None:
        writers = {"actor": partial(self.model.save, tokenizer=self.tokenizer)}
        state = {"step": step, "version": steepest.__version__, METRICS: kept_row(self._row(step, metrics))}
        self.store.save(step, writers, state, expected_bytes=self.model.checkpoint_bytes())

    def log(self, step: int, metrics: Metrics) -> None:
        self.loggers.log(step, self._row(step, metrics))

    def _row(self, step: int, metrics: Metrics) -> Metrics:
        return {
            **metrics,
            GLOBAL_STEP: float(step),
            "training/epoch": float((step - 1) // self.steps_per_epoch),
            "perf/throughput": metrics["perf/total_num_tokens"] / metrics["timing_s/step"],
        }

    def validate(self, step: int) -> None:
        if not self.val:
            return
        metrics = self.model.evaluate(self.val)
        with STOP.during("hold"):  # the row last, as in `hooks.Run`
            if self.store.holds(step):
                self.store.mark_best(step, -metrics[LOSS])
            self.loggers.log(step, metrics)
            self.history[step] = metrics[LOSS]


@key_names(SFT_KEYS)
def run_sft(config: SFTConfig) -> SFTResult:
    """The whole job; every row is checked before the model is loaded."""
    began = time.perf_counter()
    device = begin(config, seed=config.data.seed)
    data, model = config.data, config.model
    load = partial(
        load_sft_rows,
        messages_key=data.messages_key,
        prompt_key=data.prompt_key,
        answer_key=data.response_key,
        ignored_columns=data.ignored_columns,
        seed=data.seed,
        note=say,
    )
    fetch = partial(local_files, hub=data.hub, note=say)
    with START.activity("reading the rows"):
        train = load(fetch(data.train_files, key="data.train_files"), max_samples=data.train_max_samples)
        val_files = fetch(data.val_files, key="data.val_files", splits=FOR_VALIDATION)
        val = load(val_files, max_samples=data.val_max_samples, key="data.val_files") if val_files else []
    sources, inputs = sources_of(config.trainer), inputs_of(config.trainer)
    folder = sources.folder("model.path", model.path, model.hub, model.revision)
    tokenizer = open_tokenizer(model, "model", folder, sources, trust_remote_code=model.trust_remote_code)
    encode = partial(
        encode_sft,
        tokenizer=tokenizer,
        max_length=data.max_length,
        truncation=data.truncation,
        template_kwargs=inputs.template_kwargs(data.apply_chat_template_kwargs, tokenizer),
        end_token_ids=end_token_ids(folder, tokenizer),
    )
    with START.activity("making tokens of the rows"):
        train_examples, train_report = encode(train)
    say(f"train: {train_report.describe()}")
    val_examples, val_report = encode(val)
    if val:
        say(f"validation: {val_report.describe()}")
    inputs.add_tokenizer(tokenizer)
    inputs.add_machine(device.describe())
    for key, examples in (("train", train_examples), ("val", val_examples)):
        parts = ([example.token_ids, example.loss_mask] for example in examples)
        inputs.add(f"tokens of data.{key}_files", parts, f"{len(examples)} samples")
    config = _settle(config, folder, len(train), max(train_report.longest, val_report.longest))
    longest = config.data.max_length
    check_window(folder, longest, trust_remote_code=model.trust_remote_code, override_config=overrides(model))
    with hold(Path(config.trainer.default_local_dir)), adaptive_waiting():
        result = _train(config, device, sources, inputs, folder, tokenizer, train_examples, val_examples)
    where = f"the model is in {result.model}" if result.model.is_dir() else "the model was not saved"
    say(f"finished in {duration(time.perf_counter() - began)}; {where}")
    return result


def _settle(config: SFTConfig, folder: Path, num_rows: int, longest: int) -> SFTConfig:
    """Give keys that the user left open the values that suit the model and the rows, and say which."""
    model = config.model
    limit = longest_sequence_of(
        folder,
        config.data.max_length,
        trust_remote_code=model.trust_remote_code,
        override_config=overrides(model),
    )
    config, notes = settle_sft_length(config, limit, longest)
    config, more = settle_sft_batch(config, num_rows)
    for note in (*notes, *more):
        say(note)
    return config


def _train(
    config: SFTConfig,
    device: Device,
    sources: ModelSources,
    inputs: Inputs,
    folder: Path,
    tokenizer: object,
    train: Sequence[SFTExample],
    val: Sequence[SFTExample],
) -> SFTResult:
    trainer, data = config.trainer, config.data
    plan = make_sft_plan(config, len(train))
    sampler = PromptSampler(len(train), data.train_batch_size, shuffle=data.shuffle, seed=data.seed)
    total, run_folder = plan.total_steps, Path(trainer.default_local_dir)
    store = open_store(run_folder, trainer.max_ckpt_to_keep)
    start = find_start(store, mode=trainer.resume_mode, resume_from_path=trainer.resume_from_path, say=say)
    start.refuse_entry("kl_controller")  # a PPO run's
    schedule = Schedule(total, trainer.save_freq, trainer.test_freq if val else -1, trainer.save_last)
    metrics = run_folder / "metrics.jsonl"
    history = validation_history(metrics, start, metric=LOSS)
    result = SFTResult(run_folder / f"global_step_{total}" / "actor", history)
    if is_finished(schedule, start, history, metrics):
        say(finished_message(start.step, total, can_validate=False))
        return result
    with START.activity("loading the model"):
        model = _load(config, plan, device, start, folder)
    check_vocabulary(model.model, tokenizer)
    model.model.check_length(data.max_length)
    say(_summary(config, plan, model, device, len(train), schedule))
    STOP.grace, STOP.reserve = trainer.grace_seconds, model.checkpoint_bytes() / BYTES_A_SECOND
    lost = unlogged_row(metrics, start)
    with open_run_folder(config, trainer, run_folder, sources, inputs, total=total, start=start.step) as loggers:
        if lost is not None:
            loggers.log(start.step, lost)
        owes = owes_validation(schedule, start, history)
        run = SFTRun(model, tokenizer, val, store, loggers, sampler.steps_per_epoch, history, owes)
        step = SFTStep(model, train, sampler, Timer(device.synchronize), device)
        run_steps(step, step.timed, schedule, run, start.step, STOP)
    return result


def _load(config: SFTConfig, plan: SFTPlan, device: Device, start: Start, folder: Path) -> Supervised:
    compute = compute_settings(config.model, SFT_MODEL, config.engine.dtype, device)
    model = Supervised(
        load_policy(config.model, start, folder, halve=compute.dtype == "bfloat16"),
        compute=compute,
        optim=optim_settings(config.optim, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps),
        micro=micro_batches(
            "model.update", config.data.micro_batch_size_per_gpu, None, config.data.max_token_len_per_gpu
        ),
    )
    if start.checkpoint is not None:
        model.load_optimizer(start.checkpoint / "actor")
    return model


def _summary(
    config: SFTConfig, plan: SFTPlan, model: Supervised, device: Device, num_examples: int, schedule: Schedule
) -> str:
    rows = [
        ("device", device.describe()),
        ("model", f"{config.model.path}: {size_of(model).describe(count)}"),
        ("compute", f"{model.compute.dtype} over float32 weights"),
        ("attention", model.compute.attention.describe()),
        ("steps", f"{plan.total_steps} of {config.data.train_batch_size} samples, {num_examples} samples in all"),
        ("saving", saving(schedule, config.trainer.default_local_dir, model.checkpoint_bytes())),
        *(("note", note) for note in plan.notes),
        ("run folder", config.trainer.default_local_dir),
    ]
    return table(f"steepest {steepest.__version__}, supervised fine-tuning", rows)
