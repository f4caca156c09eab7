"""All rewards of a run behind one score: sums over processes, judge and reward model, and whole short runs of them."""

from __future__ import annotations

import math

import pytest

from steepest.config.load import load_config
from steepest.config.sections.reward import WeightedFunction
from steepest.errors import RewardError
from steepest.loggers.jsonl import read_metrics
from steepest.rewards.api import RewardRequest, RewardResult
from steepest.trainer.build_rewards import ModelReward, Rewards, add
from steepest.trainer.experience.scoring import reward_metrics
from steepest.trainer.jobs.ppo import run_ppo
from tests.models.test_reward_model import folder, load
from tests.rewards.chat_server import chat_server
from tests.support.toy_run import make_toy, toy_overrides

SMALL = ("data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "data.val_max_samples=4",
         "trainer.total_training_steps=1", "trainer.test_freq=1", "trainer.val_before_train=False",
         "custom_reward_function.path=null")  # fmt: skip


class Fixed:
    """Gives the same results to whatever is asked."""

    def __init__(self, *results: RewardResult) -> None:
        self.results = list(results)

    def score(self, requests):
        return self.results


def test_a_sum_by_hand():
    # 1 + 0.5 * 4 = 3; what one reward fails on has no score and keeps the first error
    first = RewardResult(1.0, {"acc": 1.0}, scores={"math": 1.0})
    function = WeightedFunction("judge", 0.5)
    assert add(first, function, RewardResult(4.0)) == RewardResult(
        3.0, {"acc": 1.0}, scores={"math": 1.0, "judge": 4.0}
    )
    assert add(first, function, RewardResult(None, error="no")).error == "no"
    assert add(RewardResult(None, error="first"), function, RewardResult(None, error="second")).error == "first"
    others = [(function, Fixed(RewardResult(4.0))), (WeightedFunction("reward_model", -1.0), Fixed(RewardResult(0.5)))]
    (result,) = Rewards(None, others).score([RewardRequest("a", "x", "", "")])
    assert (result.score, result.scores) == (1.5, {"judge": 4.0, "reward_model": 0.5})


def test_metrics_of_each_reward():
    results = [RewardResult(1.0, {"acc": 1.0}, scores={"math": 1.0, "length": -0.5}), RewardResult(None, error="x"),
               RewardResult(0.0, {"acc": 0.0}, scores={"math": 0.0, "length": 0.0})]  # fmt: skip
    assert reward_metrics(results) == {
        "reward/error_rate": 1 / 3, "reward/acc": 0.5,
        "reward/math/mean": 0.5, "reward/math/max": 1.0, "reward/math/min": 0.0,
        "reward/length/mean": -0.25, "reward/length/max": 0.0, "reward/length/min": -0.5,
    }  # fmt: skip


def test_a_text_too_long_for_the_reward_model_and_a_broken_score_are_failures(tmp_path):
    model = load(folder(tmp_path / "m", "qwen2", num_labels=1))
    requests = [RewardRequest("a", "x", "6", "", messages=[{"role": "user", "content": "3"}]),
                RewardRequest("b", "x", "6 " * 200, "")]  # fmt: skip
    good, long = ModelReward(model, max_error_rate=0.5).score(requests)
    assert good.score is not None and long.score is None
    assert long.error is not None and long.error.endswith("of its tokens, and it reads 128")
    with pytest.raises(RewardError, match="reward model: 1 of 2 samples failed. First: sample b: .*max_error_rate=0 "):
        ModelReward(model, max_error_rate=0.0).score(requests)
    model.model.score.weight.data.fill_(math.nan)  # type: ignore[union-attr,operator]
    assert ModelReward(model, max_error_rate=1.0).score(requests)[0].error == "reward model: its score is nan"


def test_a_run_with_a_weighted_sum_a_reward_model_and_a_judge(tmp_path, capsys):
    toy = make_toy(tmp_path / "toy")
    model = folder(tmp_path / "rm", "qwen2", num_labels=1, vocab_size=200)
    with chat_server(lambda body: "SCORE: 0.5") as server:
        functions = "{exact: 1.0, format: {weight: 0.5, pattern: '[0-9]'}, reward_model: 0.1, judge: 2.0}"
        words = [f"reward.functions={functions}", f"reward.reward_model.model_path={model}",
                 f"reward.judge.base_url={server.url}", "reward.judge.model=m", "trainer.logger=[jsonl,console]",
                 f"reward.judge.cache_file={tmp_path}/judge.jsonl"]  # fmt: skip
        run_ppo(load_config(toy_overrides(toy, tmp_path / "run", *SMALL, *words)))
    (metrics,) = [row for step, row in read_metrics(tmp_path / "run" / "metrics.jsonl").items() if step == 1]
    parts = {name: metrics[f"reward/{name}/mean"] for name in ("exact", "format", "reward_model", "judge")}
    expected = parts["exact"] + 0.5 * parts["format"] + 0.1 * parts["reward_model"] + 2.0 * parts["judge"]
    assert metrics["critic/score/mean"] == pytest.approx(expected, abs=1e-5) and parts["judge"] == 0.5
    asked = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert len(set(asked)) == len(asked)  # equal questions once, in training and in validation
    assert metrics["reward/judge/calls"] + metrics["reward/judge/cached"] == 8 and metrics["reward/judge/calls"] > 0
    assert metrics["reward/acc"] == parts["exact"]
    assert metrics["reward/judge/prompt_tokens"] == 10 * metrics["reward/judge/calls"]
    assert "reward/reward_model/max:" in capsys.readouterr().out


def test_a_run_on_a_reward_model_alone_by_verls_keys_starts_no_workers(tmp_path):
    toy = make_toy(tmp_path / "toy")
    model = folder(tmp_path / "rm", "bert", num_labels=1)
    words = [word for word in toy_overrides(toy, tmp_path / "run", *SMALL) if not word.startswith("reward.num_workers")]
    run_ppo(load_config([*words, "reward_model.enable=True", f"reward_model.model.path={model}"]))
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")[1]
    assert metrics["reward/reward_model/mean"] == pytest.approx(metrics["critic/score/mean"], abs=1e-5)
