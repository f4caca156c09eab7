"""A model whose files hold other weights than it has, or NaN, is refused by the name of the weight."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from steepest.errors import CheckpointError, ModelError
from steepest.learner.optim import Optimizer, OptimSettings, load_optimizer, save_optimizer
from steepest.models.load import load_causal_lm, load_value_model
from steepest.models.lora import WEIGHTS_FILE, LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.reward_model import load_reward_model
from steepest.models.value_head import HEAD_FILE
from tests.models.test_load import write_gguf
from tests.support.tiny_models import tiny_critic, tiny_folder, tiny_hf, tiny_lm

UP = "model.layers.1.mlp.up_proj.weight"
LOADERS = (load_causal_lm, load_value_model)


def edit(file, change):
    """Write a .safetensors file again, after `change` has worked on its tensors."""
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def write(folder, change, hf=None):
    """A tiny Llama whose file is changed."""
    (hf if hf is not None else tiny_hf("llama")).save_pretrained(folder)
    edit(folder / "model.safetensors", change)
    return folder


def reward_model(folder):
    return load_reward_model(
        folder, device=torch.device("cpu"), dtype=torch.float32, micro_batch_size=2, label=None, trust_remote_code=False
    )


def reward_folder(folder, change=lambda state: None):
    tiny_folder(folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = 1
    write(folder, change, AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    return folder


def spoil(name, *values):
    def change(state):
        state[name].view(-1)[: len(values)] = torch.tensor(values, dtype=state[name].dtype)

    return change


# -- NaN and infinity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("values", "counted"),
    [([float("nan")] * 3, "3 NaN and 0 infinite"), ([float("inf"), float("-inf")], "0 NaN and 2 infinite")],
)
def test_a_weight_that_is_not_finite_is_named_with_its_file(tmp_path, load, values, counted):
    with pytest.raises(ModelError) as caught:
        load(write(tmp_path, spoil(UP, *values)))
    assert f"{UP} in model.safetensors has {counted} of 1,536 numbers. The file is damaged" in str(caught.value)


def test_the_shard_is_named_and_how_many_more_there_are(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    of = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (UP, "model.norm.weight"):
        edit(tmp_path / of[name], spoil(name, float("nan")))
    with pytest.raises(ModelError) as caught:
        load_causal_lm(tmp_path)
    assert f"{UP} in {of[UP]} has 1 NaN" in str(caught.value)
    assert "So do 1 more, the next is model.norm.weight." in str(caught.value)


def test_large_numbers_are_finite(tmp_path):
    """Their sum is not."""
    weights = write(tmp_path, spoil("model.layers.0.input_layernorm.weight", 3e38, 3e38))
    with pytest.raises(ModelError, match="differ|packed"):  # by the self-check of what it computes, not by the file
        load_causal_lm(weights)


def test_a_reward_model_that_is_not_finite_is_named(tmp_path):
    assert reward_model(reward_folder(tmp_path / "good")).score([[3, 4]])[0] == pytest.approx(0.0, abs=10)
    with pytest.raises(ModelError, match=r"score\.weight in model\.safetensors has 1 NaN"):
        reward_model(reward_folder(tmp_path / "bad", spoil("score.weight", float("nan"))))


def test_a_gguf_file_that_is_not_finite_is_named(tmp_path):
    pytest.importorskip("gguf")
    model = tiny_lm()
    with torch.no_grad():
        model.hf.get_parameter(UP)[0, 0] = float("nan")
    write_gguf(tmp_path / "model.gguf", model)
    for load in LOADERS:
        with pytest.raises(ModelError, match=rf"model\.gguf: {re.escape(UP)} has 1 NaN"):
            load(tmp_path / "model.gguf")


def test_an_adapter_that_is_not_finite_is_named(tmp_path):
    settings = LoraSettings(rank=2)
    LoraCausalLM(tiny_hf(), settings).save(tmp_path, None)
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    edit(tmp_path / WEIGHTS_FILE, spoil(name, float("nan")))
    with pytest.raises(CheckpointError, match=re.escape(f"{WEIGHTS_FILE}: {name} has 1 NaN")):
        LoraCausalLM(tiny_hf(), settings, adapter=tmp_path)


def test_a_value_head_of_its_own_that_is_not_finite_or_of_another_size_is_named(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    critic = load_value_model(tmp_path)
    critic.own_head = torch.nn.Linear(32, 1)
    file = tmp_path / HEAD_FILE
    save_file({"weight": torch.full((1, 32), float("inf")), "bias": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=rf"{HEAD_FILE}: weight has 0 NaN and 32 infinite of 32"):
        critic.load_own_head(tmp_path)
    save_file({"weight": torch.zeros(1, 16), "bias": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="another kind of value head"):
        critic.load_own_head(tmp_path)


def test_an_optimizer_state_that_is_not_finite_is_named(tmp_path):
    def make():
        weight = torch.nn.Parameter(torch.ones(2, 2))
        return weight, Optimizer([("w", weight)], OptimSettings(lr=1e-3, total_steps=2))

    weight, optimizer = make()
    weight.sum().backward()
    optimizer.step()
    save_optimizer(optimizer, tmp_path)
    edit(tmp_path / "optimizer.safetensors", spoil("w.exp_avg_sq", float("nan")))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: w\.exp_avg_sq has 1 NaN"):
        load_optimizer(make()[1], tmp_path)


# -- names and shapes -------------------------------------------------------------------------------------------


def add(name, *shape):
    return lambda state: state.update({name: torch.ones(shape)})


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.embed_positions.weight",
        "something.weight",
    ],
)
def test_a_weight_without_a_place_is_refused(tmp_path, load, name):
    with pytest.raises(
        ModelError, match=rf"1 weights of the checkpoint have no place in Llama\w+ by its config.json: {name}\."
    ):
        load(write(tmp_path, add(name, 4)))


def test_a_config_with_a_layer_less_than_the_file_is_refused(tmp_path):
    tiny_hf("llama", num_hidden_layers=4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for load in LOADERS:
        with pytest.raises(ModelError, match=r"9 weights .*no place.*: model\.layers\.3\.input_layernorm.* and 4 more"):
            load(tmp_path)
        assert load(tmp_path, override_config={"num_hidden_layers": 4}).config.num_hidden_layers == 4


@pytest.mark.parametrize("load", LOADERS)
def test_a_weight_of_another_shape_is_named_with_both(tmp_path, load):
    changed = write(tmp_path, lambda state: state.update({UP: torch.ones(50, 32)}))
    with pytest.raises(ModelError, match=rf"{re.escape(UP)} is \[50, 32\] there and \[48, 32\] here"):
        load(changed)


@pytest.mark.parametrize("load", LOADERS)
def test_old_tables_of_positions_are_harmless(tmp_path, load):
    loaded = load(write(tmp_path, add("model.layers.0.self_attn.rotary_emb.inv_freq", 4)))
    assert "rotary" not in " ".join(loaded.state_dict())


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("load", LOADERS)
def test_masks_in_old_files_of_gpt2_are_harmless(tmp_path, load, prefix):
    config = AutoConfig.for_model("gpt2", vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64)

    def old(state):
        state.update({"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)})
        for name in list(state):
            state[prefix + name.removeprefix("transformer.")] = state.pop(name)

    loaded = load(write(tmp_path, old, AutoModelForCausalLM.from_config(config)))
    assert not any(name.endswith((".attn.bias", ".masked_bias")) for name, _ in loaded.named_parameters())


def test_layers_that_predict_a_further_token_are_harmless_and_others_are_not(tmp_path):
    write(tmp_path / "mtp", lambda s: [add(f"model.layers.2.{n}.weight", 4)(s) for n in ("eh_proj", "mlp.up_proj")])
    load_causal_lm(tmp_path / "mtp")
    write(tmp_path / "more", lambda s: [add(f"model.layers.{n}.weight", 4)(s) for n in ("2.eh_proj", "3.mlp.up_proj")])
    with pytest.raises(ModelError, match=r"1 weights .*: model\.layers\.3\.mlp"):
        load_causal_lm(tmp_path / "more")


def test_an_actor_and_a_critic_may_begin_with_each_other(tmp_path):
    tiny_critic("qwen2").save(tmp_path / "critic", None)
    tiny_lm("qwen2").save(tmp_path / "actor", None)
    head = load_causal_lm(tmp_path / "critic").hf.lm_head.weight
    assert torch.equal(head, tiny_critic("qwen2").hf.get_input_embeddings().weight)
    assert not load_value_model(tmp_path / "actor").score.weight.any()


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    both = write(tmp_path, lambda s: s.update({"lm_head.weight": torch.randn(61, 32)}), tiny_hf("qwen2"))
    with pytest.raises(ModelError, match="ties the output head to the embedding"):
        load_causal_lm(both)
    assert load_causal_lm(both, override_config={"tie_word_embeddings": False}).hf.lm_head.weight.shape == (61, 32)
    edit(both / "model.safetensors", lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].clone()}))
    hf = load_causal_lm(both).hf
    assert hf.lm_head.weight is hf.get_input_embeddings().weight


def test_a_reward_model_with_weights_left_over_is_refused(tmp_path):
    reward_model(reward_folder(tmp_path / "good", add("lm_head.weight", 4)))
    with pytest.raises(ModelError, match=r"1 weights .* have no place in Qwen2\w+ by its config\.json: score\.bias"):
        reward_model(reward_folder(tmp_path / "bad", add("score.bias", 1)))


def test_a_gguf_file_with_a_layer_too_many_is_refused(tmp_path):
    pytest.importorskip("gguf")
    model = tiny_lm(num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    write_gguf(tmp_path / "model.gguf", model)
    for load in LOADERS:
        with pytest.raises(
            ModelError, match=r"no place in Qwen2\w+ by the file's own settings \(2 layers\), .*blk\.2\."
        ):
            load(tmp_path / "model.gguf")


def test_an_adapter_of_another_base_is_refused(tmp_path):
    LoraCausalLM(tiny_hf(), LoraSettings(rank=2)).save(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"lora_A.weight is \[2, 32\], and \[2, 64\] on this base model"):
        LoraCausalLM(tiny_hf(hidden_size=64), LoraSettings(rank=2), adapter=tmp_path)
