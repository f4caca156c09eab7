"""A run that is cut anywhere and started again ends with the same weights, bit for bit, as one that never stopped."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from steepest.config.load import load_config
from steepest.learner.checkpoint import CheckpointStore
from steepest.loggers.rows import read_rows
from steepest.trainer.jobs.ppo import run_ppo
from tests.support.toy_run import make_toy, toy_overrides

# Everything that has a state: adaptive KL, several epochs, shuffled mini-batches, warm-up and cosine, critic warm-up.
STATEFUL = (
    "trainer.total_training_steps=6",
    "trainer.save_freq=2",
    "trainer.test_freq=2",
    "data.train_batch_size=32",
    "data.train_max_samples=100",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_epochs=2",
    "actor_rollout_ref.actor.shuffle=True",
    "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=1",
    "algorithm.kl_ctrl.type=adaptive",
    "algorithm.kl_ctrl.kl_coef=0.1",
    "algorithm.kl_ctrl.horizon=100",
    "trainer.critic_warmup=1",
)

SAMPLES = ("trainer.log_val_generations=3",)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def unbroken(toy, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL, *SAMPLES)))
    return folder


def weights(folder: Path, step: int = 6) -> dict[str, bytes]:
    """Every tensor of actor, critic and their optimizers, as bytes."""
    found = {}
    for model in ("actor", "critic"):
        for file in ("model.safetensors", "optimizer.safetensors"):
            tensors = load_file(folder / f"global_step_{step}" / model / file)
            found |= {f"{model}/{file}/{name}": t.numpy().tobytes() for name, t in tensors.items()}
    assert len(found) > 100
    return found


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what a clock or the memory says."""
    rows = []
    for row in read_rows(folder / "metrics.jsonl"):
        rows.append({k: v for k, v in row.items() if not k.startswith(("timing_s", "perf/", "time"))})
    return rows


@pytest.mark.parametrize("left", [2, 4])
def test_resume_equals_no_resume(toy, unbroken, tmp_path, left, capsys):
    # the state that a kill leaves after step `left`: with 3 steps an epoch, one in an epoch and one past its boundary
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    for step in (2, 4, 6):
        if step > left:
            shutil.rmtree(folder / f"global_step_{step}")
    dtype = "actor_rollout_ref.actor.fsdp_config.dtype"  # that of the first start is kept, whatever the device has
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL, f"{dtype}=auto")))
    said = capsys.readouterr().out
    assert f"resuming from step {left}" in said and f"{dtype}: float32 ->" not in said
    assert f"  dtype       float32: as at the run's last start. {dtype} gives another.\n" in said
    assert weights(folder) == weights(unbroken)
    assert metrics(folder) == metrics(unbroken)
    samples = (folder / "token_samples.jsonl").read_text()  # of steps 1 and 6; the latter is done again
    assert samples == (unbroken / "token_samples.jsonl").read_text() and samples.count('{"step": 6') == 4


def test_resume_on_the_boundary_of_an_epoch(toy, unbroken, tmp_path, capsys):
    # three steps an epoch: step 4 begins the second one with an order of its own
    folder, words = tmp_path / "run", (*STATEFUL, "trainer.save_freq=3")
    run_ppo(load_config(toy_overrides(toy, folder, *words)))
    shutil.rmtree(folder / "global_step_6")
    run_ppo(load_config(toy_overrides(toy, folder, *words)))
    assert "resuming from step 3" in capsys.readouterr().out
    assert weights(folder) == weights(unbroken)


@pytest.mark.parametrize("step", [2, 6])
def test_a_validation_that_a_kill_cut_off_is_made_up_for(toy, unbroken, tmp_path, step):
    """What a kill leaves that comes after `step` was saved: the small files and pruning of the step before, half of its
    samples, no score and no row of its validation. In the middle of the run and at its end."""
    folder, words = tmp_path / "run", (*STATEFUL, *SAMPLES, f"trainer.validation_data_dir={tmp_path / 'answers'}")
    shutil.copytree(unbroken, folder)
    for later in range(step + 2, 7, 2):
        shutil.rmtree(folder / f"global_step_{later}")
    rows = list(read_rows(folder / "metrics.jsonl"))
    kept = [row for row in rows if row["step"] <= step and not ("val/accuracy" in row and row["step"] == step)]
    assert len(kept) == sum(row["step"] <= step for row in rows) - 1
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    wanted = [line for line in lines if json.loads(line)["step"] <= step]
    (folder / "samples.jsonl").write_text("".join(wanted[:-1]))
    best = json.loads((folder / "best.json").read_text())
    scores = {key: value for key, value in best["scores"].items() if int(key) < step}
    (folder / "best.json").write_text(json.dumps({"step": None, "score": None, "scores": scores}))
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{step - 2}\n")
    result = run_ppo(load_config(toy_overrides(toy, folder, *words, "trainer.max_actor_ckpt_to_keep=1")))
    assert sorted(result.history) == [0, 2, 4, 6]
    assert metrics(folder) == metrics(unbroken) and (folder / "samples.jsonl").read_text() == "".join(lines)
    assert json.loads((folder / "best.json").read_text())["scores"] == best["scores"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    assert (tmp_path / "answers" / f"{step}.jsonl").exists()
    assert CheckpointStore(folder).steps() == sorted({6, best["step"]})


def test_a_row_that_a_kill_cut_off_is_made_up_for(toy, unbroken, tmp_path):
    """A step's row is written after its checkpoint; a kill between the two must not leave a gap."""
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "global_step_6")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = [line for line in lines if json.loads(line)["step"] < 4]
    (folder / "metrics.jsonl").write_text("".join(before))
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL)))
    assert metrics(folder) == metrics(unbroken)
    timed = [{k for k in row if k.startswith(("timing_s", "perf/"))} for row in read_rows(folder / "metrics.jsonl")]
    whole = [{k for k in row if k.startswith(("timing_s", "perf/"))} for row in read_rows(unbroken / "metrics.jsonl")]
    place = len(before)
    assert timed[:place] + timed[place + 1 :] == whole[:place] + whole[place + 1 :]
    assert timed[place] == whole[place] - {"timing_s/save_checkpoint"}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(toy, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    victim = folder / "global_step_6" / "critic" / "model.safetensors"
    victim.write_bytes(victim.read_bytes()[:-7])
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL)))
    said = capsys.readouterr().out
    assert "global_step_6 is damaged" in said and "critic/model.safetensors" in said
    assert "resuming from step 4" in said
    assert weights(folder) == weights(unbroken)


def test_a_finished_run_says_so_and_changes_nothing(toy, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL)))
    assert "the run is finished: it stands at step 6 and trainer.total_training_steps is 6." in capsys.readouterr().out
    assert sorted(result.history) == [0, 2, 4, 6]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_disable_starts_afresh_and_keeps_the_earlier_run(toy, unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL, "trainer.resume_mode=disable")))
    assert weights(folder) == weights(unbroken)
    assert weights(tmp_path / "run.old-1") == weights(unbroken)


def test_resume_path_goes_on_from_the_named_checkpoint(toy, unbroken, tmp_path, capsys):
    source = unbroken / "global_step_4"
    run_ppo(
        load_config(
            toy_overrides(
                toy,
                tmp_path / "run",
                *STATEFUL,
                "trainer.resume_mode=resume_path",
                f"trainer.resume_from_path={source}",
            )
        )
    )
    assert "resuming from step 4" in capsys.readouterr().out
    assert weights(tmp_path / "run") == weights(unbroken)


def test_a_changed_key_is_told_when_a_run_goes_on(toy, unbroken, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "global_step_6")
    run_ppo(load_config(toy_overrides(toy, folder, *STATEFUL, "algorithm.gamma=0.5")))
    assert "algorithm.gamma: 1.0 -> 0.5" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_minus_nine_at_a_random_moment(toy, tmp_path, seed):
    """Real processes, real SIGKILL: started again until done, the end is that of the run nobody killed."""
    draw = random.Random(seed)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-m", "steepest.trainer.main_ppo", *toy_overrides(toy, folder, *STATEFUL)]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), env=environment, check=True, stdout=subprocess.DEVNULL)
    whole_seconds = time.monotonic() - began
    folder, num_kills = tmp_path / "killed", 0
    while not (folder / "global_step_6").is_dir():
        process = subprocess.Popen(command(folder), env=environment, stdout=subprocess.DEVNULL)
        if num_kills < 4:
            time.sleep(draw.uniform(0.3, 1.1) * whole_seconds)
            process.send_signal(signal.SIGKILL)
            num_kills += 1
        process.wait()
    assert num_kills >= 1
    assert weights(folder) == weights(tmp_path / "whole")
