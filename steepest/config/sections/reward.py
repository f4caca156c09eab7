"""`reward` and `custom_reward_function`: how responses are scored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steepest.config.types import DERIVED, ComputeDtype, File, Hub, Mapping, NonNegative, Positive, PositiveFloat, Share


@dataclass(frozen=True)
class CustomRewardConfig:
    """`custom_reward_function` (also under `reward.`): your own scorer."""

    path: File | None = None
    """Python file; null: the reward registered for each row's data source."""
    name: str = "compute_score"
    """Function in that file: f(data_source, solution_str, ground_truth, extra_info) to a number or a dict."""


@dataclass(frozen=True)
class OverlongBufferConfig:
    """`reward.overlong_buffer` (also `reward_model.overlong_buffer`): DAPO's soft penalty for length, in training."""

    enable: bool = False
    """Lower the score of responses that come near `data.max_response_length`."""
    len: Positive | None = None
    """Tokens before that limit over which the penalty grows from 0; needed with `enable`."""
    penalty_factor: PositiveFloat = 1.0
    """The penalty at the limit."""
    log: bool = True
    """Log reward/overlong_reward (mean penalty) and reward/overlong (share of responses that have one). verl: off."""


@dataclass(frozen=True)
class RewardModelConfig:
    """`reward.reward_model` (also `reward_model.enable`, `reward_model.model.path`): a scoring model inside the run."""

    enable: bool = DERIVED
    """Score with it; null: on when `reward.functions` names reward_model. On without functions, it is the only one."""
    model_path: File | None = None
    """Folder or hub id of a sequence-classification model with its tokenizer."""
    hub: Hub = DERIVED
    """Hub of a `model_path` that is no local folder; null: the policy's."""
    revision: str | None = None
    """Branch, tag or commit of `model_path` on the hub; null: the newest."""
    label: str | None = None
    """Of a model with several labels, the one whose probability is the score; null: the model has one output, which
    is the score as it is. Ours, not verl's."""
    micro_batch_size_per_gpu: Positive = 8
    """Responses scored in one pass."""
    dtype: ComputeDtype = DERIVED
    """Its weights and compute; null: the actor's. Ours, not verl's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model folder."""


@dataclass(frozen=True)
class JudgeConfig:
    """`reward.judge`: a language model as the judge, over an OpenAI-compatible endpoint. Ours, not verl's."""

    base_url: str | None = None
    """Address up to `/chat/completions`, e.g. http://127.0.0.1:8000/v1."""
    model: str | None = None
    """The model's name at that address."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; not set: requests carry none."""
    prompt: str | None = None
    """What the judge is asked, with `{question}`, `{ground_truth}` and `{response}`; null: rewards/judge.py has it. The
    reply must end with a line `SCORE: x`, x from 0 to 1."""
    max_tokens: Positive = 512
    """Longest reply."""
    timeout_s: PositiveFloat = 60.0
    """Seconds one request may take."""
    max_retries: NonNegative = 3
    """Further attempts, at growing distance, when the server is busy, broken or away."""
    num_concurrent: Positive = 8
    """Requests at a time."""
    cache_file: File | None = None
    """JSON lines with the replies so far, so that no question is paid for twice; null: kept in memory only."""


@dataclass(frozen=True)
class RewardConfig:
    """`reward`: how responses are scored."""

    functions: Mapping = field(default_factory=dict)
    """Rewards whose weighted sum is the score, e.g. `{math: 1.0, format: {weight: 0.2, form: boxed}}`: grader (what the
    row's data_source chooses), gsm8k, math, multiple_choice, exact, numeric, length, format, reward_model, judge, or
    file.py:function of your own. Empty: the grader. Ours, not verl's."""
    num_workers: Positive | None = None
    """Worker processes; null: one a core, at most 8."""
    timeout_s: PositiveFloat = 10.0
    """Seconds a response may take to score; then it counts as an error. Ours, not verl's."""
    max_error_rate: Share = 0.1
    """Share of a batch's scores that may fail before the run ends. Ours, not verl's."""
    mode: Literal["strict", "flexible"] = "strict"
    """GSM8K: strict wants `#### number`; flexible compares the value, in any usual form. Ours, not verl's."""
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
