"""Generation on the device: the CPU's tokens from the CPU's seeds, greedy and sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steepest.devices import select_device
from steepest.rollout.api import Completion, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.hf import HFEngine
from steepest.rollout.weights import LocalWeights
from tests.npu.jobs import ON_STAND_IN
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, OTHER_END, random_ids, tiny_lm

pytestmark = pytest.mark.npu

PROMPTS = random_ids([5, 1, 9, 3], seed=1)
SHARED: dict[str, Any] = {"end_token_ids": (END, OTHER_END), "pad_token_id": 0, "max_model_len": 40}


def flat(answers: list[list[Completion]]) -> list[Completion]:
    return [answer for group in answers for answer in group]


def assert_same(found: list[list[Completion]], want: list[list[Completion]]) -> None:
    """The same tokens; on a card the first ones, since its rounding may choose another word later on."""
    places = None if ON_STAND_IN else 1
    assert [c.token_ids[:places] for c in flat(found)] == [c.token_ids[:places] for c in flat(want)]
    for mine, theirs in zip(flat(found), flat(want), strict=True):
        near = pytest.approx(theirs.log_probs[:places], abs=1e-4 if ON_STAND_IN else 1e-2)
        assert mine.log_probs[:places] == near


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(16, temperature=0.0),
        SamplingParams(16, n=3, seed=5),
        SamplingParams(16, n=3, seed=5, temperature=0.7, top_p=0.8, top_k=20),
        SamplingParams(20, n=2, seed=5, ignore_eos=True),
    ],
    ids=["greedy", "sampled", "filtered", "to the last place"],
)
def test_the_builtin_engine_draws_the_cpus_tokens(family: str, sampling: SamplingParams, device: str) -> None:
    model = tiny_lm(family)
    want = loaded(BuiltinEngine, model, **SHARED).generate(requests_of(PROMPTS, sampling))
    engine = loaded(BuiltinEngine, model.to(device), max_num_seqs=3, **SHARED)
    assert_same(engine.generate(requests_of(PROMPTS, sampling)), want)
    assert_same(engine.generate(requests_of(PROMPTS, sampling)), want)  # buffers used again


def test_the_copy_in_bfloat16_follows_the_weights(device: str) -> None:
    model = tiny_lm().to(device)
    engine = loaded(BuiltinEngine, model, dtype=torch.bfloat16, **SHARED)
    before = engine.generate(requests_of(PROMPTS, SamplingParams(8, temperature=0.0)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    engine.load_weights(LocalWeights(model), 1)
    after = engine.generate(requests_of(PROMPTS, SamplingParams(8, temperature=0.0)))
    fresh = loaded(BuiltinEngine, model, version=1, dtype=torch.bfloat16, **SHARED).generate(
        requests_of(PROMPTS, SamplingParams(8, temperature=0.0))
    )
    assert flat(after) == flat(fresh) and flat(after) != flat(before)


def test_the_hf_engine_agrees_and_leaves_the_random_numbers_alone(device: str) -> None:
    model, greedy = tiny_lm().to(device), SamplingParams(8, temperature=0.0)
    chosen, engine = select_device(device), loaded(HFEngine, model, **SHARED)
    assert_same(
        engine.generate(requests_of(PROMPTS, greedy)),
        loaded(BuiltinEngine, model, **SHARED).generate(requests_of(PROMPTS, greedy)),
    )
    before = chosen.rng_state()
    first = engine.generate(requests_of(PROMPTS, SamplingParams(8, n=2, seed=3)))
    after = chosen.rng_state()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.randn(3, device=device)
    again, other = (engine.generate(requests_of(PROMPTS, SamplingParams(8, n=2, seed=seed))) for seed in (3, 4))
    assert first == again != other
