"""The contract's types: bad values are refused in words, names load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from steepest.errors import ConfigError, RolloutError
from steepest.rollout import ROLLOUT_ENGINES, SamplingParams
from steepest.rollout.api import GenerationRequest
from steepest.rollout.requests import check_requests, generate_in_groups, group_by_sampling
from tests.support.rollout_requests import requests_of


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"n": 0}]
)
def test_sampling_values_out_of_range_are_refused(bad):
    (name,) = bad
    with pytest.raises(RolloutError, match=f"sampling: {name}="):
        SamplingParams(**{"max_tokens": 4, **bad})


def check(*requests):
    check_requests(requests, 4, engine="builtin")


ONE = SamplingParams(4)


def test_prompts_need_a_token_and_room():
    check(*requests_of([[1], [1, 2, 3]], ONE))
    with pytest.raises(RolloutError, match="request 1 has an empty prompt"):
        check(*requests_of([[1], []], ONE))
    with pytest.raises(RolloutError, match="request 0 has a prompt of 4 tokens and max_model_len is 4"):
        check(*requests_of([[1, 2, 3, 4]], ONE))


def test_a_request_id_that_comes_twice_is_refused():
    check(GenerationRequest([1], ONE, "a"), GenerationRequest([1], ONE, "b", session_id="s"))
    with pytest.raises(RolloutError, match="request a was given twice: a request_id has to be unique"):
        check(GenerationRequest([1], ONE, "a"), GenerationRequest([2], ONE, "b"), GenerationRequest([3], ONE, "a"))


def test_media_is_refused_by_name_where_the_engine_reads_tokens_only():
    check(GenerationRequest([1], ONE, "a", media={}))
    with pytest.raises(RolloutError, match=r"request a has media \(pixel_values\), and the builtin engine reads token"):
        check(GenerationRequest([1], ONE, "a", media={"pixel_values": object()}))


def test_groups_of_equal_sampling_keep_the_numbers_that_samples_have_in_the_call():
    two, other = SamplingParams(4, n=2), SamplingParams(4, n=3, temperature=0.5)
    samplings = [two, other, SamplingParams(4, n=2), ONE]  # the third is equal to the first
    requests = [GenerationRequest([place], sampling, str(place)) for place, sampling in enumerate(samplings)]
    first, second, third = group_by_sampling(requests)
    assert (first.sampling, first.places, first.samples) == (two, [0, 2], [0, 1, 5, 6])
    assert (second.sampling, second.places, second.samples) == (other, [1], [2, 3, 4])
    assert (third.sampling, third.places, third.samples) == (ONE, [3], [7])
    asked = []

    def generate(group):
        asked.append(group.places)
        return [[request.token_ids[0]] * group.sampling.n for request in group.requests]

    assert generate_in_groups(requests, generate) == [[0, 0], [1, 1, 1], [2, 2], [3]]
    assert asked == [[0, 2], [1], [3]]
    assert generate_in_groups([], generate) == []


def test_engine_names_are_known_without_torch():
    code = "import sys, steepest.rollout as r; print(r.ROLLOUT_ENGINES.names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, _, loaded = out.strip().rpartition(" ")
    assert loaded == "False" and "'builtin'" in names and "'hf'" in names
    with pytest.raises(ConfigError, match="Did you mean 'builtin'"):
        ROLLOUT_ENGINES.get("bultin")
