"""The in-process engine against the trainer's log-probs, against itself, and against its promises."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from steepest.core.batch import Batch
from steepest.errors import RolloutError
from steepest.models.attention import attention_implementation
from steepest.models.packing import pack_batch, scatter
from steepest.rollout.api import SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.weights import LocalWeights
from tests.support.rollout_requests import loaded, requests_of
from tests.support.tiny_models import END, FAMILIES, OTHER_END, random_ids, tiny_critic, tiny_lm

PROMPTS = random_ids([3, 9, 1, 6, 4, 2, 12, 5])


def engine_for(model, **options):
    base = {"end_token_ids": (END, OTHER_END), "pad_token_id": END, "max_model_len": 64}
    return loaded(BuiltinEngine, model, **{**base, **options})


def flatten(result):
    return [c for group in result for c in group]


def as_batch(prompts, completions, n=1):
    return Batch.from_sequences(
        [p for p in prompts for _ in range(n)],
        [c.token_ids for c in completions],
        group_ids=[i for i in range(len(prompts)) for _ in range(n)],
        truncated=[c.finish_reason == "length" for c in completions],
        rollout_log_probs=[c.log_probs for c in completions],
        pad_id=END,
    )


def trainer_log_probs(model, batch, temperature=1.0):
    packed = pack_batch(batch, batch.response_mask)
    with torch.no_grad():
        return scatter(model.log_probs(packed, temperature=temperature)[0], packed, tuple(batch.responses.shape))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_log_probs_agree(family, temperature):
    model = tiny_lm(family)
    sampling = SamplingParams(24, temperature=temperature, n=2, seed=5)
    made = flatten(engine_for(model, max_num_seqs=5).generate(requests_of(PROMPTS, sampling)))
    batch = as_batch(PROMPTS, made, 2)
    assert int(batch.response_lengths.min()) < 24 and bool(batch.truncated.any())
    difference = (batch.rollout_log_probs - trainer_log_probs(model, batch, temperature)).abs()[batch.response_mask]
    assert float(difference.max()) < 5e-5
    if temperature != 1.0:  # and it is the temperature that was applied
        raw = (batch.rollout_log_probs - trainer_log_probs(model, batch)).abs()[batch.response_mask]
        assert float(raw.mean()) > 0.05


def test_values_know_nothing_of_temperature():
    critic, prompts = tiny_critic(), PROMPTS[:2]
    batches = []
    for temperature in (1.0, 0.3):
        made = flatten(
            engine_for(tiny_lm()).generate(requests_of(prompts, SamplingParams(1, temperature=temperature, seed=3)))
        )
        batches.append(as_batch(prompts, made))
    first, second = (critic.values(pack_batch(b, b.response_mask))[0] for b in batches)
    assert torch.equal(first, second)  # one token each: the states before it are the prompts, equal for both


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, -1), (1.0, 4), (0.8, 10)])
def test_filtered_sampling_gives_log_probs_of_the_renormalised_distribution(top_p, top_k):
    model = tiny_lm()
    sampling = SamplingParams(8, temperature=0.9, top_p=top_p, top_k=top_k)
    for prompt, group in zip(PROMPTS, engine_for(model).generate(requests_of(PROMPTS, sampling)), strict=True):
        for completion in group:
            sequence = list(prompt)
            for token, log_prob in zip(completion.token_ids, completion.log_probs, strict=True):
                log_p = next_log_probs(model, sequence, 0.9)
                order = log_p.argsort(descending=True)[: top_k if top_k > 0 else None]
                share = log_p[order].exp() / log_p[order].exp().sum()
                order = order[(share.cumsum(0) - share) < top_p]
                place = order.tolist().index(token)  # fails where a token was cut
                assert F.log_softmax(log_p[order], -1)[place].item() == pytest.approx(log_prob, abs=2e-5)
                sequence.append(token)


@torch.no_grad()
def next_log_probs(model, sequence, temperature=1.0):
    """(V,) by transformers alone."""
    with attention_implementation(model.hf, "eager"):
        logits = model.hf(input_ids=torch.tensor([sequence])).logits[0, -1]
    return F.log_softmax(logits.double() / temperature, -1)


def test_fp32_mismatch_is_zero_up_to_rounding():
    from steepest.core.mismatch import mismatch_metrics

    model = tiny_lm()
    batch = as_batch(PROMPTS, flatten(engine_for(model).generate(requests_of(PROMPTS, SamplingParams(24)))))
    found = mismatch_metrics(batch.rollout_log_probs, trainer_log_probs(model, batch), batch.response_mask)
    assert abs(found["mismatch/kl"]) < 1e-6 and found["mismatch/ess"] == pytest.approx(1.0, abs=1e-5)


def test_every_end_id_ends_and_is_kept():
    made = flatten(engine_for(tiny_lm()).generate(requests_of(PROMPTS, SamplingParams(40, n=8))))
    last = Counter(c.token_ids[-1] for c in made if c.finish_reason == "stop")
    assert set(last) == {END, OTHER_END} and min(last.values()) > 3
    for c in made:
        assert not {END, OTHER_END} & set(c.token_ids[:-1])
        assert len(c.token_ids) == len(c.log_probs) <= 40
        assert (c.finish_reason == "length") == (len(c.token_ids) == 40 and c.token_ids[-1] not in (END, OTHER_END))


def test_mask_of_a_hand_made_case_with_pad_equal_to_an_end_token():
    model = scripted({7: 10, 10: 11, 11: END, 8: 12, 12: 13, 13: 14, 14: OTHER_END, 9: END})
    made = flatten(engine_for(model).generate(requests_of([[7], [8], [9]], SamplingParams(6, temperature=0.0))))
    assert [c.token_ids for c in made] == [[10, 11, END], [12, 13, 14, OTHER_END], [END]]
    assert [c.finish_reason for c in made] == ["stop"] * 3
    mask = as_batch([[7], [8], [9]], made).response_mask
    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def scripted(following):
    """A model whose next token depends on the last one only, through a table."""
    model = tiny_lm()

    def hidden_states(ids, positions, context):
        if hasattr(context, "shapes"):  # the engine's question for the size of its cache
            context.shapes.update({0: (1, 1, 1)})
        return F.one_hot(torch.tensor([following.get(token, 0) for token in ids.tolist()]), 61) * 9.0

    model.hidden_states = hidden_states
    model.logits = lambda hidden: hidden.clone()
    return model


def test_ignore_eos_runs_to_the_limit():
    made = flatten(engine_for(tiny_lm()).generate(requests_of(PROMPTS, SamplingParams(30, ignore_eos=True))))
    assert all(len(c.token_ids) == 30 and c.finish_reason == "length" for c in made)
    assert any(END in c.token_ids[:-1] for c in made)


def test_model_length_cuts_a_response():
    made = flatten(
        engine_for(tiny_lm(), max_model_len=13).generate(requests_of(PROMPTS, SamplingParams(30, ignore_eos=True)))
    )
    assert [len(c.token_ids) for c in made] == [13 - len(p) for p in PROMPTS]


def test_same_seed_same_tokens_and_samples_of_a_prompt_differ():
    engine = engine_for(tiny_lm())
    prompts = [PROMPTS[0]] * 2
    first = engine.generate(requests_of(prompts, SamplingParams(20, n=3, seed=11)))
    assert engine.generate(requests_of(prompts, SamplingParams(20, n=3, seed=11))) == first
    assert len({tuple(c.token_ids) for c in flatten(first)}) == 6
    assert engine.generate(requests_of(prompts, SamplingParams(20, n=3, seed=12))) != first


def test_tokens_do_not_depend_on_how_many_run_at_once_nor_on_max_tokens():
    model, sampling = tiny_lm(), SamplingParams(20, n=3, seed=2)
    want = [c.token_ids for c in flatten(engine_for(model).generate(requests_of(PROMPTS, sampling)))]
    for max_num_seqs in (1, 5, 7):
        got = engine_for(model, max_num_seqs=max_num_seqs).generate(requests_of(PROMPTS, sampling))
        assert [c.token_ids for c in flatten(got)] == want
    shorter = engine_for(model).generate(requests_of(PROMPTS, SamplingParams(7, n=3, seed=2)))
    assert [c.token_ids for c in flatten(shorter)] == [ids[:7] for ids in want]


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["ending", "to the last place"])
def test_dropping_rows_late_changes_nothing(ignore_eos):
    """An accelerator looks every eighth step only; rows that have ended, or are as long as can be, stay until then."""
    model, sampling = tiny_lm(), SamplingParams(30, n=3, seed=2, ignore_eos=ignore_eos)
    want = engine_for(model, max_num_seqs=9).generate(requests_of(PROMPTS, sampling))
    from steepest.rollout.builtin import engine as module

    class Late(module.Generation):
        def __init__(self, *args):
            super().__init__(*args)
            self._sync_every = 8

    original, module.Generation = module.Generation, Late
    try:
        got = engine_for(model, max_num_seqs=9).generate(requests_of(PROMPTS, sampling))
    finally:
        module.Generation = original
    for mine, theirs in zip(flatten(got), flatten(want), strict=True):
        assert mine.token_ids == theirs.token_ids and mine.finish_reason == theirs.finish_reason
        assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-5)


def test_sampled_frequencies_follow_the_policy():
    model, rows = tiny_lm(vocab_size=13), 4000
    made = flatten(
        engine_for(model, end_token_ids=()).generate(requests_of([[5, 7]], SamplingParams(1, n=rows, seed=1)))
    )
    counts = torch.tensor([Counter(c.token_ids[0] for c in made)[v] for v in range(13)], dtype=torch.double)
    p = next_log_probs(model, [5, 7]).exp()
    likely = p * rows >= 5
    expected = torch.cat([p[likely], p[~likely].sum()[None]]) * rows
    seen = torch.cat([counts[likely], counts[~likely].sum()[None]])
    keep = expected > 0
    chi_square = float(((seen - expected) ** 2 / expected)[keep].sum())
    degrees = int(keep.sum()) - 1
    assert degrees >= 4 and chi_square < degrees + 4 * math.sqrt(2 * degrees)  # about 1 in 10,000; the seed is fixed


def test_prompts_are_prefilled_once_for_all_their_samples():
    engine = engine_for(tiny_lm())
    engine.generate(requests_of([PROMPTS[1], PROMPTS[1], PROMPTS[3]], SamplingParams(4, n=5)))
    assert engine.stats.prefill_tokens == len(PROMPTS[1]) + len(PROMPTS[3])
    assert engine.stats.decode_steps <= 3 and engine.stats.generated_tokens > 0


def sgd_step(model):
    """An update as a trainer makes it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = as_batch([[3, 4]], flatten([[fake(5)]]))
    model.log_probs(pack_batch(batch, batch.response_mask))[0].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def fake(token):
    from steepest.rollout.api import Completion

    return Completion([token], [0.0], "length", 0, "0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_an_update_greedy_tokens_are_those_of_a_fresh_engine(dtype):
    model, sampling = tiny_lm(), SamplingParams(20, temperature=0.0, ignore_eos=True)
    engine = engine_for(model, dtype=dtype)
    before = engine.generate(requests_of(PROMPTS, sampling))
    sgd_step(model)
    engine.load_weights(LocalWeights(model), 1)
    after = engine.generate(requests_of(PROMPTS, sampling))
    assert after != before
    assert after == engine_for(model, dtype=dtype, version=1).generate(requests_of(PROMPTS, sampling))


def test_stale_weights_are_refused_by_an_engine_with_a_copy_and_impossible_without():
    model, sampling = tiny_lm(), SamplingParams(2)
    copying = [engine_for(model, dtype=torch.bfloat16), engine_for(model)]
    sharing = engine_for(model, packed_share=0.0)
    assert sharing.shares_weights and not any(engine.shares_weights for engine in copying)
    for engine in copying:
        engine.load_weights(LocalWeights(model), 3)
    sgd_step(model)
    for engine in copying:
        with pytest.raises(RolloutError, match=r"changed after version 3 .* load_weights\(\)"):
            engine.generate(requests_of(PROMPTS, sampling))
    fresh = engine_for(tiny_lm_like(model)).generate(requests_of(PROMPTS, sampling))
    assert sharing.generate(requests_of(PROMPTS, sampling)) == fresh


def tiny_lm_like(model):
    other = tiny_lm(seed=99)
    other.load_state_dict(model.state_dict())
    return other


def test_training_goes_on_after_generation_with_mode_and_gradients_untouched():
    model = tiny_lm().train()
    engine_for(model).generate(requests_of(PROMPTS, SamplingParams(4)))
    assert model.training and all(p.requires_grad and not p.is_inference() for p in model.parameters())
    sgd_step(model)


def test_kv_buffers_are_reused_and_sleep_frees_them():
    engine = engine_for(tiny_lm())
    first = engine.generate(requests_of(PROMPTS, SamplingParams(20)))
    held = engine.stats.kv_bytes
    assert held == len(PROMPTS) * (12 + 20) * engine._cache.bytes_per_token
    engine.generate(requests_of(PROMPTS[:2], SamplingParams(5)))
    assert engine.stats.kv_bytes == held
    engine.sleep()
    assert engine._cache.allocated_bytes == 0 and engine._network.copied_bytes == 0
    assert engine.generate(requests_of(PROMPTS, SamplingParams(20))) == first


def test_kv_budget_bounds_how_many_run_and_refuses_what_cannot_run():
    model, sampling = tiny_lm(), SamplingParams(20)
    roomy = engine_for(model)
    want = roomy.generate(requests_of(PROMPTS, sampling))
    per_sequence = 32 * roomy._cache.bytes_per_token
    tight = engine_for(model, kv_memory_bytes=per_sequence * 2)
    assert [c.token_ids for c in flatten(tight.generate(requests_of(PROMPTS, sampling)))] == [
        c.token_ids for c in flatten(want)
    ]
    assert tight.stats.kv_bytes == per_sequence * 2
    with pytest.raises(RolloutError, match="one sequence of 32 tokens needs"):
        engine_for(model, kv_memory_bytes=per_sequence - 1).generate(requests_of(PROMPTS, sampling))


def test_damaged_weights_are_an_error_and_leave_no_trace():
    model = tiny_lm()
    engine = engine_for(model)
    want = engine.generate(requests_of(PROMPTS, SamplingParams(6)))
    saved = model.hf.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.hf.model.norm.weight.fill_(float("nan"))
    engine.load_weights(LocalWeights(model), 1)
    with pytest.raises(RolloutError, match="NaN or infinite logits for request 0"):
        engine.generate(requests_of(PROMPTS, SamplingParams(6)))
    with torch.no_grad():
        model.hf.model.norm.weight.copy_(saved)
    engine.load_weights(LocalWeights(model), 0)
    assert engine.generate(requests_of(PROMPTS, SamplingParams(6))) == want


def test_no_prompts_no_completions():
    assert engine_for(tiny_lm()).generate(requests_of([], SamplingParams(4))) == []


def test_ids_reach_the_trainer_although_their_text_encodes_otherwise(tmp_path):
    """A tokenizer under which decode and encode is not the identity: the engine's ids are what is trained on."""
    from steepest.models.load import load_causal_lm, load_tokenizer
    from tests.support.tiny_models import tiny_folder

    folder = tiny_folder(tmp_path)
    tokenizer, model = load_tokenizer(folder), load_causal_lm(folder)
    prompts = [tokenizer(f"What is {i} + {i}?")["input_ids"] for i in range(12)]
    made = flatten(engine_for(model, end_token_ids=[2]).generate(requests_of(prompts, SamplingParams(12))))
    texts = [tokenizer.decode(c.token_ids, skip_special_tokens=False) for c in made]
    changed = [tokenizer(t)["input_ids"] != c.token_ids for t, c in zip(texts, made, strict=True)]
    assert sum(changed) >= 2  # random words run together, so re-encoding would change some rows
    batch = as_batch(prompts, made)
    assert [row[m].tolist() for row, m in zip(batch.responses, batch.response_mask, strict=True)] == [
        c.token_ids for c in made
    ]
    difference = (batch.rollout_log_probs - trainer_log_probs(model, batch)).abs()[batch.response_mask]
    assert float(difference.max()) < 2e-5
