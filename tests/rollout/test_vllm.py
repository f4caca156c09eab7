"""The real vLLM against the builtin engine and the trainer, on tiny models. `make test-vllm` runs these."""

from __future__ import annotations

import importlib

import pytest
import torch

from steepest.core.mismatch import mismatch_metrics
from steepest.errors import RolloutError
from steepest.models.causal_lm import CausalLM
from steepest.models.packing import pack_sequences
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.vllm import VLLMEngine, VLLMSettings, start_engine
from steepest.rollout.weight_check import find_ends
from steepest.rollout.weights import LocalWeights, ModelDescription
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, OTHER_END, random_ids, tiny_lm

pytestmark = pytest.mark.vllm

VOCAB = 97
SHAPE = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "vocab_size": VOCAB}
PROMPTS = random_ids([3, 9, 20, 33, 5], vocab=VOCAB)
GREEDY = SamplingParams(16, temperature=0.0)
FAMILIES = [("llama", True), ("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("mistral", False)]


def model_of(family: str = "qwen2", tied: bool = True, seed: int = 0) -> CausalLM:
    return tiny_lm(family, seed, tie_word_embeddings=tied, **SHAPE)


def options(dtype: torch.dtype = torch.float32, **changes):
    return {
        "end_token_ids": [END, OTHER_END], "pad_token_id": 0, "dtype": dtype, "max_model_len": 64, "max_num_seqs": 16,
        **changes,
    }  # fmt: skip


def engine_for(model: CausalLM, dtype: torch.dtype = torch.float32, **changes) -> VLLMEngine:
    return loaded(start_engine, model, **options(dtype, **changes))


def tokens(answers) -> list[list[int]]:
    return [answer.token_ids for group in answers for answer in group]


def update(model: CausalLM, size: float) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def scored(model: CausalLM, answers, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(vLLM's, the trainer's) log-probs of all tokens, end to end."""
    mine, theirs = [], []
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for answer in group:
            mask = [[False] * len(prompt) + [True] * len(answer.token_ids)]
            packed = pack_sequences([[*prompt, *answer.token_ids]], mask)
            with torch.no_grad():
                mine.append(model.log_probs(packed, temperature=temperature)[0])
            theirs.append(torch.tensor(answer.log_probs))
    return torch.cat(theirs), torch.cat(mine)


@pytest.mark.parametrize("family, tied", FAMILIES)
def test_greedy_tokens_equal_the_builtin_engines_before_and_after_updates(family, tied):
    """The tied head is the case that vLLM's own reload gets wrong: without the repair, tokens stay the old ones."""
    model = model_of(family, tied)
    engine, builtin = engine_for(model), loaded(BuiltinEngine, model, **options())
    before = None
    for version in range(1, 4):
        got, want = engine.generate(requests_of(PROMPTS, GREEDY)), builtin.generate(requests_of(PROMPTS, GREEDY))
        assert tokens(got) == tokens(want) and tokens(got) != before
        for mine, theirs in zip(got, want, strict=True):
            assert mine[0].finish_reason == theirs[0].finish_reason
            assert mine[0].log_probs == pytest.approx(theirs[0].log_probs, abs=1e-4)
        before = tokens(got)
        update(model, 0.1)
        engine.load_weights(LocalWeights(model), version)
        builtin.load_weights(LocalWeights(model), version)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_without_the_repair_the_check_after_each_sync_finds_the_old_head(family, monkeypatch):
    model = model_of(family)
    engine = engine_for(model)
    if engine._llm.apply_model(lambda held: len(set(map(id, find_ends(held)))))[0] == 1:
        pytest.skip("this version of vLLM has one module for embedding and head, which its reload replaces")
    monkeypatch.setattr("steepest.rollout.engines.vllm._finish_head", lambda model: None)
    update(model, 0.1)
    with pytest.raises(RolloutError, match="vLLM's weights differ from the policy's in: head"):
        engine.load_weights(LocalWeights(model), 1)


def test_an_update_gives_what_a_fresh_engine_on_a_saved_folder_gives(tmp_path):
    vllm = importlib.import_module("vllm")
    model = model_of("llama")
    engine = engine_for(model)
    update(model, 0.1)
    engine.load_weights(LocalWeights(model), 1)
    got = engine.generate(requests_of(PROMPTS, GREEDY))
    model.hf.config.architectures = ["LlamaForCausalLM"]
    model.hf.save_pretrained(tmp_path)
    fresh = vllm.LLM(
        str(tmp_path), dtype="float32", skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        kv_cache_memory_bytes=2**26, seed=0,
    )  # fmt: skip
    params = vllm.SamplingParams(
        max_tokens=16, temperature=0, stop_token_ids=[END, OTHER_END], ignore_eos=True, detokenize=False
    )
    outputs = fresh.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    assert tokens(got) == [list(o.outputs[0].token_ids) for o in outputs]


@pytest.mark.parametrize("sampling", [
    SamplingParams(20, seed=1, n=2), SamplingParams(20, temperature=0.7, seed=2), SamplingParams(20, 1.6, seed=3),
], ids=["1.0", "0.7", "1.6"])  # fmt: skip
def test_log_probs_are_those_of_the_trainer_at_the_sampling_temperature(sampling):
    model = model_of()
    theirs, mine = scored(model, engine_for(model).generate(requests_of(PROMPTS, sampling)), sampling.temperature)
    assert (theirs - mine).abs().max() < 1e-4


def test_log_probs_of_filtered_sampling_are_renormalised():
    """As the builtin engine's: of the distribution sampled from, so above the whole distribution's."""
    model = model_of()
    answers = engine_for(model).generate(requests_of(PROMPTS, SamplingParams(20, top_k=3, seed=4, n=2)))
    for prompt, group in zip(PROMPTS, answers, strict=True):
        for answer in group:
            ids = torch.tensor([[*prompt, *answer.token_ids]])
            with torch.no_grad():
                model.hf.set_attn_implementation("eager")
                logits = model.hf(ids).logits[0, len(prompt) - 1 : -1]
                model.hf.set_attn_implementation("steepest")
            kept, places = logits.topk(3)
            picked = (places == torch.tensor(answer.token_ids)[:, None]).float()
            assert torch.all(picked.sum(1) == 1)
            want = (kept.log_softmax(-1) * picked).sum(1)
            assert torch.tensor(answer.log_probs) == pytest.approx(want, abs=1e-4)


def test_bf16_stays_within_rounding_of_the_float32_trainer():
    model = model_of()
    engine = engine_for(model, torch.bfloat16)
    theirs, mine = scored(model, engine.generate(requests_of(PROMPTS, SamplingParams(20, seed=1, n=4))), 1.0)
    found = mismatch_metrics(theirs[None], mine[None], torch.ones(1, len(mine), dtype=torch.bool))
    assert found["mismatch/mean_abs_diff"] < 0.06 and found["mismatch/ess"] > 0.95


def test_the_same_seed_gives_the_same_tokens_and_samples_differ():
    model = model_of()
    engine = engine_for(model)
    sampling = SamplingParams(16, n=3, seed=7)
    first = engine.generate(requests_of(PROMPTS, sampling))
    assert tokens(engine.generate(requests_of(PROMPTS, sampling))) == tokens(first)
    assert all(len({tuple(answer.token_ids) for answer in group}) > 1 for group in first)
    assert tokens(engine.generate(requests_of(PROMPTS, SamplingParams(16, n=3, seed=8)))) != tokens(first)


def test_every_end_token_ends_and_limits_hold():
    model = model_of()
    engine = engine_for(model)
    answers = [
        a for group in engine.generate(requests_of(PROMPTS, SamplingParams(40, 1.5, n=16, seed=3))) for a in group
    ]
    assert {a.token_ids[-1] for a in answers if a.finish_reason == "stop"} == {END, OTHER_END}
    assert all({END, OTHER_END}.isdisjoint(a.token_ids[:-1]) for a in answers)
    free = engine.generate(requests_of(PROMPTS, SamplingParams(40, ignore_eos=True, seed=3)))
    assert [len(group[0].token_ids) for group in free] == [min(40, 64 - len(p)) for p in PROMPTS]
    assert {group[0].finish_reason for group in free} == {"length"}


def test_long_prompts_in_parts_give_the_same_tokens():
    model = model_of()
    settings = VLLMSettings(max_num_batched_tokens=16)
    small = engine_for(model, settings=settings).generate(requests_of(PROMPTS, GREEDY))
    assert tokens(small) == tokens(loaded(BuiltinEngine, model, **options()).generate(requests_of(PROMPTS, GREEDY)))


def test_the_process_is_left_as_it_was():
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    engine = engine_for(model_of())
    engine.generate(requests_of(PROMPTS, GREEDY))
    assert (torch.get_num_threads(), torch.set_num_threads) == (threads, setter)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert "no sleep mode on the CPU" in engine.notes[-1]
    engine.sleep()
    engine.generate(requests_of(PROMPTS, GREEDY))


def test_a_model_from_a_quantised_file_is_plain_in_vllm():
    model = model_of("llama")
    model.hf.config.quantization_config = {"quant_method": "gguf"}
    engine = engine_for(model)
    del model.hf.config.quantization_config
    assert tokens(engine.generate(requests_of(PROMPTS, GREEDY))) == tokens(
        loaded(BuiltinEngine, model, **options()).generate(requests_of(PROMPTS, GREEDY))
    )


def test_vllms_own_words_reach_the_user(monkeypatch):
    with pytest.raises(RolloutError, match="vLLM could not start: .*no_such_argument.*steepest doctor"):
        start_engine(ModelDescription.of(model_of()), **options(settings=VLLMSettings(extra={"no_such_argument": 1})))
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RolloutError, match="VLLM_ENABLE_V1_MULTIPROCESSING=1 in the environment"):
        start_engine(ModelDescription.of(model_of()), **options())
