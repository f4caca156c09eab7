"""While an engine generates, it counts the responses that have ended, over all samplings of the call."""

from __future__ import annotations

import pytest

from steepest.progress import STEP, Activity
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.engines.hf import HFEngine
from tests.support.rollout_requests import loaded
from tests.support.tiny_models import END, random_ids, tiny_lm


class Counts:
    """The name, the total and every count of the activities it hears of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None]] = []
        self.counts: list[int] = []

    def began(self, activity: Activity) -> None:
        self.seen.append((activity.name, activity.total))

    def changed(self, activity: Activity) -> None:
        self.counts.append(activity.done)

    def ended(self, activity: Activity) -> None:
        self.seen.append((activity.name, None))


@pytest.mark.parametrize("engine", [BuiltinEngine, HFEngine])
def test_an_engine_counts_the_responses_that_have_ended(engine) -> None:
    options = {"end_token_ids": (END,), "pad_token_id": END, "max_model_len": 64, "max_num_seqs": 4}
    samplings = [SamplingParams(6, n=2, seed=4)] * 3 + [SamplingParams(3, temperature=0.0)] * 2
    prompts = random_ids([3, 9, 3, 5, 4])
    requests = [
        GenerationRequest(prompt, sampling, str(place))
        for place, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    counts = Counts()
    with STEP.heard_by(counts):
        loaded(engine, tiny_lm(), **options).generate(requests)
    assert counts.seen == [("gen", 8), ("gen", None)]  # 3 x 2 + 2 x 1
    assert counts.counts == sorted(counts.counts) and counts.counts[-1] == 8
    assert 0 < min(filter(None, counts.counts)) < 8  # in more than one portion
