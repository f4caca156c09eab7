"""The critic: values start at 0, sit before their token, and survive saving."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForTokenClassification
from transformers.modeling_outputs import BaseModelOutputWithPast

from steepest.core.batch import Batch
from steepest.models.load import load_value_model
from steepest.models.packing import pack_batch, scatter
from steepest.models.value_head import ValueModel
from tests.support.tiny_models import FAMILIES, random_ids, tiny_config, tiny_critic, tiny_hf, tiny_lm


def small_batch() -> Batch:
    prompts, responses = random_ids([3, 1], seed=1), random_ids([2, 4], seed=2)
    return Batch.from_sequences(prompts, responses, group_ids=[0, 1], truncated=[False] * 2)


class PositionBackbone(nn.Module):
    """The hidden state of a token is its position."""

    def forward(self, input_ids, position_ids, **_):
        hidden = position_ids[..., None].float() * torch.tensor([1.0] + [0.0] * 31)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


def test_a_value_is_read_before_its_token_is_produced():
    model, batch = tiny_critic(zero_head=True), small_batch()
    backbone = PositionBackbone()
    backbone.config = model.config
    model.hf.model = backbone
    with torch.no_grad():
        model.score.weight[0, 0] = 1.0
    packed = pack_batch(batch, batch.response_mask)
    values, final = model.values(packed, with_final=True)
    # row 0: prompt of 3 tokens at positions 0 1 2, so the first response token is produced at position 2
    assert scatter(values, packed, (2, 4)).tolist() == [[2, 3, 0, 0], [0, 1, 2, 3]]
    assert final.tolist() == [4, 4]
    log_probs, _ = tiny_lm().log_probs(packed)
    assert log_probs.shape == values.shape


def test_values_start_at_zero_and_the_head_learns(tmp_path):
    tiny_lm().save(tmp_path, None)
    model = load_value_model(tmp_path)
    values, final = model.values(pack_batch(small_batch(), small_batch().response_mask), with_final=True)
    assert values.tolist() == [0.0] * 6 and final.tolist() == [0.0] * 2
    ((values - 1) ** 2).sum().backward()
    assert float(model.score.weight.grad.abs().sum()) > 0 and float(model.score.bias.grad) == -12.0


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_critic_loads_in_transformers_and_here_with_equal_values(tmp_path, family):
    model, batch = tiny_critic(family), small_batch()
    packed = pack_batch(batch, batch.response_mask)
    model.save(tmp_path, None)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want, _ = model.values(packed)
        again, _ = load_value_model(tmp_path).values(packed)
        for row, (prompt, response) in enumerate(zip(batch.prompt_lengths, batch.response_lengths, strict=True)):
            ids = batch.input_ids[row][batch.attention_mask[row]]
            logits = theirs(input_ids=ids[None]).logits[0, :, 0]
            mine = scatter(want, packed, (2, 4))[row, :response]
            torch.testing.assert_close(mine, logits[prompt - 1 : prompt + response - 1], atol=1e-5, rtol=1e-5)
    assert torch.equal(again, want) and float(want.std()) > 0.1


def test_a_family_without_a_classification_class_keeps_its_head_beside_the_backbone(tmp_path):
    config = tiny_config("olmo", num_labels=1)
    tiny_lm("olmo").save(tmp_path / "policy", None)
    model = load_value_model(tmp_path / "policy")
    assert isinstance(model, ValueModel) and model.own_head is not None, type(config)
    packed = pack_batch(small_batch(), small_batch().response_mask)
    assert model.values(packed)[0].tolist() == [0.0] * 6
    nn.init.normal_(model.score.weight)
    model.save(tmp_path / "critic", None)
    assert torch.equal(load_value_model(tmp_path / "critic").values(packed)[0], model.values(packed)[0])


def test_values_are_fp32_under_autocast():
    model, packed = tiny_critic(), pack_batch(small_batch(), small_batch().response_mask)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = model.values(packed)
    assert values.dtype == torch.float32


def test_train_and_eval_give_equal_values():
    model, packed = tiny_critic(), pack_batch(small_batch(), small_batch().response_mask)
    assert torch.equal(model.train().values(packed)[0], model.eval().values(packed)[0])


def test_policy_and_critic_of_one_checkpoint_share_no_storage(tmp_path):
    tiny_hf().save_pretrained(tmp_path)
    first, second = load_value_model(tmp_path), load_value_model(tmp_path)
    assert not {p.data_ptr() for p in first.parameters()} & {p.data_ptr() for p in second.parameters()}
