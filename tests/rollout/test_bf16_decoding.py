"""The engine in bf16: it computes with the trainer's working weights, and its numbers are those of the trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from steepest.models.working_weights import drop, half, in_dtype, keep, use_copies
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.choose_network import choose_network
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.builtin.generation import Generation
from steepest.rollout.builtin.kv_cache import KVCache
from steepest.rollout.builtin.layout import Matrix
from steepest.rollout.builtin.linear import FusedLinear, PackedLinear
from steepest.rollout.requests import group_by_sampling
from steepest.rollout.weights import LocalWeights
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, random_ids, randomise, tiny_lm

CPU = torch.device("cpu")
SAMPLING = SamplingParams(12, seed=3, ignore_eos=True)


def parts(bias=False):
    torch.manual_seed(0)
    layers = [nn.Linear(8, out, bias=bias) for out in (6, 3)]
    return [Matrix(layer, f"l{i}", f"l{i}.weight") for i, layer in enumerate(layers)]


@torch.no_grad()
def send(linear, matrices):
    """What a model does in `named_weights`."""
    for matrix in matrices:
        sent = {
            matrix.weight_name: in_dtype(matrix.base.weight, torch.bfloat16),
            f"{matrix.name}.bias": matrix.base.bias,
        }
        for name, tensor in sent.items():
            for sink in linear.sinks().get(name, ()):
                sink(tensor)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_working_weights_are_read_as_they_lie_and_others_are_copied(bias):
    x, matrices = torch.randn(5, 8).bfloat16(), parts(bias)
    linear = FusedLinear(matrices, torch.bfloat16)

    def want():
        return torch.cat([half(m.base.weight) for m in matrices]), [m.base.bias for m in matrices]

    send(linear, matrices)
    assert linear.copied_bytes == 2 * 9 * 8 and torch.equal(linear._weight, want()[0])
    keep([matrices[1].base.weight])  # one of two is not enough
    send(linear, matrices)
    assert linear.copied_bytes == 2 * 9 * 8 and torch.equal(linear._weight, want()[0])
    drop([matrices[1].base.weight])
    keep(matrix.base.weight for matrix in matrices)
    for _ in range(2):
        send(linear, matrices)
        assert linear.copied_bytes == 0 and linear._weight.data_ptr() == half(matrices[0].base.weight).data_ptr()
        weight, biases = want()
        assert torch.equal(linear._weight, weight)
        assert torch.equal(linear(x), F.linear(x, weight, torch.cat(biases).bfloat16() if bias else None))
        for matrix in matrices:
            matrix.base.weight.mul_(-1.5)
    drop(matrix.base.weight for matrix in matrices)
    kept = linear._weight.clone()
    send(linear, matrices)
    assert linear.copied_bytes == 2 * 9 * 8 and not torch.equal(linear._weight, kept)
    linear.free()
    assert linear._weight is None and linear.copied_bytes == 0


@torch.no_grad()
def test_a_merged_matrix_is_not_taken_for_the_weight_under_it():
    matrices = parts()
    keep(matrix.base.weight for matrix in matrices)
    fused, merged = FusedLinear(matrices, torch.bfloat16), [torch.ones(6, 8), torch.full((3, 8), 2.0)]
    for matrix, tensor in zip(matrices, merged, strict=True):
        fused.sinks()[matrix.weight_name][0](tensor)
    assert torch.equal(fused._weight, torch.cat(merged).bfloat16()) and fused.copied_bytes == 2 * 9 * 8


def test_packed_weights_serve_as_many_rows_as_they_are_told():
    matrices = parts()
    packed = PackedLinear(matrices, torch.float32, FusedLinear(matrices, torch.float32), most_rows=2)
    send(packed, matrices)
    x = torch.randn(3, 8)
    want = torch.cat([x @ matrix.base.weight.detach().t() for matrix in matrices], 1)
    torch.testing.assert_close(packed(x), want)
    torch.testing.assert_close(packed(x[:2]), want[:2])
    packed._many.free()
    packed(x[:2])
    with pytest.raises(AssertionError):
        packed(x)


def test_an_engine_over_working_weights_has_no_copy_and_follows_an_update():
    model = tiny_lm("llama")
    use_copies(model.hf)
    options = {"end_token_ids": (END,), "pad_token_id": END, "max_model_len": 64, "dtype": torch.bfloat16}
    engine = loaded(BuiltinEngine, model, **options)
    requests = requests_of(random_ids([3, 9, 5]), SamplingParams(8, seed=3, ignore_eos=True))
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # else it packs them
        assert engine.copied_bytes == 0
    before = engine.generate(requests)
    randomise(model.hf, seed=7)
    engine.load_weights(LocalWeights(model), 1)
    after = engine.generate(requests)
    assert after != before
    assert after == loaded(BuiltinEngine, model, version=1, **options).generate(requests)


def generated(model, prompts, products):
    network, notes = choose_network(model, torch.bfloat16, 96, 1 << 40)
    assert notes == ()
    cache = KVCache(network.shapes(), torch.bfloat16, CPU, bf16_products=products)
    (group,) = group_by_sampling(requests_of(prompts, SAMPLING))
    cache.lay_out(3, 82)
    with torch.inference_mode():
        run = Generation(network, cache, group, [], 3, 96, model.vocab_size)
        run.run()
    assert cache.capacity == 82
    return [answers[0] for answers in run.completions(0)]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_log_probs_of_whole_slots_are_those_of_the_trainer_in_bf16(family):
    """Rows pass the 64th place, where slots grow, at different times; five prompts share three slots."""
    model = tiny_lm(family)
    prompts = random_ids([58, 70, 61, 5, 64])
    use_copies(model.hf)
    trainer = LocalWeights(model)
    for products in (False, True):
        gaps, k3 = [], []
        for prompt, made in zip(prompts, generated(model, prompts, products), strict=True):
            own = trainer.log_probs(prompt, made.token_ids, half=True)
            gap = own - torch.tensor(made.log_probs)
            gaps.append(gap.abs().mean())
            k3.append((gap.exp() - 1 - gap).mean())
        assert float(torch.stack(gaps).mean()) < 0.06  # these weights are large; a wrong place gives above 1
        assert float(torch.stack(k3).mean()) < 0.006
