"""token_samples.jsonl: the rows of a batch token by token, cut to a size, with the reward of each answer."""

from __future__ import annotations

import json

import pytest
import torch

from steepest.config.load import load_config
from steepest.core.batch import Batch, RowStatus
from steepest.loggers.rows import RowFile, read_rows
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.api import Experience, Responses
from steepest.trainer.jobs.ppo import run_ppo
from steepest.trainer.run import token_samples
from steepest.trainer.run.token_samples import TokenSamples, TokenTexts, kept_places, measures
from tests.support.fake_parts import prompt
from tests.support.toy_run import make_toy, toy_overrides


class Letters:
    """A writer of texts by which token 65 is A, and a character of more than 7 bits takes a token for each byte."""

    def decode(self, rows):
        return [bytes(row).decode("utf-8", "replace") for row in rows]


def batch(*responses: str, groups: list[int]) -> Batch:
    ids = [list(text.encode()) for text in responses]
    return Batch.from_sequences(
        [[1]] * len(ids), ids, group_ids=groups, truncated=[False] * len(ids),
        rollout_log_probs=[[-1.0] * len(row) for row in ids], samples=[prompt(group) for group in groups],
    )  # fmt: skip


def samples(tmp_path, num_prompts: int = 4) -> TokenSamples:
    rows = RowFile(tmp_path / "token_samples.jsonl")
    return TokenSamples(rows, TokenTexts(Letters()), num_prompts, lambda step: step % 2 == 0)


def experience(of: Batch, scores: list[float | None]) -> Experience:
    results = [
        RewardResult(score, {"acc": score} if score is not None else {}, None if score is not None else "boom")
        for score in scores
    ]
    return Experience(of, [Responses(of, [""] * len(of), results)])


def test_a_character_of_several_tokens_stands_at_the_first_of_them():
    texts = TokenTexts(Letters())
    assert texts(list("aé世b".encode())) == ["a", "é", "", "世", "", "", "b"]
    assert texts([*"世".encode()[:2], 65]) == ["\ufffd", "\ufffd", "A"]  # a character that was cut


def test_measures_are_nan_where_a_token_has_no_number():
    found = batch("ab", "c", "d", groups=[0, 0, 1])
    found.leave_out(torch.tensor([False, True, False]), RowStatus.REWARD_FAILED)
    found.recomputed = torch.tensor([True, True, False])
    found.old_log_probs = torch.tensor([[-1.0, -1.5], [-1.0, 0.0], [-1.0, 0.0]])
    found.ref_log_probs = torch.tensor([[-2.0, -1.5], [0.0, 0.0], [-1.25, 0.0]])
    found.advantages = torch.tensor([[2.0, -1.0], [0.0, 0.0], [1.0, 0.0]])
    found.values = torch.full((3, 2), 0.5)
    numbers = {name: values.nan_to_num(99.0).tolist() for name, values in measures(found).items()}
    assert numbers == {
        "advantage": [[2.0, -1.0], [99.0, 99.0], [1.0, 99.0]],
        "value": [[0.5, 0.5], [99.0, 99.0], [0.5, 99.0]],
        "log_prob": [[-1.0, -1.0], [-1.0, 99.0], [-1.0, 99.0]],
        "ratio": [[1.0, pytest.approx(0.6065307)], [99.0, 99.0], [99.0, 99.0]],  # exp(-0.5); row 2 is the engine's
        "kl": [[1.0, 0.0], [99.0, 99.0], [0.25, 99.0]],
    }


def test_a_row_has_the_answers_of_a_prompt_with_their_rewards(tmp_path):
    found = batch("ab", "c", "d", groups=[0, 0, 1])
    found.advantages = torch.tensor([[2.0, -1.0], [0.123456, 0.0], [1.0, 0.0]])
    found.truncated[1] = True
    observer = samples(tmp_path, num_prompts=1)
    observer(1, experience(found, [1.0, None, 0.0]))  # not due
    observer(2, experience(found, [1.0, None, 0.0]))
    observer.close()
    common = {"status": "trained", "log_prob": [-1.0]}
    assert list(read_rows(tmp_path / "token_samples.jsonl")) == [
        {
            "step": 2, "id": "rows:0", "data_source": "toy", "prompt": [{"role": "user", "content": "0"}],
            "ground_truth": "0", "num_responses": 2,
            "responses": [
                {**common, "score": 1.0, "parts": {"acc": 1.0}, "truncated": False, "length": 2, "tokens": ["a", "b"],
                 "advantage": [2.0, -1.0], "log_prob": [-1.0, -1.0]},
                {**common, "score": None, "parts": {}, "error": "boom", "truncated": True, "length": 1,
                 "tokens": ["c"], "advantage": [0.1235]},
            ],
        }
    ]  # fmt: skip


def test_rewards_are_found_in_a_batch_that_was_put_together_anew(tmp_path):
    """As dynamic sampling does it: groups of several rounds, in another order."""
    rounds = [batch("aa", "ab", groups=[0, 0]), batch("ba", "bb", groups=[1, 1])]
    parts = [
        Responses(part, ["", ""], [RewardResult(float(number)), RewardResult(number + 0.5)])
        for number, part in enumerate(rounds)
    ]
    both = Batch.cat(rounds)
    found = Experience(both.select(torch.tensor([3, 2, 1, 0])), parts)
    rows = list(samples(tmp_path).groups(found))
    assert [(row["id"], [answer["score"] for answer in row["responses"]]) for row in rows] == [
        ("rows:1", [1.5, 1.0]),
        ("rows:0", [0.5, 0.0]),
    ]


def test_a_step_takes_a_bounded_number_of_tokens(tmp_path):
    longest = token_samples.TOKENS // 2
    found = batch("a" * 3000 + "z", "b" * 10, "c" * 2000, "d" * 2000, "e", "f", groups=[0, 0, 1, 1, 2, 2])
    rows = list(samples(tmp_path).groups(experience(found, [1.0] * 6)))
    answers = [answer for row in rows for answer in row["responses"]]
    assert [(answer["length"], len(answer["tokens"]), answer.get("left_out")) for answer in answers] == [
        (3001, longest, [longest // 2, 3001 - longest]),
        (10, 10, None),
        (2000, 1019, [510, 981]),  # half of the 4096 - 2048 - 10 that are left
        (2000, 1019, [510, 981]),
    ]  # and none is left for the third group
    assert answers[0]["tokens"][-1] == "z" and len(answers[0]["log_prob"]) == longest
    assert kept_places(5, 4) == [0, 1, 3, 4] and kept_places(4, 4) == [0, 1, 2, 3] and kept_places(6, 3) == [0, 1, 5]


def test_of_a_large_group_sixteen_answers_are_written(tmp_path):
    found = batch(*[chr(97 + i) for i in range(20)], groups=[0] * 20)
    (row,) = samples(tmp_path).groups(experience(found, [1.0] * 20))
    assert row["num_responses"] == 20 and len(row["responses"]) == 16


def test_a_run_writes_samples_and_its_report_shows_them(tmp_path):
    toy = make_toy(tmp_path / "toy", num_rows=64)
    folder = tmp_path / "run"
    words = (
        "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=16", "actor_rollout_ref.rollout.n=2",
        "trainer.total_training_steps=3", "trainer.test_freq=3", "algorithm.adv_estimator=grpo",
        "trainer.report_freq=2", "trainer.report_prompts=3",
    )  # fmt: skip
    run_ppo(load_config(toy_overrides(toy, folder, *words)))
    rows = list(read_rows(folder / "token_samples.jsonl"))
    assert [row["step"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3
    for row in rows:
        assert [len(answer["tokens"]) for answer in row["responses"]] == [1, 1]
        scores = [answer["score"] for answer in row["responses"]]
        assert scores == [float(answer["tokens"][0].strip() == row["ground_truth"]) for answer in row["responses"]]
        signs = [answer["advantage"][0] for answer in row["responses"]]
        assert (signs[0] > signs[1]) == (scores[0] > scores[1])
    answers = list(read_rows(folder / "samples.jsonl"))
    assert [row["step"] for row in answers] == [0] * 3 + [3] * 3
    assert [row["id"] for row in answers[:3]] == [row["id"] for row in answers[3:]]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert json.loads(page.split('id="training" type="application/x-ndjson">')[1].split("\n")[0]) == rows[0]
