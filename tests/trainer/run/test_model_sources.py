"""Models from a hub in a whole run: what was taken stands in the run folder, and a resumed run takes the same again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from steepest.config.load import load_config, load_sft_config
from steepest.errors import CheckpointError, ModelError
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.jobs.sft import run_sft
from steepest.trainer.run.folder import open_tokenizer
from steepest.trainer.run.model_sources import sources_of
from tests.support.fake_hub import FakeHub, Files, folder_files
from tests.support.hub_world import HUBS, file_path, turn_to, without_waiting
from tests.support.toy_run import make_toy, toy_overrides

ROOT = Path(__file__).parents[2]
ACTOR, CRITIC = "actor_rollout_ref.model.path", "critic.model.path"
SHORT = (
    "data.train_batch_size=16",
    "data.train_max_samples=64",
    "data.val_max_samples=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "algorithm.kl_ctrl.kl_coef=0.1",
    "trainer.save_freq=1",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=64)


@pytest.fixture(scope="module")
def model(toy: dict[str, Path]) -> Files:
    return folder_files(toy["model"])


@pytest.fixture
def hub(tmp_path: Path, model: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    without_waiting(monkeypatch)
    with FakeHub() as hub:
        hub.commit("models", "owner/tiny", model)
        turn_to(hub.url, tmp_path / "cache", monkeypatch)
        yield hub


def overrides(toy: dict[str, Path], folder: Path, hub: str, steps: int, *more: str) -> list[str]:
    return toy_overrides(
        {**toy, "model": Path("owner/tiny")},
        folder,
        *SHORT,
        f"actor_rollout_ref.model.hub={hub}",
        f"trainer.total_training_steps={steps}",
        *more,
    )


def with_other_weights(model: Files, folder: Path) -> Files:
    """The same files with negated weights, which are of the same size."""
    folder.mkdir()
    (folder / "old").write_bytes(model["model.safetensors"])
    save_file({name: -tensor for name, tensor in load_file(folder / "old").items()}, folder / "new", {"format": "pt"})
    return {**model, "model.safetensors": (folder / "new").read_bytes()}


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time", "timing", "perf"))} for row in rows]


@pytest.fixture(scope="module")
def local(toy: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The metrics of two steps with the model's folder."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run_ppo(load_config(toy_overrides(toy, folder, *SHORT, "trainer.total_training_steps=2")))
    assert not (folder / "models.json").exists()
    return metrics(folder)


@pytest.mark.parametrize("client", HUBS)
def test_a_run_with_a_model_from_a_hub_keeps_to_it_when_the_branch_moves(
    hub: FakeHub,
    toy: dict[str, Path],
    model: Files,
    local: list[dict[str, float]],
    tmp_path: Path,
    client: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    run_ppo(load_config(overrides(toy, folder, client, 1)))
    assert metrics(folder) == local[:2]
    (commit,) = hub.repositories["models", "owner/tiny"].commits
    pins = json.loads((folder / "models.json").read_text())
    assert list(pins) == [ACTOR, CRITIC] and pins[ACTOR] == pins[CRITIC]
    files = pins[ACTOR].pop("files")
    assert pins[ACTOR] == {"path": "owner/tiny", "hub": client, "revision": None, "commit": commit}
    assert set(files) == set(model)
    # downloading, downloaded; the critic's is the same model
    assert capsys.readouterr().out.count(f"commit {commit[:12]}, ") == 2
    assert len([asked for asked in hub.asked(file_path(client, "model.safetensors")) if asked.method == "GET"]) == 1

    hub.commit("models", "owner/tiny", with_other_weights(model, tmp_path / "other"))
    shutil.rmtree(tmp_path / "cache")
    before = (folder / "models.json").read_text()
    run_ppo(load_config(overrides(toy, folder, client, 2)))
    assert "has moved on" in capsys.readouterr().out
    assert metrics(folder) == local and (folder / "models.json").read_text() == before


def test_a_pin_that_cannot_be_had_ends_the_run(
    hub: FakeHub, toy: dict[str, Path], model: Files, local: list[dict[str, float]], tmp_path: Path
) -> None:
    words = overrides(toy, tmp_path / "run", "huggingface", 1)
    run_ppo(load_config(words))
    repository = hub.repositories["models", "owner/tiny"]
    hub.commit("models", "owner/tiny", with_other_weights(model, tmp_path / "other"))
    del repository.commits[next(iter(repository.commits))]
    shutil.rmtree(tmp_path / "cache")
    again = overrides(toy, tmp_path / "run", "huggingface", 2)
    with pytest.raises(ModelError, match=r"^actor_rollout_ref\.model\.path=owner/tiny: this run began with commit"):
        run_ppo(load_config(again))
    with pytest.raises(ModelError, match="this run began with commit"):  # also by the checkpoint's path
        there = f"trainer.resume_from_path={tmp_path}/run/global_step_1"
        run_ppo(
            load_config([*overrides(toy, tmp_path / "b", "huggingface", 2), "trainer.resume_mode=resume_path", there])
        )
    (tmp_path / "run" / "models.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"models\.json says which models this run began with"):
        run_ppo(load_config(again))
    run_ppo(load_config([*again, "trainer.resume_mode=disable"]))  # a run of its own takes what is there
    assert metrics(tmp_path / "run")[1] != local[1]
    assert json.loads((tmp_path / "run" / "models.json").read_text())[ACTOR]["commit"] == next(iter(repository.commits))


def test_a_tokenizer_of_its_own_is_fetched_without_weights_and_pinned(
    hub: FakeHub, toy: dict[str, Path], model: Files, tmp_path: Path
) -> None:
    hub.commit("models", "owner/words", {**model, "model.safetensors": b"never fetched"})
    key = "actor_rollout_ref.model.tokenizer_path"
    config = load_config(overrides(toy, tmp_path / "run", "modelscope", 1, f"{key}=owner/words"))
    sources = sources_of(config.trainer)
    node, section = config.actor_rollout_ref.model, "actor_rollout_ref.model"
    tokenizer = open_tokenizer(node, section, toy["model"], sources, trust_remote_code=False)
    assert tokenizer("say 7")["input_ids"] and not hub.asked(
        file_path("modelscope", "model.safetensors", "owner/words")
    )
    assert sources.pins[key].name == "owner/words"


def test_a_fault_names_the_key_and_the_critic_has_its_own(hub: FakeHub, toy: dict[str, Path], tmp_path: Path) -> None:
    critic = f"{CRITIC}=owner/missing"
    with pytest.raises(
        ModelError, match=r"^critic\.model\.path=owner/missing: .*have it: critic\.model\.hub=huggingface\."
    ):
        run_ppo(load_config(overrides(toy, tmp_path / "run", "modelscope", 1, critic)))


def test_supervised_fine_tuning_pins_too(hub: FakeHub, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say 1", "response": "1"}\n' * 8)
    words = [
        f"data.train_files={rows}",
        "data.train_batch_size=4",
        "data.max_length=32",
        "model.path=owner/tiny",
        "model.hub=modelscope",
        "trainer.device=cpu",
        "trainer.total_training_steps=1",
        f"trainer.default_local_dir={tmp_path / 'run'}",
    ]
    run_sft(load_sft_config(words))
    assert list(json.loads((tmp_path / "run" / "models.json").read_text())) == ["model.path"]
    with pytest.raises(
        ModelError, match=r"^model\.path=owner/nothing: .*Hugging Face may have it: model\.hub=huggingface\.$"
    ):
        run_sft(load_sft_config([*words, "model.path=owner/nothing"]))


@pytest.mark.parametrize("client", [HUBS[0], pytest.param(HUBS[1], marks=pytest.mark.slow)])
def test_the_command_with_the_settings_of_the_environment(
    toy: dict[str, Path], model: Files, tmp_path: Path, client: str
) -> None:
    """In a process of its own, where the clients read their variables themselves."""
    words = [word for word in overrides(toy, tmp_path / "run", client, 1) if ".hub=" not in word]
    settings = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "secret",
        "MODELSCOPE_CACHE": str(tmp_path / "ms"),
        "MODELSCOPE_API_TOKEN": "secret",
        "MODELSCOPE_HOME": str(tmp_path / "ms-home"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "VERL_USE_MODELSCOPE": str(client == "modelscope"),
    }
    with FakeHub() as hub:
        hub.token = "secret"
        hub.commit("models", "owner/tiny", model)
        settings |= {"HF_ENDPOINT": hub.url, "MODELSCOPE_ENDPOINT": hub.url}
        command = [sys.executable, "-m", "steepest.trainer.main_ppo", *words]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = "actor_rollout_ref.model.hub=modelscope: chosen by VERL_USE_MODELSCOPE=True in the environment."
    assert (chosen in done.stdout) == (client == "modelscope")
    assert list((tmp_path / ("hf" if client == "huggingface" else "ms")).rglob("model.safetensors"))
    assert not (tmp_path / ("ms" if client == "huggingface" else "hf")).exists()
