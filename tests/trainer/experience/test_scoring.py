"""Scores land on the right row and token; a failed reward leaves the training instead of counting as 0."""

from __future__ import annotations

import torch

from steepest.core.batch import Batch, RowStatus
from steepest.rewards.api import RewardResult
from steepest.rollout.api import SamplingParams
from steepest.trainer.experience.api import Experience, Responses
from steepest.trainer.experience.scoring import Finished, Scorer, StepScorer, place_scores, reward_metrics
from steepest.trainer.experience.single_turn import generate_batch
from steepest.trainer.loop import Timer
from steepest.trainer.run.metrics import batch_metrics
from tests.support.fake_parts import EchoEngine, FakePool, NumberTokenizer, exact, prompt


def three_rows() -> Batch:
    return Batch.from_sequences(
        [[1], [1], [1]], [[5, 6, 7], [5], [5, 6]], group_ids=[0, 0, 1], truncated=[True, False, False]
    )


def test_the_score_lies_on_the_last_policy_token():
    batch = three_rows()
    place_scores(batch, [RewardResult(1.0), RewardResult(0.5), RewardResult(-2.0)])
    assert batch.token_level_scores.tolist() == [[0, 0, 1.0], [0.5, 0, 0], [0, -2.0, 0]]
    assert batch.loss_mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]


def test_zero_is_a_score_and_a_failure_is_none():
    batch = three_rows()
    place_scores(batch, [RewardResult(0.0), RewardResult(None, {}, "timeout"), RewardResult(1.0)])
    assert batch.row_status.tolist() == [RowStatus.TRAINED, RowStatus.REWARD_FAILED, RowStatus.TRAINED]
    assert batch.loss_mask.any(dim=1).tolist() == batch.trained_mask.any(dim=1).tolist() == [True, False, True]
    metrics = batch_metrics(batch)
    assert metrics["critic/score/mean"] == 0.5  # of the two that were scored


def test_reward_metrics_keep_correctness_and_format_apart():
    results = [
        RewardResult(1.0, {"format": 1.0, "acc": 1.0}),
        RewardResult(0.0, {"format": 1.0, "acc": 0.0}),
        RewardResult(0.0, {"format": 0.0, "acc": 0.0}),
        RewardResult(None, {}, "ValueError: no"),
    ]
    metrics = reward_metrics(results)
    assert metrics["reward/error_rate"] == 0.25
    assert metrics["reward/format_rate"] == 2 / 3
    assert metrics["reward/acc"] == 1 / 3
    assert "reward/timeout_rate" not in metrics
    assert reward_metrics([*results, RewardResult(0.0, timed_out=True)])["reward/timeout_rate"] == 1 / 5


def test_every_response_is_scored_against_its_own_prompt():
    # the engine's k-th answer to prompt p is p + 100 k, so only sample 0 is right: any mixing of rows would show
    prompts = [prompt(n) for n in (3, 1, 4, 1, 5)]
    batch = generate_batch(EchoEngine(), prompts, SamplingParams(max_tokens=1, n=3), pad_id=0)
    assert batch.group_ids.tolist() == [g for g in range(5) for _ in range(3)]
    assert [s.uid for s in batch.samples] == [p.uid for p in prompts for _ in range(3)]
    written = []
    scorer = StepScorer(Scorer(FakePool(exact), NumberTokenizer()))
    collect = Finished(
        lambda step: Experience(batch, [scorer.rate(batch)]), write=lambda step, rows: written.append((step, rows))
    )
    metrics = collect(7).metrics
    assert batch.token_level_scores[:, 0].tolist() == [1.0, 0.0, 0.0] * 5
    assert metrics == {"reward/error_rate": 0.0, "reward/format_rate": 1.0}
    ((step, rows),) = written
    assert step == 7 and len(rows) == 15
    assert rows[4] == {
        "id": "rows:1", "data_source": "toy",
        "prompt": [{"role": "user", "content": "1"}], "response": "101", "ground_truth": "1", "score": 0.0,
        "reward/format": 1.0, "truncated": False,
    }  # fmt: skip


def test_the_outermost_collector_counts_every_response_and_leaves_rows_out():
    """Statistics are of all responses, also of those that are not in the batch; costs are asked for once."""
    batch, dropped = three_rows(), three_rows()
    batch.samples = dropped.samples = [prompt(n) for n in range(3)]
    results = [RewardResult(1.0), RewardResult(0.5), RewardResult(-2.0)]
    failed = [RewardResult(None, {}, "no"), RewardResult(0.0), RewardResult(0.0)]
    parts = [Responses(batch, ["a", "b", "c"], results), Responses(dropped, ["d", "e", "f"], failed)]
    order, written = [], []

    def leave_out(given: Batch) -> dict[str, float]:
        order.append("leave_out")
        given.leave_out(given.truncated, RowStatus.TRUNCATED)
        return {"mask_truncated/ratio": 1 / 3}

    collect = Finished(
        lambda step: Experience(
            batch, parts, {"train/num_gen_batches": 2.0}, {"gen": 1.0, "reward": 2.0}, {"gen": 5.0}, prompts_taken=5
        ),
        leave_out,
        lambda step, rows: (order.append("write"), written.extend((step, row["response"]) for row in rows)),
        lambda: order.append("costs") or {"reward_model/seconds": 3.0},
        lambda: Timer(lambda: order.append("timed")),
    )
    found = collect(4)
    assert found.metrics == {
        "train/num_gen_batches": 2.0,
        "reward/error_rate": 1 / 6,
        "mask_truncated/ratio": 1 / 3,
        "reward_model/seconds": 3.0,
    }
    assert order == ["write", "leave_out", "costs", "timed"] and found.prompts_taken == 5
    assert found.seconds["gen"] == 1.0 and 2.0 < found.seconds["reward"] < 3.0, "its own time is part of the reward's"
    assert found.flops == {"gen": 5.0, "reward": 0.0}
    assert written == [(4, text) for text in "abcdef"]
    assert batch.row_status.tolist() == [RowStatus.TRUNCATED, 0, 0] and dropped.row_status.tolist() == [0, 0, 0]


def test_batch_metrics_against_hand_counted_numbers():
    batch = three_rows()
    place_scores(batch, [RewardResult(1.0), RewardResult(0.0), RewardResult(0.5)])
    batch.token_level_rewards = batch.token_level_scores - 0.1 * batch.response_mask
    batch.advantages = torch.arange(9.0).view(3, 3) * batch.response_mask
    metrics = batch_metrics(batch)
    assert metrics["critic/score/mean"] == 0.5 and metrics["critic/score/max"] == 1.0
    # rewards: 1 - 0.3, 0 - 0.1, 0.5 - 0.2
    assert abs(metrics["critic/rewards/mean"] - 0.3) < 1e-6 and abs(metrics["critic/rewards/min"] + 0.1) < 1e-6
    # policy tokens 0 1 2 / 3 / 6 7
    assert abs(metrics["critic/advantages/mean"] - 19 / 6) < 1e-6 and metrics["critic/advantages/min"] == 0.0
    assert metrics["response_length/mean"] == 2.0 and metrics["response_length/max"] == 3.0
    assert abs(metrics["response_length/clip_ratio"] - 1 / 3) < 1e-6
    assert metrics["group/equal_ratio"] == 0.5  # group 0 has 1 and 0, group 1 is alone
    assert "critic/values/mean" not in metrics


def test_tokens_without_a_text_are_counted_over_the_policy_s_own():
    """Responses [5, 6, 7], [5], [5, 6] by a tokenizer that has no 6: 2 of 6 tokens. Padding (0) does not count."""
    batch = three_rows()
    known = torch.tensor([1, 5, 7])
    scorer = Scorer(FakePool(lambda request: RewardResult(1.0)), NumberTokenizer(), text_ids=known)
    found = Finished(lambda step: Experience(batch, []), count=scorer.count)(1)
    assert abs(found.metrics["rollout/no_text_ratio"] - 2 / 6) < 1e-6
    assert Scorer(scorer.rewards, NumberTokenizer()).count(batch) == {}
