"""Sixteen bytes a trained parameter, four a frozen one, two a frozen matrix in bf16, and a shared base once; and what
else the driver asks of the roles."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from steepest.assembly.description import Description, describe_roles, sizes
from steepest.assembly.roles import Roles, build_models
from steepest.config.load import load_config
from steepest.config.plan import make_plan
from steepest.devices.backends.cpu import CPUDevice
from steepest.learner.checkpoint import FROM_NOTHING
from steepest.models.flops import key_value_numbers
from steepest.models.working_weights import copied_bytes, half
from steepest.trainer.run.summary import count, start_summary
from tests.support.toy_run import make_toy, toy_overrides


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


def test_models_in_bf16_keep_copies_of_the_matrices(toy, tmp_path):
    bf16 = [f"{name}=bfloat16" for name in ("actor_rollout_ref.actor.fsdp_config.dtype", "critic.fsdp.dtype")]
    config, plan, models = built(toy, tmp_path, *bf16)
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    layers = matrices + 2 * (32 + 16 + 16)  # and biases of q, k and v
    whole = layers + models.actor.model.hf.get_output_embeddings().weight.numel()
    of_reference = whole - matrices  # which are held in bf16 themselves
    assert described(models).cast_bytes == 2 * (whole + layers + of_reference), "the critic has no output projection"
    small = adapter_size(toy, 4)
    of_lora = described(built(toy, tmp_path, *bf16, LORA)[2]).cast_bytes
    assert of_lora == 2 * (whole + small + layers), "the reference is the actor's base"
    for kind, more in (("adapter", small), ("head", 0)):
        shared = described(built(toy, tmp_path, *bf16, LORA, f"critic.share_base={kind}")[2]).cast_bytes
        assert shared == 2 * (whole + small + more), "one base, one copy"
    assert described(built(toy, tmp_path, bf16[1])[2]).cast_bytes == 2 * layers, "the critic's alone"
    assert described(built(toy, tmp_path)[2]).cast_bytes == 0
    found = replace(described(models), cast_bytes=2**28)
    assert "bfloat16 copies 0.25" in start_summary(config, plan, (), CPUDevice(), found, "x")


def test_a_base_in_bf16_is_its_own_copy(toy, tmp_path):
    """Also where it was rounded after the actor had made a copy of it, by the critic that shares it."""
    words = (LORA, "critic.share_base=adapter", "actor_rollout_ref.rollout.name=vllm")
    models = built(toy, tmp_path, *words, "actor_rollout_ref.actor.fsdp_config.dtype=bfloat16")[2]
    head = models.actor.model.hf.get_output_embeddings().weight  # tied to the embedding, which stays float32
    biases = 2 * (32 + 16 + 16)
    assert described(models).cast_bytes == 2 * (2 * adapter_size(toy, 4) + biases + head.numel())
    copies = [half(p).untyped_storage() for p in models.actor.model.parameters() if copied_bytes([p])]
    memory = {storage.data_ptr(): storage.nbytes() for storage in copies}
    assert sum(memory.values()) == described(models).cast_bytes, "no copy that is left holds the memory of another"


def described(models) -> Description:
    """With an engine that copies 1.5 GiB of weights."""
    engine = SimpleNamespace(copied_bytes=3 * 2**29, notes=("a note",))
    return describe_roles(Roles(models.actor, models.critic, models.reference, engine))


def test_the_description_has_every_number_of_the_roles(toy, tmp_path):
    models = built(toy, tmp_path)[2]
    found = described(models)
    assert found.sizes == sizes(models) and list(found.sizes) == ["actor", "critic", "reference"]
    assert (found.compute, found.shares_prompts) == ("float32", False)
    assert "sdpa" in found.attention and "critic" not in found.attention, "both attend alike: named once"
    assert found.kv_numbers == 2 * 2 * 16, "keys and values of 2 layers, each 16 wide"
    assert (found.engine_copy_bytes, found.engine_notes) == (3 * 2**29, ("a note",))
    assert found.checkpoint_bytes == models.actor.checkpoint_bytes() + models.critic.checkpoint_bytes()
    grpo = built(toy, tmp_path, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=2")[2]
    found = described(grpo)
    assert list(found.sizes) == ["actor"] and found.shares_prompts
    assert found.checkpoint_bytes == grpo.actor.checkpoint_bytes()


def test_an_attention_that_differs_between_the_two_is_named_twice(toy, tmp_path):
    key = "actor_rollout_ref.model.override_config.attn_implementation"
    found = described(built(toy, tmp_path, f"+{key}=sdpa")[2])
    assert found.attention.startswith("actor sdpa") and "; critic sdpa" in found.attention


@pytest.mark.parametrize(
    ("words", "gib"), [((), 3.05), (("max_num_seqs=64",), 1.53), (("dtype=bfloat16",), 1.53)], ids=str
)
def test_the_summary_counts_the_cache_of_the_sequences_that_are_decoded_at_once(toy, tmp_path, words, gib):
    # 64 numbers a token, 100,016 tokens, 128 rows a step (fewer than 256 slots), 4 bytes
    more = ["data.max_response_length=100000", *(f"actor_rollout_ref.rollout.{word}" for word in words)]
    config, plan, models = built(toy, tmp_path, *more)
    assert f"KV cache {gib:.2f}" in start_summary(config, plan, (), CPUDevice(), described(models), "x")


def test_keys_and_values_of_a_token():
    text = SimpleNamespace(
        num_hidden_layers=3, num_key_value_heads=2, num_attention_heads=4, hidden_size=32, head_dim=None
    )
    assert key_value_numbers(SimpleNamespace(get_text_config=lambda: text)) == 2 * 3 * 2 * 8
    text.num_key_value_heads, text.head_dim = None, 16
    assert key_value_numbers(SimpleNamespace(get_text_config=lambda: text)) == 2 * 3 * 4 * 16


def test_the_summary_says_it(toy, tmp_path):
    config, plan, models = built(toy, tmp_path, LORA, "critic.share_base=adapter")
    text = start_summary(config, plan, (), CPUDevice(), described(models), "x")
    assert "rollout weights 1.50" in text
    small = adapter_size(toy, 4)
    base = sizes(models)["actor"].parameters - small
    want = (
        f"actor {count(base + small)}, of which {count(small)} are trained; critic {count(small + HEAD)} on the "
        "actor's base; reference the actor's base"
    )
    assert want in text
