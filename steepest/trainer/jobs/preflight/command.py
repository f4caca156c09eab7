"""Preflight from configuration to report. It writes nothing but a checkpoint into a temporary folder."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from steepest.checks import problem
from steepest.config.key_names import PPO_KEYS
from steepest.config.schema import Config
from steepest.console import say
from steepest.errors import SteepestError, key_names
from steepest.learner.checkpoint import FROM_NOTHING
from steepest.process.start_timing import Laps
from steepest.progress import START
from steepest.trainer.experience.api import Experience
from steepest.trainer.jobs.ppo import Job, opened
from steepest.trainer.jobs.preflight.answers import answer_checks, shown_answers
from steepest.trainer.jobs.preflight.grader import grader_checks
from steepest.trainer.jobs.preflight.prompts import prompt_checks, shown_prompts
from steepest.trainer.jobs.preflight.report import Report
from steepest.trainer.jobs.preflight.resources import Measured, folder_for_trial, measure, predict, resource_checks
from steepest.trainer.jobs.preflight.step import Trial, save_and_load, step_checks, teaches

ANSWERS = 8
MORE = 4
"""The second part of a step has so many times the prompts of the first."""


@key_names(PPO_KEYS)
def preflight(config: Config, laps: Laps) -> Report:
    """Look at the job that the configuration describes. What it cannot get past ends the report as a problem."""
    report = Report()
    try:
        with opened(config, laps, Job) as job:
            _examine(job, report, laps)
    except SteepestError as error:
        line = problem("ends here", str(error), "correct this; the checks after it were not made")
        report.add(report.stage, [line])
    return report


def _examine(job: Job, report: Report, laps: Laps) -> None:
    report.prompts = shown_prompts(job)
    report.add("data", prompt_checks(job))
    report.stage = "reward"
    with START.activity("scoring the ground truths"):
        report.add(report.stage, grader_checks(job))
    report.stage = "models"
    with START.activity("loading the models and the engine"):
        cluster = job.start_cluster(FROM_NOTHING, laps)
    for note in cluster.describe().engine_notes:
        say(note)
    trial, n = Trial(job, cluster), job.config.actor_rollout_ref.rollout.n
    prompts = min(-(-ANSWERS // n), len(job.data.train), job.config.data.train_batch_size)
    report.stage = "answers"
    with START.activity("sampling answers"):
        experience = trial.collect(prompts)
    report.answers = shown_answers(experience, ANSWERS)
    report.add(report.stage, answer_checks(experience, n))
    report.stage = "step"
    with START.activity("learning from them"):
        made_up = not teaches(experience, n)
        if made_up:
            experience = trial.collect(prompts, made_up=True)
        small = _learn(trial, experience, report, made_up=made_up)
    more = min(MORE * prompts, len(job.data.train), job.config.data.train_batch_size)
    with START.activity("measuring a larger part of a step"):
        larger = trial.collect(more, made_up=made_up)
        trial.learn_from(larger)
        large = _measured(trial, larger)
    report.stage = "resources"
    with (
        START.activity("saving and loading a checkpoint"),
        TemporaryDirectory(prefix=".preflight-", dir=folder_for_trial(job)) as folder,
    ):
        saved = save_and_load(trial, experience.batch, Path(folder))
    micro = cluster.roles.actor.settings.micro
    report.prediction = predict(job, small, large, saved, micro)
    report.add(report.stage, [saved.check, *resource_checks(job, report.prediction)])


def _learn(trial: Trial, experience: Experience, report: Report, *, made_up: bool) -> Measured:
    lines = step_checks(trial, experience, made_up=made_up)
    report.add("step", lines)
    return _measured(trial, experience)


def _measured(trial: Trial, experience: Experience) -> Measured:
    seconds = {**trial.learn.timed.seconds, **experience.seconds}
    trial.learn.timed.flush()
    return measure(trial.job, experience.batch, seconds, trial.cluster.roles.actor.settings.micro)
