"""Attention, memory and the device in whole runs: what is asked for, what is said, what runs out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from steepest.assembly.compute import check_attention
from steepest.config.key_names import PPO_KEYS
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.devices import MemoryStats
from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import render
from steepest.models.causal_lm import CausalLM
from steepest.process.entry import run_entry
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.loop import Timer
from steepest.trainer.main_ppo import main
from steepest.trainer.main_sft import main as main_sft
from steepest.trainer.run.metrics import memory_metrics
from tests.support.machine import only_installed
from tests.support.toy_run import make_toy, toy_overrides
from tests.trainer.run.test_resume import weights

KEY = "actor_rollout_ref.model.override_config.attn_implementation"
SHORT = (
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), num_rows=256)


def test_the_summary_says_which_attention_and_why(toy, tmp_path, capsys):
    run_ppo(load_config(toy_overrides(toy, tmp_path, *SHORT, f"+{KEY}=sdpa")))
    assert (
        f"  attention   actor sdpa, on packed sequences (asked for by {KEY}); critic sdpa, on packed sequences "
        "(cpu has no fused attention for packed sequences)\n"
    ) in capsys.readouterr().out
    assert "attn_implementation" not in (tmp_path / "global_step_2/actor/config.json").read_text()


def unreadable(folder: Path) -> str:
    """A file of rows that would be an error, if it were read."""
    (folder / "rows.parquet").write_text("no rows")
    return f"data.train_files={folder}/rows.parquet"


@pytest.mark.parametrize("section", ["actor_rollout_ref.model", "critic.model"])
@pytest.mark.parametrize(
    ("asked", "words"),
    [("flash_attention_2", "it cannot run here: cpu has no fused"), ("flash", "Known: flash_attention_2, sdpa")],
)
def test_an_attention_that_cannot_run_ends_the_run_before_a_row_is_read(toy, tmp_path, capsys, section, asked, words):
    key = f"{section}.override_config.attn_implementation"
    argv = [*toy_overrides(toy, tmp_path / "run", *SHORT, f"+{key}={asked}"), unreadable(tmp_path)]
    assert run_entry(main, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {key}={asked}: ") and words in said


def test_an_engine_that_is_not_installed_ends_the_run_before_a_row_is_read(toy, tmp_path, capsys, monkeypatch):
    only_installed(monkeypatch, tmp_path / "none")
    argv = [*toy_overrides(toy, tmp_path / "run", *SHORT, "actor_rollout_ref.rollout.name=vllm")]
    assert run_entry(main, [*argv, unreadable(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: actor_rollout_ref.rollout.name=vllm: vLLM is not installed; ")


def test_sft_has_the_same_key(toy, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "response": f" {i}"}) + "\n" for i in range(8)))
    argv = [f"data.train_files={rows}", f"model.path={toy['model']}", "data.train_batch_size=4", "data.max_length=32"]
    argv += [
        f"trainer.default_local_dir={tmp_path / 'run'}",
        "trainer.device=cpu",
        "trainer.total_training_steps=1",
        "trainer.logger=jsonl",
    ]
    key = "model.override_config.attn_implementation"
    assert run_entry(main_sft, [*argv, f"+{key}=eager"]) == 2
    assert f"error: {key}=eager: no such attention" in capsys.readouterr().err
    assert run_entry(main_sft, [*argv, f"+{key}=sdpa"]) == 0
    assert f"  attention   sdpa, on packed sequences (asked for by {key})\n" in capsys.readouterr().out
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["perf/max_memory_gb"] > 0.05


class Fused(CPUDevice):
    """A CPU that claims a fused attention for bf16."""

    def varlen_attention(self, dtype):
        return (object() if dtype == torch.bfloat16 else None), "the reason"


def test_each_model_is_asked_about_in_its_own_dtype(toy, tmp_path):
    from steepest.assembly.compute import attention

    config = load_config(toy_overrides(toy, tmp_path))
    for dtype, name in (("float32", "sdpa"), ("bfloat16", "flash_attention_2")):
        found = attention(config.critic.model, "critic.model", dtype, Fused())
        key = "critic.model.override_config.attn_implementation"
        assert (found.name, found.why, found.key) == (name, "the reason", key)
    check_attention(config, Fused())


def test_memory_of_a_card_has_verls_names_too():
    class Card(CPUDevice):
        def memory(self, index=0):
            return MemoryStats(total=0, available=0, peak=3 * 2**30, peak_reserved=2**32)

    assert memory_metrics(Card()) == {
        "perf/max_memory_gb": 3.0,
        "perf/max_memory_allocated_gb": 3.0,
        "perf/max_memory_reserved_gb": 4.0,
    }
    assert set(memory_metrics(CPUDevice())) == {"perf/max_memory_gb"}


def test_a_part_of_a_step_ends_when_the_device_is_done():
    waited = []
    timer = Timer(lambda: waited.append(1))
    with timer("a"), timer("b"):
        pass
    assert len(waited) == 2 and set(timer.seconds) == {"a", "b"}
    with pytest.raises(ValueError), timer("c"):  # a device that failed is not waited for
        raise ValueError
    assert len(waited) == 2


def test_what_training_leaves_in_the_allocator_is_given_back_before_the_engine_wakes(toy, tmp_path):
    from types import SimpleNamespace

    from steepest.assembly.engine import frees_engine
    from steepest.assembly.roles import Roles
    from steepest.cluster.local import LocalCluster

    calls = []
    engine = SimpleNamespace(load_weights=lambda source, version: calls.append(f"load {source.model} {version}"))

    class Card(CPUDevice):
        def empty_cache(self):
            calls.append("empty_cache")

    def cluster(*more):
        config, device = load_config(toy_overrides(toy, tmp_path, *more)), Card()
        roles = Roles(SimpleNamespace(model="actor"), None, None, engine)
        return LocalCluster(roles, device, frees_engine=frees_engine(config, device))

    cluster("actor_rollout_ref.rollout.free_cache_engine=True").publish(3)
    assert calls == ["empty_cache", "load actor 3"]
    cluster().publish(4)
    assert calls[2:] == ["load actor 4"], "on a CPU the engine keeps its memory unless told"


def test_out_of_memory_ends_the_run_in_words_and_the_next_start_goes_on(toy, tmp_path, monkeypatch, capsys):
    run_ppo(load_config(toy_overrides(toy, tmp_path / "whole", *SHORT)))
    forward, passes = CausalLM.forward, []

    def full(self, request):
        passes.append(torch.is_grad_enabled())
        if sum(passes) == 4:  # two updates a step: the last one of step 2
            torch.empty(10**13)
        return forward(self, request)

    argv = toy_overrides(toy, tmp_path / "cut", *SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "forward", full)
        assert run_entry(main, argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: actor update: a micro-batch of 64 sequence(s), ") and "Traceback" not in said
    assert "out of memory on cpu, 37252.90 GiB more were asked for" in said
    assert "Lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu below " in said
    assert "or set actor_rollout_ref.model.enable_gradient_checkpointing=true" in said
    assert sorted(p.name for p in (tmp_path / "cut").glob("global_step_*")) == ["global_step_1"]
    assert run_entry(main, argv) == 0
    assert "resuming from step 1" in capsys.readouterr().out
    assert weights(tmp_path / "cut", 2) == weights(tmp_path / "whole", 2)


def test_the_key_that_is_named_is_the_one_that_counts(toy, tmp_path):
    """Of rows and tokens, in each pass of each model."""
    from steepest.assembly.roles import build_models
    from steepest.learner.checkpoint import FROM_NOTHING

    def keys(*more):
        config = load_config(toy_overrides(toy, tmp_path, *more))
        plan = make_plan(config, 256)
        folders = {"actor": toy["model"], "critic": toy["model"]}
        models = build_models(config, plan, FROM_NOTHING, folders, CPUDevice())
        assert models.critic is not None and models.reference is not None
        actor, critic, reference = models.actor, models.critic, models.reference
        passes = actor.settings.micro, actor.forward, critic.settings.micro, critic.forward, reference.forward
        return [render(micro.setting, PPO_KEYS).removeprefix("actor_rollout_ref.") for micro in passes]

    assert keys() == [
        "actor.ppo_max_token_len_per_gpu",
        "rollout.log_prob_max_token_len_per_gpu",
        "critic.ppo_max_token_len_per_gpu",
        "critic.forward_max_token_len_per_gpu",
        "ref.log_prob_max_token_len_per_gpu",
    ]
    rows = [
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=2",
        "critic.ppo_micro_batch_size_per_gpu=2",
        "critic.forward_micro_batch_size_per_gpu=2",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=2",
    ]
    assert keys(*rows) == [row.partition("=")[0].removeprefix("actor_rollout_ref.") for row in rows]
