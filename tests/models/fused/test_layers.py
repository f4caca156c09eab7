"""The fused forward passes of a model's layers: gradients by differences, and each layer against its own forward."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from steepest.models.attention import PackedContext, attention_implementation
from steepest.models.causal_lm import CausalLM
from steepest.models.fused.layers import GatedMLP, RMSNorm, RotatedQKV
from steepest.models.fused.patch import fuse
from steepest.models.lora import LoraSettings
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from tests.support.tiny_models import random_ids, tiny_critic, tiny_hf, tiny_lm

FUSED = {
    "llama": {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5},
    "qwen2": {"Qwen2Attention": 2, "Qwen2MLP": 2, "Qwen2RMSNorm": 5},
    "mistral": {"MistralAttention": 2, "MistralMLP": 2, "MistralRMSNorm": 5},
    "qwen3": {"Qwen3MLP": 2, "Qwen3RMSNorm": 9},  # norms of heads lie between projection and rotation
    "gemma": {},  # another activation, and norms that multiply by 1 + weight
}


def packed() -> Packed:
    lengths = [9, 5, 12]
    return pack_sequences(random_ids(lengths), [[False] * 2 + [True] * (n - 2) for n in lengths])


def fused_layers(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in model.modules():
        if "forward" in vars(module):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


def plain(model: nn.Module) -> None:
    for module in model.modules():
        vars(module).pop("forward", None)


def outcome(model: CausalLM) -> dict[str, Tensor]:
    model.zero_grad()
    log_probs, entropies = model.log_probs(packed(), with_entropy=True)
    (log_probs + 0.3 * entropies).mul(torch.linspace(-1, 1, len(log_probs))).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"log_probs": log_probs.detach(), **grads}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 10
    for name, want in wanted.items():
        scale = float(want.abs().max())
        torch.testing.assert_close(found[name], want, atol=1e-5 * max(scale, 1e-3), rtol=1e-5, msg=name)


# -- by differences ------------------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def product(outputs: int, inputs: int, seed: int, *, bias: bool, rank: int) -> list:
    more = [numbers(rank, inputs, seed=seed + 1), numbers(outputs, rank, seed=seed + 2)] if rank else [None, None]
    return [numbers(outputs, inputs, seed=seed), numbers(outputs, seed=seed + 3) if bias else None, *more, 0.7]


def test_norm_by_differences():
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-2), (numbers(2, 3, 5), numbers(5, seed=1)))


@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (True, 2)])
def test_gated_mlp_by_differences(bias, rank):
    parts = [product(*shape, seed, bias=bias, rank=rank) for shape, seed in (((6, 4), 1), ((6, 4), 11), ((4, 6), 21))]
    x = numbers(3, 4)
    assert torch.autograd.gradcheck(GatedMLP.apply, (x, *chain(*parts)))
    w = [part[0] + (0.7 * part[3] @ part[2] if rank else 0.0) for part in parts]
    gate, up = (nn.functional.linear(x, w[i], parts[i][1]) for i in (0, 1))
    want = nn.functional.linear(gate * gate.sigmoid() * up, w[2], parts[2][1])
    torch.testing.assert_close(GatedMLP.apply(x, *chain(*parts)), want)


@pytest.mark.parametrize(("bias", "rank"), [(False, 0), (True, 0), (True, 2)])
def test_rotated_qkv_by_differences(bias, rank):
    parts = [product(n, 4, seed, bias=bias, rank=rank) for n, seed in ((8, 1), (4, 11), (4, 21))]
    x, angle = numbers(3, 4), torch.linspace(0, 2, 6, dtype=torch.float64).view(3, 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    assert torch.autograd.gradcheck(RotatedQKV.apply, (x, cos, sin, *chain(*parts)))
    q, k, v = RotatedQKV.apply(x, cos, sin, *chain(*parts))
    assert q.shape == (3, 2, 4) and k.shape == v.shape == (3, 1, 4)
    w = parts[1][0] + (0.7 * parts[1][3] @ parts[1][2] if rank else 0.0)
    y = nn.functional.linear(x, w, parts[1][1])
    want = y * cos + torch.cat([-y[:, 2:], y[:, :2]], 1) * sin
    torch.testing.assert_close(k[:, 0], want)


# -- in models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED)
def test_a_family_computes_what_it_computed(family):
    model = tiny_lm(family)
    assert fused_layers(model) == FUSED[family]
    found = outcome(model)
    plain(model)
    assert_same(found, outcome(model))


def test_with_an_adapter():
    model = LoraCausalLM(tiny_hf("llama"), LoraSettings(rank=3, alpha=5))
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.normal_(std=0.2)
    found = outcome(model)
    with torch.no_grad(), model.base_alone():
        base = model.log_probs(packed())[0]
    plain(model)
    assert_same(found, outcome(model))
    with torch.no_grad(), model.base_alone():
        torch.testing.assert_close(base, model.log_probs(packed())[0], atol=1e-5, rtol=0)
    assert (base - found["log_probs"]).abs().max() > 0.1


def test_an_adapter_that_is_merged_and_then_off_is_not_there():
    model = LoraCausalLM(tiny_hf("llama"), LoraSettings(rank=3, alpha=5))
    with torch.no_grad(), model.base_alone():
        base = model.log_probs(packed())[0]
    with torch.no_grad():
        for _, parameter in model.saved_parameters():
            parameter.normal_(std=0.2)
        for module in model.modules():
            if hasattr(module, "lora_A") and hasattr(module, "merge"):
                module.merge()
        assert (model.log_probs(packed())[0] - base).abs().max() > 0.1
        with model.base_alone():
            torch.testing.assert_close(model.log_probs(packed())[0], base, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["mlp.up_proj", "self_attn.k_proj"])
def test_a_hook_on_a_layer_is_called(name):
    model, seen = tiny_lm("llama"), []
    model.hf.model.layers[1].get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    found = outcome(model)
    assert seen == [1]
    plain(model)
    assert_same(found, outcome(model))


def test_weights_that_become_float32_later_are_not_fused_unseen():
    half = CausalLM(tiny_hf("llama").to(torch.bfloat16))
    assert fused_layers(half) == {}
    assert fused_layers(half.copy_as(torch.float32)) == FUSED["llama"]


def test_the_critic_too():
    critic = tiny_critic("llama")
    assert fused_layers(critic) == FUSED["llama"]
    found = critic.values(packed())[0]
    plain(critic)
    torch.testing.assert_close(found, critic.values(packed())[0], atol=1e-5, rtol=1e-5)


def test_a_copy_computes_with_its_own_weights():
    model = tiny_lm("llama")
    other = model.copy_as(torch.float32)
    with torch.no_grad():
        before = model.log_probs(packed())[0]
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert torch.equal(other.log_probs(packed())[0], before)
        assert (model.log_probs(packed())[0] - before).abs().max() > 0.01


def test_a_layer_that_computes_something_else_stays_as_it_is():
    class Doubled(LlamaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    hf = tiny_hf("llama")
    for layer in hf.model.layers:
        layer.mlp.__class__ = Doubled
    fuse(hf)
    assert fused_layers(hf) == {name: n for name, n in FUSED["llama"].items() if name != "LlamaMLP"}


def test_a_model_in_bf16_runs_as_before():
    model = tiny_lm("llama").copy_as(torch.bfloat16)
    with torch.no_grad():
        found = model.log_probs(packed())[0]
        plain(model)
        assert torch.equal(found, model.log_probs(packed())[0])


def test_transformers_own_attention_and_cache_still_work():
    model = tiny_lm("llama")
    ids = torch.tensor(random_ids([7]))
    with torch.no_grad(), attention_implementation(model.hf, "eager"):
        found = model.hf.generate(ids, max_new_tokens=5, do_sample=False)
        plain(model)
        assert torch.equal(found, model.hf.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_window_hides_the_same_tokens_in_a_fused_layer(family):
    more = {} if family == "mistral" else {"use_sliding_window": True, "max_window_layers": 0}
    model = tiny_lm(family, sliding_window=3, **more)
    assert fused_layers(model) == FUSED[family]
    with torch.no_grad():
        found, _ = model.log_probs(packed())
        plain(model)
        own, _ = model.log_probs(packed())
        wide, _ = tiny_lm(family, sliding_window=None).log_probs(packed())
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, wide, atol=1e-2)


def test_what_is_kept_for_the_backward_pass():
    """Numbers a token and layer, hidden 32, inner 48, 4 and 2 heads of 8: the model's own code, and fused."""
    kept = []
    model = tiny_lm("llama")
    ids = torch.tensor(random_ids([40])[0])
    weights = {p.data_ptr() for p in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights and tensor.numel() >= len(ids):
            sizes[tensor.data_ptr()] = tensor.numel() / len(ids)
        return tensor

    for _ in range(2):
        sizes: dict[int, float] = {}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model.hidden_states(ids, torch.arange(len(ids)), PackedContext([len(ids)]))
        kept.append(sum(sizes.values()) / 2)
        del out
        plain(model)
    fused, own = kept
    assert fused < 0.75 * own
