"""The SFT job: the same data checks, checkpoints, resume and loggers as PPO, around one supervised update a step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import steepest
from steepest.config.load import config_dict
from steepest.config.plan import SFTPlan, make_sft_plan
from steepest.config.schema_sft import SFTConfig
from steepest.data.sampler import PromptSampler
from steepest.data.sft import SFTExample, encode_sft, load_sft_rows
from steepest.devices.api import Device, select_device
from steepest.errors import ConfigError
from steepest.loggers.api import Loggers, check_loggers, make_loggers
from steepest.models.load import check_vocabulary, end_token_ids, load_causal_lm, load_tokenizer
from steepest.trainer import build
from steepest.trainer.ppo import Metrics, Schedule, Timer, run_steps
from steepest.trainer.resume import Start, find_start, require_work
from steepest.trainer.run import keep_config, say
from steepest.trainer.summary import count, count_parameters, duration, table
from steepest.training import sft_step
from steepest.training.checkpoint import CheckpointStore
from steepest.training.sft_step import Supervised


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

    def __call__(self, step: int) -> Metrics:
        with self.timed("step"):
            chosen = [trainable(self.examples[i]) for i in self.sampler.indices(step - 1)]
            metrics = self.model.update(chosen)
        return {**metrics, "perf/total_num_tokens": float(sum(len(example.token_ids) for example in chosen))}


@dataclass
class SFTRun:
    """The hooks of `ppo.run_steps`."""

    model: Supervised
    tokenizer: object
    val: Sequence[SFTExample]
    store: CheckpointStore
    loggers: Loggers
    steps_per_epoch: int
    schedule: Schedule
    history: dict[int, float]

    def before_training(self, start_step: int) -> None:
        pass

    def save(self, step: int) -> None:
        writers = {"actor": partial(self.model.save, tokenizer=self.tokenizer)}
        state = {"step": step, "version": steepest.__version__}
        self.store.save(step, writers, state, expected_bytes=self.model.checkpoint_bytes())

    def log(self, step: int, metrics: Metrics) -> None:
        metrics["training/global_step"] = float(step)
        metrics["training/epoch"] = float((step - 1) // self.steps_per_epoch)
        metrics["perf/throughput"] = metrics["perf/total_num_tokens"] / metrics["timing_s/step"]
        self.loggers.log(step, metrics)

    def validate(self, step: int) -> None:
        if not self.val:
            return
        metrics = self.model.evaluate([trainable(example) for example in self.val])
        self.history[step] = metrics["val/loss"]
        self.loggers.log(step, metrics)
        if self.store.has(step):
            self.store.mark_best(step, -metrics["val/loss"])


def trainable(example: SFTExample) -> sft_step.SFTExample:
    return sft_step.SFTExample(list(example.token_ids), list(example.loss_mask))


def run_sft(config: SFTConfig) -> SFTResult:
    """The whole job; every row is checked before the model is loaded."""
    began = time.perf_counter()
    for message in (*config.provenance.notes, *(f"warning: {text}" for text in config.provenance.warnings)):
        say(message)
    device = select_device(config.trainer.device)
    device.seed(config.data.seed)
    problems = check_loggers(config.trainer.logger)
    if problems:
        raise ConfigError(problems)
    load = partial(
        load_sft_rows,
        messages_key=config.data.messages_key,
        prompt_key=config.data.prompt_key,
        answer_key=config.data.response_key,
        seed=config.data.seed,
        note=say,
    )
    train = load(config.data.train_files, max_samples=config.data.train_max_samples)
    val = (
        load(config.data.val_files, max_samples=config.data.val_max_samples, key="data.val_files")
        if config.data.val_files
        else []
    )
    model = config.model
    folder = build.model_folder("model.path", model.path, model.hub)
    same = model.tokenizer_path == model.path
    tokenizer = load_tokenizer(
        folder if same else build.model_folder("model.tokenizer_path", model.tokenizer_path, model.hub),
        custom_chat_template=config.model.custom_chat_template,
        trust_remote_code=config.model.trust_remote_code,
    )
    encode = partial(
        encode_sft,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        template_kwargs=config.data.apply_chat_template_kwargs,
        end_token_ids=end_token_ids(folder, tokenizer),
    )
    examples, report = encode(train)
    say(f"train: {report.describe()}")
    val_examples: Sequence[SFTExample] = []
    if val:
        val_examples, report = encode(val)
        say(f"validation: {report.describe()}")
    return _train(config, device, folder, tokenizer, examples, val_examples, began)


def _train(
    config: SFTConfig,
    device: Device,
    folder: Path,
    tokenizer: object,
    examples: Sequence[SFTExample],
    val: Sequence[SFTExample],
    began: float,
) -> SFTResult:
    trainer, data = config.trainer, config.data
    sampler = PromptSampler(len(examples), data.train_batch_size, shuffle=data.shuffle, seed=data.seed)
    plan = make_sft_plan(config, len(examples))
    total = plan.total_steps
    run_folder = Path(str(trainer.default_local_dir))
    store = CheckpointStore(run_folder, trainer.max_ckpt_to_keep, warn=lambda text: say(f"warning: {text}"))
    start = find_start(store, mode=trainer.resume_mode, resume_from_path=trainer.resume_from_path, say=say)
    require_work(start, total)
    model = _load(config, plan, device, start, folder)
    check_vocabulary(model.model, tokenizer)
    model.model.check_length(data.max_length)
    say(_summary(config, model, device, len(examples), total, run_folder))
    loggers = make_loggers(
        trainer.logger,
        run_folder,
        trainer.project_name,
        trainer.experiment_name,
        config_dict(config),
        total_steps=total,
        start_step=start.step,
    )
    keep_config(config, run_folder)
    # Without a frequency the model is saved once, at the end: a fine-tuned model that is not written is no result.
    schedule = Schedule(total, trainer.save_freq if trainer.save_freq > 0 else total, trainer.test_freq)
    run = SFTRun(model, tokenizer, val, store, loggers, sampler.steps_per_epoch, schedule, {})
    step = SFTStep(model, examples, sampler, Timer())
    with loggers:
        run_steps(step, step.timed, schedule, run, start.step)
    model_folder = run_folder / f"global_step_{total}" / "actor"
    say(f"finished: {total} steps in {duration(time.perf_counter() - began)}; the model is in {model_folder}")
    return SFTResult(model_folder, run.history)


def _load(config: SFTConfig, plan: SFTPlan, device: Device, start: Start, folder: Path) -> Supervised:
    model = Supervised(
        load_causal_lm(
            start.folder("actor", folder),
            trust_remote_code=config.model.trust_remote_code,
            override_config=dict(config.model.override_config),
        ),
        compute=build.compute_settings(config.engine.dtype, device, config.model.enable_gradient_checkpointing),
        optim=build.optim_settings(config.optim, total_steps=plan.total_steps, warmup_steps=plan.warmup_steps),
        micro=build.micro_batches(config.data.micro_batch_size_per_gpu, None, config.data.max_token_len_per_gpu),
    )
    if start.checkpoint is not None:
        model.load_optimizer(start.checkpoint / "actor")
    return model


def _summary(
    config: SFTConfig, model: Supervised, device: Device, num_examples: int, total: int, run_folder: Path
) -> str:
    rows = [
        ("device", device.describe()),
        ("model", f"{config.model.path}: {count(count_parameters(model))}"),
        ("compute", f"{model.compute.dtype} over float32 weights"),
        ("steps", f"{total} of {config.data.train_batch_size} samples, {num_examples} samples in all"),
        ("run folder", str(run_folder)),
    ]
    return table(f"steepest {steepest.__version__}, supervised fine-tuning", rows)
