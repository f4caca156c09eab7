"""The prototype of drafts changes no response, its noise is exact, and the sums of over-sampling are right."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest
import torch
from torch.nn import functional as F

from bench.drafts import DraftEngine, noise_keys, parting, race
from bench.long_tail import Cost, Steps, play
from steepest.rollout.api import SamplingParams
from steepest.rollout.weights import LocalWeights
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, FAMILIES, OTHER_END, VOCABULARY, random_ids, tiny_lm

PROMPTS = random_ids([3, 9, 1, 6, 4, 2, 12])
N = 2
NONE = [[[]] * N] * len(PROMPTS)


def engine_for(model, **options):
    base = {"end_token_ids": (END, OTHER_END), "pad_token_id": END, "max_model_len": 64}
    return loaded(DraftEngine, model, **{**base, **options})


def generate(engine, drafts=NONE, *, passes=None, **sampling):
    requests = requests_of(PROMPTS, SamplingParams(30, n=N, **sampling))
    return engine.generate_from(requests, list(range(7)), drafts, **(passes or {}))


def tokens_of(answers):
    return [[answer.token_ids for answer in group] for group in answers]


def assert_same(found, wanted):
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        torch.testing.assert_close(torch.tensor(one.log_probs), torch.tensor(other.log_probs), atol=1e-5, rtol=1e-5)


def spoiled(answers, how):
    rng = random.Random(0)
    made = tokens_of(answers)
    for group in made:
        for i, draft in enumerate(group):
            place = rng.randrange(len(draft))
            group[i] = {
                "one wrong token": [*draft[:place], (draft[place] + 1) % VOCABULARY, *draft[place + 1 :]],
                "cut": draft[:place],
                "too long": draft + [7] * 100,
                "foreign": [rng.randrange(VOCABULARY) for _ in range(40)],
                "ends early": [*draft[:place], END, *draft[place:]],
            }[how]
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_drafts_spare_every_decoding_step(family):
    engine = engine_for(tiny_lm(family))
    plain = generate(engine)
    assert engine.stats.decode_steps > 10
    assert_same(generate(engine, tokens_of(plain)), plain)
    total = sum(len(ids) for group in tokens_of(plain) for ids in group)
    assert engine.stats.decode_steps == 0
    assert (engine.run.computed, engine.run.reused) == (total - 14, total - 14)  # a row's first token is no draft's


@pytest.mark.parametrize("how", ["one wrong token", "cut", "too long", "foreign", "ends early"])
@pytest.mark.parametrize(("ignore_eos", "least"), [(True, 3), (False, 16)])
def test_spoiled_drafts_change_nothing(how, ignore_eos, least):
    passes = {"least": least, "pass_tokens": least}
    model = tiny_lm("llama")
    plain = generate(engine_for(model), ignore_eos=ignore_eos)
    for slots in (3, 14):
        engine = engine_for(model, max_num_seqs=slots)
        assert_same(generate(engine, spoiled(plain, how), passes=passes, ignore_eos=ignore_eos), plain)
        assert engine.run.reused <= engine.run.computed


def test_drafts_of_the_old_policy_give_what_the_new_one_samples():
    model = tiny_lm("qwen2")
    engine = engine_for(model)
    old = generate(engine)
    with torch.no_grad():
        for weight in model.hf.parameters():
            weight *= 1.05
    engine.load_weights(LocalWeights(model), 1)
    new = generate(engine)
    assert tokens_of(new) != tokens_of(old)
    assert_same(generate(engine, tokens_of(old)), new)
    assert 0 < engine.run.reused < engine.run.computed


def test_the_race_is_exact_and_its_draws_are_independent():
    rows, vocab = 100_000, 50
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 2
    token, log_prob = race(logits.expand(rows, -1).clone(), noise_keys(torch.arange(1000), 100).flatten())
    want = F.log_softmax(logits, -1)
    torch.testing.assert_close(log_prob, want[token], atol=2e-6, rtol=1e-5)
    table = token.view(-1, 100)
    pairs = [(table[:, :-1], table[:, 1:]), (table[:-1], table[1:])]  # places of a row, rows of a place
    for found, wanted in [(torch.bincount(token, minlength=vocab), want.exp() * rows)] + [
        (torch.bincount(a.flatten() * vocab + b.flatten(), minlength=vocab**2),
         (want[:, None] + want).exp().flatten() * a.numel()) for a, b in pairs
    ]:  # fmt: skip
        cells = wanted >= 5
        chi_square = float(((found - wanted) ** 2 / wanted)[cells].sum())
        assert chi_square < cells.sum() + 4 * math.sqrt(2 * cells.sum())


def test_parting_is_what_the_race_does():
    rows, vocab = 20_000, 300
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(1, vocab, generator=generator) * 2
    new = old + 0.05 * torch.randn(1, vocab, generator=generator)
    keys = noise_keys(torch.arange(200), 100).flatten()
    apart = [race(x.expand(rows, -1).clone(), keys)[0] for x in (old, new)]
    seen = float((apart[0] != apart[1]).float().mean())
    said = {name: float(x) for name, x in parting(old.double().softmax(-1), new.double().softmax(-1)).items()}
    assert seen == pytest.approx(said["race"], abs=4 * math.sqrt(said["race"] / rows))
    assert said["TV"] < said["race"] < 2 * said["TV"] < 4 * said["TV"] < said["inverse CDF"]
    uniform = (torch.arange(rows) + 0.5) / rows
    places = [torch.searchsorted(x.double().softmax(-1).cumsum(-1)[0], uniform.double()) for x in (old, new)]
    assert float((places[0] != places[1]).float().mean()) == pytest.approx(said["inverse CDF"], abs=0.01)


def test_over_sampling_worked_out_by_hand():
    # 2 rows of length 4 each: 4 steps of 10 + 2 rows x 1, prompts of 3 prefilled at 0.5 a token
    assert play(Cost(10.0, 1.0, 0.0, 0.5), [4], 3, 2, 1.0) == ((2 * 3 * 0.5 + 4 * 12) / 8, 0.0)
    # all rows equally long: starting more of them only finds them all finished at once
    a_token, old = play(Cost(10.0, 1.0, 0.0, 0.5), [4], 3, 2, 2.0)
    assert (a_token, old) == ((4 * 3 * 0.5 + 4 * 14) / 16, 0.0)
    # a long tail, and steps that cost the same whatever they hold: over-sampling pays, and leaves older tokens
    cost, lengths = Cost(10.0, 0.01, 0.0, 0.01), [10] * 9 + [200]
    plain, none = play(cost, lengths, 3, 32, 1.0)
    more, older = play(cost, lengths, 3, 32, 1.5)
    assert more < 0.7 * plain and none == 0 and 0 < older < 1


def test_the_fit_finds_what_a_step_costs():
    rng = random.Random(0)
    steps = Steps()
    for _ in range(50):
        rows, position = rng.randint(1, 32), rng.uniform(100, 400)
        steps.seen.append((rows, position, 0.05 + 0.003 * rows + 1e-5 * rows * position))
    assert steps.fit() == pytest.approx((0.05, 0.003, 1e-5), rel=1e-6)
