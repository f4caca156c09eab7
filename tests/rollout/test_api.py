"""The contract's types: bad values are refused in words, names load no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from steepest.errors import ConfigError, RolloutError
from steepest.rollout import ROLLOUT_ENGINES, SamplingParams
from steepest.rollout.api import check_prompts


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"n": 0}]
)
def test_sampling_values_out_of_range_are_refused(bad):
    (name,) = bad
    with pytest.raises(RolloutError, match=f"sampling: {name}="):
        SamplingParams(**{"max_tokens": 4, **bad})


def test_prompts_need_a_token_and_room():
    check_prompts([[1], [1, 2, 3]], 4)
    with pytest.raises(RolloutError, match="prompt 1 is empty"):
        check_prompts([[1], []], 4)
    with pytest.raises(RolloutError, match="prompt 0 has 4 tokens and max_model_len is 4"):
        check_prompts([[1, 2, 3, 4]], 4)


def test_engine_names_are_known_without_torch():
    code = "import sys, steepest.rollout as r; print(r.ROLLOUT_ENGINES.names(), 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names, _, loaded = out.strip().rpartition(" ")
    assert loaded == "False" and "'builtin'" in names and "'hf'" in names
    with pytest.raises(ConfigError, match="Did you mean 'builtin'"):
        ROLLOUT_ENGINES.get("bultin")
