"""The `steepest` command. Each sub-command imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from steepest import __version__
from steepest.process.entry import guarded, leave, run_entry
from steepest.process.streams import protect_streams

if TYPE_CHECKING:
    from steepest.data.files import WrittenFile

# --help too is the job's: it knows the keys
PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    name="steepest",
    help="Reinforcement-learning post-training for language models. Start with: steepest quickstart",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
)
prepare = typer.Typer(help="Write a data set as train.parquet and test.parquet.", no_args_is_help=True)
app.add_typer(prepare, name="prepare")
rewards = typer.Typer(help="Look at reward functions before a run trusts them.", no_args_is_help=True)
app.add_typer(rewards, name="rewards")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"steepest {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options before a sub-command."""


@app.command()
def quickstart(
    seed: Annotated[int, typer.Option(help="Of the data, the model and the training.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where data, models and logs go.")] = Path("outputs/quickstart"),
    algorithm: Annotated[str, typer.Option(help="ppo, or a preset: grpo, rloo, dapo, gspo, ...")] = "ppo",
) -> None:
    """Train a tiny model from nothing by PPO on this machine's CPU, in minutes and without any download.

    Makes word problems in GSM8K's format and a tiny model, warms it up by supervised training, then runs the real
    PPO trainer and prints the accuracy before and after.

    Example: [bold]steepest quickstart --seed 1[/bold]
    """

    def call() -> int | None:
        from steepest.trainer.jobs.quickstart import main as run

        return run(seed=seed, folder=folder, algorithm=algorithm)

    raise typer.Exit(guarded(call))


@app.command(context_settings=PASS_THROUGH)
def ppo(context: typer.Context) -> None:
    """Train a model by PPO, GRPO or another estimator. Takes configuration keys, like steepest.trainer.main_ppo.

    Example: [bold]steepest ppo data.train_files=gsm8k/train.parquet data.val_files=gsm8k/test.parquet
    actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct trainer.total_training_steps=10[/bold]

    [bold]steepest ppo --help[/bold] prints the important keys, [bold]--help-all[/bold] all of them;
    [bold]--config my.yaml[/bold] takes them from a file.
    """

    def call(argv: list[str]) -> int | None:
        from steepest.trainer.main_ppo import main as run

        return run(argv)

    raise typer.Exit(run_entry(call, context.args))


@app.command(context_settings=PASS_THROUGH)
def preflight(context: typer.Context) -> None:
    """Look at a job before it runs: prompts, answers, scores, one step, memory, disk, time. Takes the keys of ppo.

    Nothing is written into the run folder. Exit code 0 without a problem, 1 with one; warnings do not count.
    [bold]--json[/bold] prints one JSON object.

    Example: [bold]steepest preflight data.train_files=gsm8k/train.parquet data.val_files=gsm8k/test.parquet
    actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct[/bold]
    """

    def call(argv: list[str]) -> int:
        from steepest.trainer.main_preflight import main as run

        return run(argv)

    raise typer.Exit(run_entry(call, context.args))


@app.command(context_settings=PASS_THROUGH)
def sft(context: typer.Context) -> None:
    """Train a model on answers (supervised). Takes configuration keys, like steepest.trainer.main_sft.

    Example: [bold]steepest sft data.train_files=gsm8k/train.parquet model.path=Qwen/Qwen2.5-0.5B-Instruct[/bold]

    [bold]steepest sft --help[/bold] prints the important keys, [bold]--help-all[/bold] all of them;
    [bold]--config my.yaml[/bold] takes them from a file.
    """

    def call(argv: list[str]) -> int | None:
        from steepest.trainer.main_sft import main as run

        return run(argv)

    raise typer.Exit(run_entry(call, context.args))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="Run folder, checkpoint (global_step_N), or folder of an adapter.")],
    to: Annotated[Path, typer.Option(help="Folder to write; it must be empty or new.")],
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, not merged.")] = False,
    base: Annotated[str | None, typer.Option(help="The adapter's base model, if it was moved.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that comes with the base model.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="dtype of the weights; default: that of the model that the run began with."),
    ] = None,
) -> None:
    """Write a trained policy as a Hugging Face folder that other programs load. A LoRA adapter is merged.

    Given a run folder, it takes the newest checkpoint; for another checkpoint give the folder of that checkpoint.

    Example: [bold]steepest export checkpoints/steepest/ppo --to my-model[/bold]
    """

    def call() -> None:
        from steepest.trainer.jobs.export import export as run

        made = run(source, to, as_adapter=adapter, base=base, trust_remote_code=trust_remote_code, dtype=dtype)
        typer.echo(f"wrote {made}")

    raise typer.Exit(guarded(call))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of PPO or SFT; also of one that goes on.")],
    to: Annotated[Path | None, typer.Option(help="File to write; default: report.html in the run folder.")] = None,
) -> None:
    """Write report.html: the curves, samples and configuration of a run on one page that needs no network.

    A PPO run writes it itself, every trainer.report_freq steps.

    Example: [bold]steepest report checkpoints/steepest/ppo[/bold]
    """

    def call() -> None:
        from steepest.report import write_report

        typer.echo(f"wrote {write_report(folder, to)}")

    raise typer.Exit(guarded(call))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of 2 to 6 runs.")],
    to: Annotated[Path, typer.Option(help="File to write.")] = Path("compare.html"),
) -> None:
    """Write one page about several runs: what their keys differ in, curves over each other, answers side by side.

    Example: [bold]steepest compare checkpoints/steepest/ppo checkpoints/steepest/grpo[/bold]
    """

    def call() -> None:
        from steepest.report.compare import write_comparison

        typer.echo(f"wrote {write_comparison(folders, to)}")

    raise typer.Exit(guarded(call))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def sweep(
    context: typer.Context,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0,1,2",
    folder: Annotated[Path, typer.Option(help="Where the runs, their output and the record go.")] = Path("sweep"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON and nothing else.")] = False,
) -> None:
    """Run a PPO job by several seeds, and for each of several values of some keys; then mean and interval.

    Takes the keys of steepest ppo. A key with values behind commas varies. The same command goes on after a stop.

    Example: [bold]steepest sweep --seeds 0,1,2,3,4 --folder sweeps/lr --config-name grpo data.train_files=train.parquet
    data.val_files=test.parquet actor_rollout_ref.model.path=my-model actor_rollout_ref.actor.optim.lr=1e-6,3e-6[/bold]
    """

    def call() -> int:
        from steepest.trainer.jobs.sweep import check, plan, run_sweep, seeds_of, table

        runs = plan(context.args, seeds_of(seeds), folder)
        check(runs)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            outcomes = run_sweep(runs, folder)
        typer.echo(json.dumps([vars(one) for one in outcomes], indent=1) if as_json else table(outcomes))
        return int(any(one.exit_code for one in outcomes))

    raise typer.Exit(guarded(call))


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, of PPO or SFT.")],
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print it once; so does a pipe.")] = False,
) -> None:
    """Show a run on the terminal while it trains: curves, health, the newest answers. Ctrl-C ends it, not the run.

    Example: [bold]steepest watch checkpoints/steepest/ppo[/bold]
    """

    def call() -> None:
        from rich.console import Console

        from steepest.report.watch import snapshot
        from steepest.report.watch import watch as run

        console = Console()
        if once or not console.is_terminal:
            typer.echo(snapshot(folder, console))
            return
        with suppress(KeyboardInterrupt):
            run(folder, console, interval=interval)

    raise typer.Exit(guarded(call))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Run folder, checkpoint (global_step_N), model folder or hub id.")],
    compare: Annotated[
        str | None, typer.Option(help="Another one, on the same prompts: the difference, with a paired test.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses a prompt, at temperature 1: adds pass@k and maj@n.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File for the responses, JSON lines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")] = False,
) -> None:
    """Score a checkpoint or a model on validation data, by the prompts, grader and engine of its run.

    Settings follow as key=value; of a run they change its own. A model needs data.val_files.

    Example: [bold]steepest evaluate checkpoints/steepest/ppo --samples 8 --compare Qwen/Qwen2.5-0.5B-Instruct[/bold]
    """

    def call() -> None:
        from steepest.trainer.main_evaluate import main as run

        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            result = run(source, context.args, other=compare, samples=samples, output=output)
        from steepest.trainer.jobs.evaluate import table

        typer.echo(json.dumps(result, indent=1) if as_json else table(result))

    raise typer.Exit(guarded(call))


def _tell(written: Mapping[str, WrittenFile]) -> None:
    for file in written.values():
        typer.echo(f"wrote {file.path} ({file.num_rows:,} rows)")


@prepare.command("gsm8k")
def prepare_gsm8k(
    save_dir: Annotated[
        Path, typer.Option("--local-save-dir", "--local_save_dir", "--save-dir", help="Folder of the files written.")
    ] = Path("data/gsm8k"),
    local_path: Annotated[
        Path | None,
        typer.Option(
            "--local-dataset-path",
            "--local_dataset_path",
            help="Folder with GSM8K's own train.jsonl and test.jsonl; without it, the hub is asked.",
        ),
    ] = None,
    hub: Annotated[
        Literal["huggingface", "modelscope"] | None,
        typer.Option(help="Where to download from; default huggingface, or modelscope with VERL_USE_MODELSCOPE=True."),
    ] = None,
) -> None:
    """GSM8K, the grade-school problems of the reference job.

    Example: [bold]steepest prepare gsm8k --local-save-dir data/gsm8k[/bold]
    """

    def call() -> None:
        from steepest.data.prepare.gsm8k import prepare_gsm8k as run

        _tell(run(save_dir, local_path, hub))

    raise typer.Exit(guarded(call))


@prepare.command("arithmetic")
def prepare_arithmetic(
    save_dir: Annotated[
        Path, typer.Option("--local-save-dir", "--local_save_dir", "--save-dir", help="Folder of the files written.")
    ] = Path("data/arithmetic"),
    num_train: Annotated[int, typer.Option(min=1, help="Problems to train on.")] = 4096,
    num_test: Annotated[int, typer.Option(min=1, help="Held-out problems.")] = 512,
    num_sft: Annotated[int, typer.Option(min=1, help="Demonstrations for a supervised warm-up.")] = 8192,
    seed: Annotated[int, typer.Option(help="Of the generator.")] = 0,
    right_share: Annotated[float, typer.Option(min=0, max=1, help="Share of demonstrations that are right.")] = 0.4,
) -> None:
    """Word problems of two and three steps from a seeded generator, in GSM8K's format. No download.

    Example: [bold]steepest prepare arithmetic --local-save-dir data/arithmetic --num-train 1000[/bold]
    """

    def call() -> None:
        from steepest.data.prepare.arithmetic import prepare_arithmetic as run

        counts = {"num_train": num_train, "num_test": num_test, "num_sft": num_sft}
        _tell(run(save_dir, **counts, seed=seed, right_share=right_share))

    raise typer.Exit(guarded(call))


@rewards.command("check")
def rewards_check(
    name: Annotated[
        str, typer.Argument(help="gsm8k, math, multiple_choice, exact, numeric, a data_source, or file.py:function.")
    ],
    mode: Annotated[str | None, typer.Option(help="Of gsm8k: strict (default) or flexible.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="JSON lines with answer, truth and right; default: the grader's own.")
    ] = None,
) -> None:
    """Run a grader over hard answers that people have judged; print where it is wrong, and how often.

    Example: [bold]steepest rewards check gsm8k --mode flexible[/bold]
    """

    def call() -> None:
        from steepest.errors import key_names
        from steepest.rewards.check import check, describe

        with key_names({"reward_functions": "NAME"}):
            typer.echo(describe(check(name, mode=mode, corpus=corpus)))

    raise typer.Exit(guarded(call))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """Look at this machine, its devices, packages, engines and hubs, and print what is wrong and how to fix it.

    Exit code 0 without a problem, 1 with one. Warnings do not count.

    Example: [bold]steepest doctor[/bold]
    """

    def call() -> int:
        from steepest.doctor.command import main as run

        return run(as_json=as_json)

    raise typer.Exit(guarded(call))


def main() -> None:
    """The console script."""
    protect_streams()  # before typer prints a help
    try:
        app(prog_name="steepest")
    except SystemExit as end:
        if isinstance(end.code, int):
            leave(end.code)
        raise


if __name__ == "__main__":
    main()
