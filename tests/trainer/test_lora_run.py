"""Runs with LoRA: verl's keys, resume bit for bit, what is refused, what is exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from steepest.__main__ import app
from steepest.config.load import load_config, load_sft_config
from steepest.errors import CheckpointError, ModelError
from steepest.loggers.jsonl import read_metrics
from steepest.loggers.rows import read_rows
from steepest.trainer.jobs.export import export
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.jobs.sft import run_sft
from tests.support.toy_run import make_toy, toy_overrides

VERL = (
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.model.lora_alpha=16",
    "actor_rollout_ref.model.target_modules=all-linear",
    "actor_rollout_ref.rollout.load_format=safetensors",
    "actor_rollout_ref.rollout.layered_summon=True",
)
RUN = (
    *VERL,
    "trainer.total_training_steps=4",
    "trainer.save_freq=2",
    "trainer.test_freq=2",
    "data.train_batch_size=32",
    "data.train_max_samples=100",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.shuffle=True",
    "algorithm.kl_ctrl.kl_coef=0.1",
)
KINDS = {
    "own critic": (),
    "own adapter": ("critic.model.lora_rank=4",),
    "adapter": ("critic.share_base=adapter",),
    "head": ("critic.share_base=head",),
}
SLOWER = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("own critic", "adapter")]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory):
    """One run of each kind, made when first asked for."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("runs") / kind.replace(" ", "_")
            run_ppo(load_config(toy_overrides(toy, made[kind], *RUN, *KINDS[kind])))
        return made[kind]

    return run


def tensors(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / "global_step_4").rglob("*.safetensors"))
    return {f"{f.parent.name}/{f.name}/{k}": t.numpy().tobytes() for f in files for k, t in load_file(f).items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    rows = read_rows(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s", "perf/", "time"))} for row in rows]


@pytest.mark.parametrize("kind", [*SLOWER, "own adapter", "head"])
def test_resume_equals_no_resume(toy, runs, tmp_path, kind, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs(kind), folder)
    shutil.rmtree(folder / "global_step_4")
    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *KINDS[kind])))
    assert "resuming from step 2" in capsys.readouterr().out
    assert tensors(folder) == tensors(runs(kind)) and len(tensors(folder)) > 50
    assert metrics(folder) == metrics(runs(kind))


def test_what_a_checkpoint_holds(runs):
    actor = {"adapter_config.json", "adapter_model.safetensors", "base_model.json", "optimizer.json"}
    actor |= {"optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "base_model.json"}
    state = {"value_head.safetensors", "optimizer.json", "optimizer.safetensors"}
    for kind, critic in {"own adapter": adapter | state, "adapter": adapter | state, "head": state}.items():
        checkpoint = runs(kind) / "global_step_4"
        assert {p.name for p in (checkpoint / "actor").iterdir()} == actor
        assert {p.name for p in (checkpoint / "critic").iterdir()} == critic
    assert (runs("own critic") / "global_step_4" / "critic" / "model.safetensors").exists()
    assert json.loads((runs("head") / "best.json").read_text())["scores"].keys() == {"2", "4"}


def critic_work(row: dict[str, float]) -> float:
    """Operations of the critic's passes and updates in a step, over those of the actor's update."""
    critic = row["perf/mfu/critic"] * (row["timing_s/values"] + row["timing_s/update_critic"])
    return critic / (row["perf/mfu/actor"] * row["timing_s/update_actor"])


def test_a_head_reads_its_values_in_the_pass_of_the_reference(runs):
    """So the critic runs no model, and has no operations of its own; a critic of its own has about the actor's."""
    rows = {
        kind: [row for row in read_rows(runs(kind) / "metrics.jsonl") if "timing_s/ref" in row]
        for kind in ("head", "own critic")
    }
    assert [len(found) for found in rows.values()] == [4, 4]
    assert not any("perf/mfu/critic" in row for row in rows["head"])
    assert min(map(critic_work, rows["own critic"])) > 0.5
    assert all(row["critic/vf_loss"] > 0 for row in rows["head"])


@pytest.mark.parametrize("estimator", ["gae", "grpo"])
def test_without_a_reference_and_without_a_critic(toy, tmp_path, estimator):
    words = ["algorithm.kl_ctrl.kl_coef=0", "critic.share_base=head", "trainer.total_training_steps=2"]
    words += [f"algorithm.adv_estimator={estimator}", "actor_rollout_ref.rollout.n=2", "trainer.save_freq=0"]
    folder = tmp_path / "run"
    run_ppo(load_config(toy_overrides(toy, folder, *RUN, *words)))
    last = metrics(folder)[-2]
    assert ("critic/vf_loss" in last) == (estimator == "gae") and last["actor/grad_norm"] > 0


@pytest.mark.parametrize("kind", [*SLOWER, "head"])
def test_it_learns(toy, tmp_path, kind):
    words = ["trainer.total_training_steps=25", "trainer.test_freq=25", "trainer.save_freq=0"]
    words += ["actor_rollout_ref.actor.optim.lr=1e-2", "critic.optim.lr=5e-3"]
    done = run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *VERL, *KINDS[kind], *words)))
    assert done.history[0] < 0.3 and done.history[25] > 0.5


CHANGED = [
    ("adapter", ("actor_rollout_ref.model.lora_rank=4",), "actor_rollout_ref.model.lora_rank=4: the adapter in"),
    ("adapter", ("critic.share_base=head",), "holds no value head on a frozen base"),
    ("head", ("critic.share_base=adapter",), "holds no LoRA adapter"),
    ("head", ("critic.share_base=null",), "holds what a run with LoRA trained, and critic.model.lora_rank is 0"),
    ("own critic", ("actor_rollout_ref.model.lora_rank=0",), "and actor_rollout_ref.model.lora_rank is 0 now"),
]


@pytest.mark.parametrize(("kind", "words", "text"), CHANGED)
def test_a_run_does_not_go_on_as_another_kind(toy, runs, tmp_path, kind, words, text):
    folder = tmp_path / "run"
    shutil.copytree(runs(kind), folder)
    more = (*RUN, *KINDS[kind], *words, "trainer.total_training_steps=6")
    with pytest.raises(CheckpointError, match=text):
        run_ppo(load_config(toy_overrides(toy, folder, *more)))


def test_names_of_layers_that_are_not_there_end_the_run(toy, tmp_path):
    words = (*RUN, "actor_rollout_ref.model.target_modules=[q_proj,wq]")
    with pytest.raises(ModelError, match=r"target_modules=wq: .* There are: down_proj, gate_proj, k_proj"):
        run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *words)))


def logits(model, folder):
    ids = AutoTokenizer.from_pretrained(folder)("say 3", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits


def test_an_adapter_is_exported_merged_and_alone(toy, runs, tmp_path, capsys):
    checkpoint = runs("adapter") / "global_step_4" / "actor"
    base = AutoModelForCausalLM.from_pretrained(toy["model"])
    want = logits(PeftModel.from_pretrained(base, checkpoint), toy["model"])

    export(runs("adapter"), tmp_path / "merged")
    assert "the newest checkpoint" in capsys.readouterr().out
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    torch.testing.assert_close(merged, want, atol=1e-5, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(toy["model"])
    assert (merged - logits(base, toy["model"])).abs().max() > 1e-3
    assert not list((tmp_path / "merged").glob("adapter*")) and not list((tmp_path / "merged").glob("optimizer*"))

    export(runs("adapter") / "global_step_2", tmp_path / "alone", as_adapter=True)
    assert not list((tmp_path / "alone").glob("optimizer*"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(toy["model"]), tmp_path / "alone")
    assert not torch.equal(logits(again, toy["model"]), want)  # of step 2


def test_a_merged_model_is_a_start_like_any_other(toy, runs, tmp_path):
    export(runs("head"), tmp_path / "merged")
    words = ("trainer.val_only=True", f"actor_rollout_ref.model.path={tmp_path / 'merged'}")
    found = run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *words)))
    rows = read_rows(runs("head") / "metrics.jsonl")
    assert found.history[0] == next(row["val/accuracy"] for row in rows if row["step"] == 4 and "val/accuracy" in row)

    words = (words[0], f"actor_rollout_ref.model.path={runs('head') / 'global_step_4' / 'actor'}")
    with pytest.raises(ModelError, match=r"a LoRA adapter without its base model. Merge it first \(steepest export"):
        run_ppo(load_config(toy_overrides(toy, tmp_path / "other", *words)))


def test_a_whole_model_is_exported_without_its_optimizer(toy, tmp_path):
    words = ("trainer.total_training_steps=1", "trainer.save_freq=1", "data.train_batch_size=32")
    run = tmp_path / "run"
    run_ppo(load_config(toy_overrides(toy, run, *words, "actor_rollout_ref.actor.ppo_mini_batch_size=32")))
    export(run, tmp_path / "model")
    whole = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "model")
    actor = run / "global_step_1" / "actor"
    assert torch.equal(whole, logits(AutoModelForCausalLM.from_pretrained(actor), actor))
    assert not list((tmp_path / "model").glob("optimizer*"))
    with pytest.raises(CheckpointError, match="there is no adapter. Leave --adapter out"):
        export(run, tmp_path / "none", as_adapter=True)


def test_wrong_sources_and_targets(runs, tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        CheckpointError, match="no whole checkpoint and no model. Give the folder of a run that has saved one"
    ):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(CheckpointError, match="something is there already"):
        export(runs("head"), runs("head"))
    damaged = tmp_path / "global_step_4"
    shutil.copytree(runs("head") / "global_step_4", damaged)
    (damaged / "actor" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is damaged: actor/adapter_model.safetensors has 1 bytes"):
        export(damaged, tmp_path / "out")


def test_a_base_that_was_moved_is_named(toy, runs, tmp_path):
    adapter = tmp_path / "adapter"
    export(runs("head"), adapter, as_adapter=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"{tmp_path}/gone"}))
    with pytest.raises(ModelError, match=r"^--base.*there is no such folder"):
        export(adapter, tmp_path / "out")
    export(adapter, tmp_path / "out2", base=str(toy["model"]))
    assert (tmp_path / "out2" / "model.safetensors").exists()


def test_the_command_does_what_the_function_does(toy, runs, tmp_path, capsys):
    moved = export(runs("head"), tmp_path / "moved", as_adapter=True)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": f"{tmp_path}/gone"}))
    base = str(toy["model"])
    for number, (source, words, options) in enumerate([
        (runs("head"), [], {}),
        (runs("head"), ["--adapter"], {"as_adapter": True}),
        (moved, ["--base", base, "--trust-remote-code"], {"base": base, "trust_remote_code": True}),
    ]):  # fmt: skip
        ours, theirs = tmp_path / f"command{number}", tmp_path / f"function{number}"
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app(["export", str(source), "--to", str(ours), *words])
        assert ended.value.code == 0 and capsys.readouterr().out.endswith(f"wrote {ours}\n")
        export(source, theirs, **options)
        files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (ours, theirs)]
        assert files[0] == files[1] and files[0]


def test_supervised_fine_tuning_of_an_adapter(toy, tmp_path):
    rows = [{"prompt": f"say {i % 10}", "response": str(i % 10)} for i in range(64)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train_files={tmp_path}/sft.jsonl", f"data.val_files={tmp_path}/sft.jsonl"]
    words += ["data.train_batch_size=16", "data.max_length=32", f"model.path={toy['model']}", "model.lora_rank=8"]
    words += ["optim.lr=1e-2", "trainer.logger=jsonl", "trainer.test_freq=2", "trainer.save_freq=2"]
    run = tmp_path / "run"
    done = run_sft(load_sft_config([*words, "trainer.total_epochs=2", f"trainer.default_local_dir={run}"]))
    assert done.history[8] < 0.7 * done.history[2]
    want = load_file(done.model / "adapter_model.safetensors")
    for step in (4, 6, 8):
        shutil.rmtree(run / f"global_step_{step}")
    run_sft(load_sft_config([*words, "trainer.total_epochs=2", f"trainer.default_local_dir={run}"]))
    again = load_file(done.model / "adapter_model.safetensors")
    assert all(torch.equal(again[name], want[name]) for name in want)
    export(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").exists()


@pytest.mark.parametrize("kind", [*SLOWER, "head"])
def test_it_runs_in_half_precision(toy, tmp_path, kind):
    words = ["trainer.total_training_steps=2", "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16"]
    done = run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *VERL, *KINDS[kind], *words)))
    assert read_metrics(done.folder / "metrics.jsonl")[2]["actor/grad_norm"] > 0
