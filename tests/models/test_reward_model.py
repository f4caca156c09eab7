"""Reward models: batches against transformers one text at a time, for a decoder and an encoder; what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from steepest.errors import ModelError
from steepest.models.reward_model import RewardModel, load_reward_model
from tests.support.tiny_models import randomise, tiny_config, tiny_folder

MESSAGES = [{"role": "user", "content": "What is 3 + 3?"}]
RESPONSES = ["#### 6", "#### 3", "What is 6 ?\n#### 1 2 3 4 5", "6"]


def folder(path: Path, family: str, **changes) -> Path:
    """A random scoring model with the tokenizer of the tiny models."""
    tiny_folder(path)
    if family == "bert":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        hf = BertForSequenceClassification(BertConfig(vocab_size=200, **sizes, **changes))
    else:
        hf = AutoModelForSequenceClassification.from_config(
            tiny_config(family, **{"vocab_size": 200, **changes}), dtype=torch.float32
        )
    randomise(hf, 3)
    hf.save_pretrained(path)
    return path


def load(path: Path, **changes) -> RewardModel:
    options = {"micro_batch_size": 3, "label": None, "trust_remote_code": False, **changes}
    return load_reward_model(path, device=torch.device("cpu"), dtype=torch.float32, **options)


def one_at_a_time(model: RewardModel, rows: list[list[int]]) -> list[list[float]]:
    with torch.no_grad():
        return [model.model(input_ids=torch.tensor([row])).logits[0].tolist() for row in rows]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"num_labels": 1}),  # no pad token of its own
        ("qwen2", {"num_labels": 1, "pad_token_id": 0}),
        ("llama", {"num_labels": 1}),
        ("bert", {"num_labels": 1}),
    ],
)
def test_a_batch_scores_as_transformers_does_one_at_a_time(tmp_path, family, changes):
    model = load(folder(tmp_path / "m", family, **changes))
    rows = [model.token_ids(MESSAGES, response) for response in RESPONSES]
    assert len({len(row) for row in rows}) > 1
    expected = [logits[0] for logits in one_at_a_time(model, rows)]
    assert model.score(rows) == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in expected}) == len(rows)  # else any order would do
    assert model.score(rows[::-1]) == pytest.approx(expected[::-1], abs=1e-5)
    assert model.model.config.pad_token_id == changes.get("pad_token_id", 0 if family == "bert" else None)


def test_of_several_labels_the_probability_of_one(tmp_path):
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    path = folder(tmp_path / "m", "qwen2", num_labels=3, **labels)
    model = load(path, label="good")
    rows = [model.token_ids(MESSAGES, response) for response in RESPONSES]
    expected = [torch.tensor(logits).softmax(0)[2].item() for logits in one_at_a_time(model, rows)]
    assert model.score(rows) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(
        ModelError, match="it has 3 labels; name the one whose probability is the score. Its labels: bad,"
    ):
        load(path)
    with pytest.raises(ModelError, match="it has no label 'god'. Did you mean 'good'?"):
        load(path, label="god")


def test_the_text_is_the_chat_templates_with_the_response_as_a_turn(tmp_path):
    model = load(folder(tmp_path / "m", "qwen2", num_labels=1))
    whole = [*MESSAGES, {"role": "assistant", "content": "#### 6"}]
    text = model.tokenizer.apply_chat_template(whole, tokenize=False)
    assert model.tokenizer.decode(model.token_ids(MESSAGES, "#### 6")) == text and "#### 6" in text
    model.tokenizer.chat_template = None
    assert model.tokenizer.decode(model.token_ids(MESSAGES, "#### 6")).strip() == "What is 3 + 3?\n\n#### 6"


def test_what_is_no_reward_model_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"weights are not in the checkpoint \(score.weight\), so scores would be random"
    ):
        load(tiny_folder(tmp_path / "policy"))
    with pytest.raises(ModelError, match="one output, so there is no label to choose"):
        load(folder(tmp_path / "m", "qwen2", num_labels=1), label="good")
