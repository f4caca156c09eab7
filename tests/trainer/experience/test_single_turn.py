"""From prompts to rows: seeds of steps, order of prompts, pairing with a real engine, engines that break their word."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from steepest.core.advantages import AdvantageInputs, grpo
from steepest.data.sampler import PromptSampler
from steepest.errors import RolloutError
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.trainer.experience.single_turn import StepRollouts, generate_batch, step_seed
from tests.support.fake_parts import EchoEngine, prompt
from tests.support.rollout_requests import loaded
from tests.support.tiny_models import VOCABULARY, tiny_lm


def test_a_step_asks_for_the_samplers_prompts_with_a_seed_of_its_own():
    engine, sampling = EchoEngine(), SamplingParams(max_tokens=1, n=2, seed=7)
    sampler = PromptSampler(10, 4, seed=3)
    rollouts = StepRollouts(engine, [prompt(n) for n in range(10)], sampler, sampling, pad_id=0)
    for step in (1, 2, 3, 2):  # two steps an epoch: step 3 begins the second; step 2 is asked for again
        batch = rollouts(step)
        assert [s.uid for s in batch.samples[::2]] == [f"rows:{i}" for i in sampler.indices(step - 1)]
    asked = [rows for rows, _ in engine.calls]
    seeds = [params.seed for _, params in engine.calls]
    assert sorted(asked[0] + asked[1])[0:8] == sorted(set(asked[0] + asked[1]))  # an epoch takes no prompt twice
    assert len(set(seeds)) == 3 and seeds[3] == seeds[1] and asked[3] == asked[1]
    assert all(params.n == 2 and params.max_tokens == 1 for _, params in engine.calls)


def test_seeds_of_neighbouring_runs_and_steps_never_meet():
    # Trap 32: seed 0 at step 5 must not draw what seed 1 draws at step 4
    seen = Counter(step_seed(seed, step) for seed in range(50) for step in range(2000))
    assert max(seen.values()) == 1
    assert step_seed(2**62, 9) < 2**63  # fits where seeds go


class Forgetful(EchoEngine):
    """Breaks the protocol in one way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def generate(self, requests):
        made = super().generate(requests)
        if self.how == "a prompt":
            del made[1]
        elif self.how == "a sample":
            del made[1][0]
        elif self.how == "all tokens":
            made[1][0] = replace(made[1][0], token_ids=[], log_probs=[])
        elif self.how == "a log-prob":
            made[1][0] = replace(made[1][0], token_ids=[5, 6], log_probs=[-1.0])
        elif self.how == "the order":
            made.reverse()
        elif self.how == "the work":
            made[1][1] = replace(made[1][1], token_ids=[], log_probs=[], finish_reason="abort")
        return made


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("a prompt", "answered 2 prompts of 3"),
        ("a sample", "gave 1 responses to prompt rows:1#1, asked for 2"),
        ("the order", "answered request rows:2#2 in the place of prompt rows:0#0"),
        (
            "the work",
            "aborted the response to prompt rows:1#1 after 0 tokens. An incomplete response is not trained on",
        ),
        ("all tokens", "gave prompt rows:1#1 a response of 0 tokens"),
        ("a log-prob", "a response of 2 tokens with 1 log-probs"),
    ],
)
def test_an_engine_that_breaks_its_word_is_named_and_pairs_nothing(how, words):
    with pytest.raises(RolloutError, match=words):
        generate_batch(Forgetful(how), [prompt(n) for n in range(3)], SamplingParams(max_tokens=2, n=2), pad_id=0)


def parrot():
    """A model that repeats the last token it read, so a response names its prompt."""
    model = tiny_lm()

    def hidden_states(ids, positions, context):
        if hasattr(context, "shapes"):  # the engine's question for the size of its cache
            context.shapes.update({0: (1, 1, 1)})
        return F.one_hot(ids, VOCABULARY) * 9.0

    model.hidden_states = hidden_states
    model.logits = lambda hidden: hidden * 10.0
    return model


@pytest.mark.parametrize("max_num_seqs", [3, 7, 256])
def test_every_response_stands_beside_its_prompt_with_the_real_engine(max_num_seqs):
    """Trap 23: reward = f(prompt). Prompts repeat, come in any order, lengths differ, groups are cut by the slots."""
    numbers = [9, 4, 4, 30, 9, 17, 5, 4, 22, 9, 11]
    prompts = [prompt(n) for n in numbers]
    options = {"end_token_ids": (), "pad_token_id": 0, "max_model_len": 8, "max_num_seqs": max_num_seqs}
    engine = loaded(BuiltinEngine, parrot(), **options)
    batch = generate_batch(engine, prompts, SamplingParams(max_tokens=3, n=4, seed=1), pad_id=0)
    assert batch.responses.tolist() == [[n] * 3 for n in numbers for _ in range(4)]
    assert [int(s.ground_truth) for s in batch.samples] == [n for n in numbers for _ in range(4)]
    assert batch.group_ids.tolist() == [i for i in range(len(numbers)) for _ in range(4)]
    # a reward that depends on the prompt alone has no advantage in any group; one row astray would give it one
    rewards = torch.zeros(batch.responses.shape)
    rewards[:, -1] = batch.responses[:, -1].float()
    inputs = AdvantageInputs(rewards, batch.response_mask, group_ids=batch.group_ids)
    assert not grpo(inputs)[0].any()
    astray = AdvantageInputs(rewards.roll(1, 0), batch.response_mask, group_ids=batch.group_ids)
    assert grpo(astray)[0].any()  # the control
