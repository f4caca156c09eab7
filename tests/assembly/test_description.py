"""Sixteen bytes a trained parameter, four a frozen one, two a frozen matrix in bf16, and a shared base once."""

from __future__ import annotations

import pytest
from steepest.trainer.run.sizes import sizes

from steepest.assembly.roles import build_models
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.devices.backends.cpu import CPUDevice
from steepest.learner.checkpoint import FROM_NOTHING
from steepest.trainer.run.summary import count, start_summary
from tests.trainer.toy import make_toy, toy_overrides


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"))


def built(toy, tmp_path, *words):
    config = load_config(toy_overrides(toy, tmp_path, *words))
    plan = make_plan(config, 256)
    folders = {"actor": toy["model"], "critic": toy["model"]}
    return config, plan, build_models(config, plan, FROM_NOTHING, folders, CPUDevice())


def adapter_size(toy, rank):
    """By hand: rank times inputs plus outputs, of 2 layers with hidden 32, keys 16, MLP 64."""
    return 2 * rank * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)


HEAD = 33
DEEP = 32 * 32 + 32 + 33
LORA = "actor_rollout_ref.model.lora_rank=4"


@pytest.mark.parametrize("words", [(), (LORA,), (LORA, "critic.share_base=adapter"), (LORA, "critic.share_base=head")])
def test_what_is_held(toy, tmp_path, words):
    found = sizes(built(toy, tmp_path, *words)[2])
    small = adapter_size(toy, 4)
    base = found["reference"].parameters if not words else found["actor"].parameters - small
    whole = 16 * base, 16 * (base + HEAD), 4 * base
    actor, critic, reference = (found[role].bytes for role in ("actor", "critic", "reference"))
    if not words:
        assert (actor, critic, reference) == whole
        return
    assert actor == 4 * base + 16 * small and reference == 0
    assert (
        critic
        == {0: whole[1], 1: 16 * (small + HEAD), 2: 16 * DEEP}[
            ["", "critic.share_base=adapter", "critic.share_base=head"].index(words[-1] if len(words) > 1 else "")
        ]
    )


def test_a_critic_under_an_adapter_of_its_own(toy, tmp_path):
    found = sizes(built(toy, tmp_path, LORA, "critic.model.lora_rank=2")[2])
    base, small = found["actor"].parameters - adapter_size(toy, 4), adapter_size(toy, 2)
    assert found["critic"].bytes == 4 * base + 16 * (small + HEAD)
    assert not found["critic"].shares_base and found["critic"].trained == small + HEAD


def test_matrices_in_bf16(toy, tmp_path):
    words = (LORA, "critic.share_base=head", "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16")
    engine = "actor_rollout_ref.rollout.name"
    whole = sizes(built(toy, tmp_path, *words[:2])[2])
    half = sizes(built(toy, tmp_path, *words, f"{engine}=vllm")[2])
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    assert whole["actor"].bytes - half["actor"].bytes == 2 * matrices
    assert half["actor"].halved and not whole["actor"].halved
    for name in ("builtin", "hf"):  # they run or look at the modules themselves
        plain = sizes(built(toy, tmp_path, *words, f"{engine}={name}")[2])
        assert plain["actor"].bytes == whole["actor"].bytes


def test_the_summary_says_it(toy, tmp_path):
    config, plan, models = built(toy, tmp_path, LORA, "critic.share_base=adapter")
    text = start_summary(config, plan, (), CPUDevice(), models, "x", engine_copy_bytes=3 * 2**29)
    assert "rollout weights 1.50" in text
    small = adapter_size(toy, 4)
    base = sizes(models)["actor"].parameters - small
    want = (
        f"actor {count(base + small)}, of which {count(small)} are trained; critic {count(small + HEAD)} on the "
        "actor's base; reference the actor's base"
    )
    assert want in text
