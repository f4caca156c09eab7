"""The rewards of a run: worker processes, reward model and judge behind one `score`, chosen at start."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from steepest.assembly.compute import compute_dtype
from steepest.config.key_names import model_keys
from steepest.config.schema import Config
from steepest.config.sections.reward import JUDGE, REWARD_MODEL, WeightedFunction, functions_of
from steepest.devices.api import Device
from steepest.errors import ModelError, RewardError, key_names
from steepest.learner.metrics import Metrics
from steepest.models.reward_model import RewardModel, load_reward_model
from steepest.rewards import RewardPool
from steepest.rewards.api import RewardRequest, RewardResult, ScoresResponses
from steepest.rewards.chat_client import ChatClient
from steepest.rewards.given import GivenFunctions, is_given
from steepest.rewards.judge import PROMPT, Judge, ReplyCache, api_key
from steepest.rewards.pool import allowed_failures
from steepest.trainer.run.model_sources import ModelSources


@dataclass
class ModelReward:
    """The reward model as a reward. What it cannot read (too long) or gives no finite score is a failed sample."""

    model: RewardModel
    max_error_rate: float

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        rows = [self.model.token_ids(request.messages, request.whole) for request in requests]
        limit = self.model.max_tokens
        fits = [limit is None or len(row) <= limit for row in rows]
        scores = iter(self.model.score([row for row, fit in zip(rows, fits, strict=True) if fit]))
        results = [
            _result(next(scores)) if fit else RewardResult(None, error=_too_long(len(row), limit))
            for row, fit in zip(rows, fits, strict=True)
        ]
        failed = [i for i, result in enumerate(results) if result.score is None]
        if len(failed) > allowed_failures(len(results), self.max_error_rate):
            raise RewardError(
                f"reward model: {len(failed)} of {len(results)} samples failed. First: sample "
                f"{requests[failed[0]].sample_id}: {results[failed[0]].error}. That is more than "
                f"reward.max_error_rate={self.max_error_rate:g} allows, so the run ends."
            )
        return results


def _result(score: float) -> RewardResult:
    if score != score or abs(score) == float("inf"):
        return RewardResult(None, error=f"reward model: its score is {score}")
    return RewardResult(score)


def _too_long(length: int, limit: int | None) -> str:
    return f"reward model: prompt and response have {length} of its tokens, and it reads {limit}"


@dataclass
class Rewards:
    """Every reward of a run. A context: worker processes and files end with it."""

    pool: RewardPool | None
    """The functions that run in worker processes, summed there; None when there are none."""
    others: list[tuple[WeightedFunction, ScoresResponses]] = field(default_factory=list)
    """What runs in this process, added to that sum."""
    given: GivenFunctions | None = None
    """The functions that a Python program passed, summed in this process."""
    costs: Callable[[], Metrics] = lambda: {}
    """What the rewards have cost since they were last asked; `reward/judge/*`."""
    ends: list[Callable[[], None]] = field(default_factory=list)

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self.ends:
            end()

    def start(self) -> None:
        """Start worker processes and do not wait for them."""
        if self.pool is not None:
            self.pool.start()

    def check(self, data_sources: Iterable[str], columns: Collection[str] | None = None) -> list[str]:
        """See that all rows can be scored; raises ConfigError and DataError, see `RewardPool.check`."""
        notes = [] if self.given is None else self.given.check(columns or ())
        return notes + ([] if self.pool is None else self.pool.check(data_sources, columns))

    def score(self, requests: Sequence[RewardRequest]) -> list[RewardResult]:
        """Results in the order of the requests: the sum of all rewards. What one reward fails on has no score."""
        results = [RewardResult(0.0) for _ in requests] if self.pool is None else self.pool.score(requests)
        if self.given is not None:
            results = [together(one, other) for one, other in zip(results, self.given.score(requests), strict=True)]
        for function, scorer in self.others:
            more = scorer.score(requests)
            results = [add(result, function, other) for result, other in zip(results, more, strict=True)]
        return results


def add(result: RewardResult, function: WeightedFunction, other: RewardResult) -> RewardResult:
    """`result` plus the weighted score of one more reward. The first error is the sum's."""
    if result.score is None or other.score is None:
        return RewardResult(None, result.parts, error=result.error or other.error, scores=result.scores)
    scores = {**result.scores, function.label: other.score}
    return replace(result, score=result.score + function.weight * other.score, scores=scores)


def together(result: RewardResult, other: RewardResult) -> RewardResult:
    """The sum of two weighted sums. The first error is that of both, and so is the first `acc`."""
    if result.score is None or other.score is None:
        return RewardResult(None, result.parts, error=result.error or other.error, scores=result.scores)
    parts, scores = {**other.parts, **result.parts}, {**result.scores, **other.scores}
    return replace(result, score=result.score + other.score, parts=parts, scores=scores)


def build_rewards(config: Config) -> Rewards:
    """All but the reward model, which `add_reward_model` loads once the cheap checks are done."""
    custom = config.custom_reward_function
    functions = functions_of(config.reward.functions)
    given = [function for function in functions if is_given(function.name)]
    here = [f for f in functions if f not in given and f.name not in (REWARD_MODEL, JUDGE)]
    rewards = Rewards(None, given=GivenFunctions(given, config.reward.max_error_rate) if given else None)
    if here or not functions:
        rewards.pool = build_pool(config, here, (custom.path, custom.name) if custom.path else None)
        rewards.ends.append(rewards.pool.close)
    for function in functions:
        if function.name == JUDGE:
            judge = build_judge(config)
            rewards.others.append((function, judge))
            rewards.costs = judge.costs
            rewards.ends.append(judge.close)
    return rewards


def build_pool(config: Config, functions: Sequence[WeightedFunction], custom: tuple[str, str] | None) -> RewardPool:
    reward = config.reward
    return RewardPool(
        custom=custom,
        custom_kwargs=config.custom_reward_function.reward_kwargs,
        functions=functions,
        num_workers=reward.num_workers,
        timeout_s=reward.timeout_s,
        max_error_rate=reward.max_error_rate,
        mode=reward.mode,
    )


def build_judge(config: Config) -> Judge:
    judge = config.reward.judge
    assert judge.base_url is not None and judge.model is not None, "checked by config.sections.reward"
    client = ChatClient(
        judge.base_url,
        judge.model,
        key=api_key(judge.api_key_env),
        max_tokens=judge.max_tokens,
        timeout_s=judge.timeout_s,
        max_retries=judge.max_retries,
    )
    return Judge(
        client,
        PROMPT if judge.prompt is None else judge.prompt,
        judge.num_concurrent,
        config.reward.max_error_rate,
        ReplyCache(judge.cache_file),
    )


def add_reward_model(rewards: Rewards, config: Config, sources: ModelSources, device: Device) -> None:
    """Load the reward model of `reward.functions`, if it names one."""
    reward_model = config.reward.reward_model
    for function in functions_of(config.reward.functions):
        if function.name != REWARD_MODEL:
            continue
        key = "reward.reward_model.model_path"
        path = str(reward_model.model_path)
        folder = sources.folder(key, path, reward_model.hub, reward_model.revision)
        with key_names({**model_keys("reward.reward_model"), "path": key, "tokenizer_path": key}):
            try:
                model = load_reward_model(
                    folder,
                    device=device.torch_device(),
                    dtype=getattr(torch, compute_dtype(reward_model.dtype, device)),
                    micro_batch_size=reward_model.micro_batch_size_per_gpu,
                    label=reward_model.label,
                    trust_remote_code=reward_model.trust_remote_code,
                )
            except ModelError as error:  # it begins with the folder, which may be the actor's, too
                raise ModelError(f"{key}: {error.marked}") from error
        rewards.others.append((function, ModelReward(model, config.reward.max_error_rate)))
