"""End tokens, dropout, and the words of the errors."""

from __future__ import annotations

import json
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from steepest.errors import ModelError
from steepest.models.load import (
    check_vocabulary,
    end_token_ids,
    load_causal_lm,
    load_tokenizer,
    load_value_model,
    text_ids,
)
from steepest.models.packing import pack_sequences
from steepest.models.rows import rows_reason
from tests.support.tiny_models import random_ids, tiny_config, tiny_folder, tiny_hf, tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("generation", "want"),
    [({"eos_token_id": [5, 3]}, (2, 3, 5)), ({"eos_token_id": 2}, (2,)), ({}, (2,)), (None, (2, 7))],
)
def test_end_tokens_are_those_of_generation_config_and_tokenizer(tmp_path, generation, want):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 7}))
    assert end_token_ids(tmp_path, types.SimpleNamespace(eos_token_id=2)) == want


def test_no_end_token_at_all_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="no end token"):
        end_token_ids(tmp_path, types.SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [[1000000], 61, -1, [2, -3], ["2"], [2.5], True])
def test_an_end_token_that_the_model_has_not_is_refused(tmp_path, file, value):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 61}))
    entries = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps({**entries, "eos_token_id": value}))
    with pytest.raises(ModelError, match=rf"{file}: eos_token_id=.* is no token of the model, whose ids are 0 to 60"):
        end_token_ids(tmp_path, types.SimpleNamespace(eos_token_id=2))


def test_an_end_token_of_the_tokenizer_that_the_model_has_not_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 61}))
    with pytest.raises(ModelError, match="the tokenizer: eos_token_id=70: 70 is no token of the model"):
        end_token_ids(tmp_path, types.SimpleNamespace(eos_token_id=70))


@pytest.mark.parametrize("value", [61, 1000000, -62])
def test_a_pad_token_that_the_model_has_not_is_refused(tmp_path, value):
    tiny_hf("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": value}))
    for load in (load_causal_lm, load_value_model):
        with pytest.raises(ModelError, match=rf"pad_token_id={value} in its config.json is no token of the model"):
            load(tmp_path)


def test_ids_without_a_text_are_said_once_and_allowed(folder):
    tokenizer = load_tokenizer(folder)
    size = len(tokenizer)
    assert check_vocabulary(tiny_lm(vocab_size=size), tokenizer) is None
    assert check_vocabulary(tiny_lm(vocab_size=size + 7), tokenizer).startswith(
        f"the model has {size + 7} token ids and the tokenizer {size}: 7 have no text."
    )
    assert text_ids(tokenizer).tolist() == list(range(size))


def test_tokenizer_pads_with_its_end_token_when_it_has_no_other(folder, tmp_path):
    tokenizer = load_tokenizer(folder, custom_chat_template="{{ messages[0]['content'] }}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "7"}], tokenize=False) == "7"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_a_generic_tokenizer_in_a_qwen2_folder_is_read_as_it_is(tmp_path):
    folder = tiny_folder(tmp_path, model_type="qwen2")
    text = "What is 12 + 12?\n#### 12"
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_masters_are_fp32_and_dropout_is_off_everywhere(tmp_path):
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    hf = AutoModelForCausalLM.from_config(config).bfloat16()
    hf.save_pretrained(tmp_path)
    for model in (load_causal_lm(tmp_path), load_value_model(tmp_path)):
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert model.training
        dropouts = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        assert len(dropouts) > 5 and set(dropouts) == {0.0}
        assert model.config.attn_pdrop == model.config.resid_pdrop == 0.0


def test_a_model_with_dropout_computes_the_same_in_train_and_eval_mode(tmp_path):
    """Trap 17, with models that would drop: GPT-2 in its modules, Qwen2 by an entry of its config."""
    gpt2 = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=1, bos_token_id=1)
    packed = pack_sequences(random_ids([9, 5]), [[False] + [True] * 8, [False] + [True] * 4])
    for name, config in (("gpt2", gpt2), ("qwen2", tiny_config(attention_dropout=0.5))):
        hf = AutoModelForCausalLM.from_config(config)
        hf.save_pretrained(tmp_path / name)
        ids = packed.input_ids[None, :9]
        assert not torch.equal(hf.train()(ids).logits, hf.eval()(ids).logits)  # the control: it does drop
        policy, critic = load_causal_lm(tmp_path / name), load_value_model(tmp_path / name)
        torch.nn.init.normal_(critic.score.weight)
        for model, run in ((policy, policy.log_probs), (critic, critic.values)):
            model.train()
            trained = run(packed)[0]
            model.eval()
            assert torch.equal(trained, run(packed)[0]) and float(trained.detach().std()) > 0.01


def test_tied_embeddings_stay_tied(folder):
    model = load_causal_lm(folder)
    assert model.hf.lm_head.weight is model.hf.get_input_embeddings().weight
    assert len(list(model.parameters())) == len({id(p) for p in model.parameters()})


def test_override_config_changes_existing_entries_only(folder):
    assert load_causal_lm(folder, override_config={"rms_norm_eps": 0.5}).config.rms_norm_eps == 0.5
    with pytest.raises(ModelError, match=r"override_config\.rms_norm_epps.*Did you mean 'rms_norm_eps'"):
        load_causal_lm(folder, override_config={"rms_norm_epps": 0.5})


def test_missing_weights_are_named(tmp_path):
    tiny_hf("llama").save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    for load in (load_causal_lm, load_value_model):
        with pytest.raises(ModelError, match=r"not in the checkpoint.*layers\.1\.mlp\.up_proj"):
            load(tmp_path)


def test_damaged_folder_is_a_model_error(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load a config"):
        load_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="nonsense"):
        load_causal_lm(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    check_vocabulary(load_causal_lm(folder), tokenizer)
    with pytest.raises(ModelError, match="embeds 10"):
        check_vocabulary(tiny_lm(vocab_size=10), tokenizer)


def test_loading_prints_nothing(folder, capfd):
    load_tokenizer(folder)
    load_causal_lm(folder)
    load_value_model(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"head_dim": 8, "attn_logit_softcapping": 30.0}, None),
        ("bloom", {"n_head": 4}, "it does not use transformers' attention interface"),
        ("mamba", {"state_size": 4}, "attention runs in 0 of its 2 layers"),
    ],
)
def test_a_model_that_cannot_be_packed_runs_in_rows(tmp_path, family, changes, reason):
    tiny_hf(family, **changes).save_pretrained(tmp_path)
    assert rows_reason(load_causal_lm(tmp_path).hf) == reason
    assert rows_reason(load_value_model(tmp_path).hf) == reason


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(file, model):
    """A Qwen2 model as an F32 GGUF file."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(str(file), "qwen2")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    for name, tensor in model.hf.state_dict().items():
        if name != "lm_head.weight":  # tied
            for ours, theirs in _GGUF_NAMES.items():
                name = name.replace(ours, theirs)
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_gives_the_same_policy_and_a_critic(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    model = tiny_lm()
    write_gguf(tmp_path / "model.gguf", model)
    loaded = load_causal_lm(tmp_path / "model.gguf")
    mine, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    assert loaded.hf.lm_head.weight is loaded.hf.get_input_embeddings().weight
    critic = load_value_model(tmp_path / "model.gguf")
    assert torch.equal(critic.hf.model.norm.weight, model.hf.model.norm.weight)
    assert not critic.score.weight.any()
    assert "quantization_config" not in critic.config.to_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_lie_in_memory_of_their_own_whatever_the_file(tmp_path, dtype):
    """Taken from the file as they are, or converted: no weight is a view into the file, or stands off torch's lines."""
    tiny_hf().to(dtype).save_pretrained(tmp_path)
    for model in (load_causal_lm(tmp_path), load_value_model(tmp_path)):
        for weight in model.parameters():
            storage = weight.untyped_storage()
            assert storage.resizable() and storage.nbytes() == weight.numel() * 4
            assert weight.data_ptr() % 64 == 0
