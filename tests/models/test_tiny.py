"""The model from nothing: lossless words, whole numbers, two end tokens, reproducible weights."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from steepest.models.load import end_token_ids, load_causal_lm, load_tokenizer
from steepest.models.tiny import build_tiny_model, build_tokenizer

TEXTS = ["Tom has 12 apples, and 7 pears.\nHow many? #### 19", " yes-no"]
WORDS = [" Tom", " has", " 12", "\nTom", "\n12", ",", " and", "\n", "?", " ####", "\n####", " 19", "-", " yes", " -"]
TOKENIZER = build_tokenizer([*TEXTS, *WORDS])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_known_text_survives_encoding_and_decoding(words):
    text = "".join(words)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_numbers_are_single_tokens_and_unknown_words_are_marked():
    ids = TOKENIZER("Tom has 12")["input_ids"]
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["Tom", " has", " 12"]
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER("Ann")["input_ids"]) == ["<|unknown|>"]


def test_template_and_ends(tmp_path):
    folder = build_tiny_model(tmp_path, TEXTS)
    tokenizer = load_tokenizer(folder)
    chat = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(list(end_token_ids(folder, tokenizer))) == ["<|endoftext|>", "<|im_end|>"]
    assert tokenizer.pad_token == "<|endoftext|>"


def test_same_seed_same_weights_and_first_logits_of_unit_size(tmp_path):
    models = [load_causal_lm(build_tiny_model(tmp_path / str(i), TEXTS, seed=s)) for i, s in enumerate([0, 0, 1])]
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])
    with torch.no_grad():
        hidden = torch.nn.functional.normalize(torch.randn(64, 64), dim=-1) * 8  # what the last norm gives out
        assert 0.7 < float(models[0].logits(hidden).std()) < 1.4


def test_transformers_alone_reads_the_tokenizer_that_lies_there(tmp_path):
    folder = build_tiny_model(tmp_path / "made", TEXTS)
    ours, text = load_tokenizer(folder), "Tom has 12 apples, and 7 pears.\nHow many? #### 19"
    load_causal_lm(folder).save(tmp_path / "saved", ours)
    for place in (folder, tmp_path / "saved"):
        theirs = AutoTokenizer.from_pretrained(place)
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
        assert ours.unk_token_id not in ours(text)["input_ids"]
