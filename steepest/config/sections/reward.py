"""`reward` and `custom_reward_function`: how responses are scored.

The rewards whose weighted sum is a response's score are read here, for the rules and for the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as ReadOnlyMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from steepest.config.checks import ACTOR, MODEL, Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.sections.model import is_here
from steepest.config.types import (
    DERIVED,
    ComputeDtype,
    File,
    Hub,
    Mapping,
    NonNegative,
    Positive,
    PositiveFloat,
    Share,
    WeightedNames,
)
from steepest.registry import is_own_code, nearest

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()
KEY = "reward.functions"
_RM = "reward.reward_model"
GRADER = "grader"
"""The name that stands for the reward which a row's data_source chooses."""
REWARD_MODEL = "reward_model"
JUDGE = "judge"
IN_WORKERS = ("grader", "exact", "format", "gsm8k", "length", "math", "multiple_choice", "numeric")
"""What runs in the reward's worker processes; rewards/ has the functions, a test compares the two."""
GIVEN = "python:"
"""What the names of functions begin with that a Python program passes to `steepest.train`."""
NAMES = (*IN_WORKERS, REWARD_MODEL, JUDGE)
_WITHOUT_TRUTH = ("length", "format", REWARD_MODEL, JUDGE)
"""What can score a response without a ground truth. A function of the user's own may do, too."""


@dataclass(frozen=True)
class CustomRewardConfig:
    """`custom_reward_function` (also under `reward.`): your own scorer."""

    path: File | None = None
    """Python file, or `pkg://module`; null: the reward registered for each row's data source."""
    name: str = "compute_score"
    """Function in that file: f(data_source, solution_str, ground_truth, extra_info) to a number or a dict, or TRL's
    f(completions, **columns) to a list with one number. The names of its parameters say which."""
    reward_kwargs: Mapping = field(default_factory=dict)
    """Further keywords for the function, e.g. `{threshold: 0.5}`."""


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
    """The label whose probability is the score, for a model with several; null: the model has one output, which is the
    score as it is. Ours, not verl's."""
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

    functions: WeightedNames = field(default_factory=dict)
    """Rewards whose weighted sum is the score: a name, a list of names, or names with weights and options, e.g.
    `{math: 1.0, format: {weight: 0.2, form: boxed}}`, in the shell with quotes around the whole setting. Names: grader
    (what the row's data_source chooses), gsm8k, math, multiple_choice, exact, numeric, length, format, reward_model,
    judge, or file.py:function of your own. Empty: the grader. Ours, not verl's."""
    num_workers: Positive | None = None
    """Worker processes; null: one a core, at most 8."""
    timeout_s: PositiveFloat = 10.0
    """Seconds a response may take to score; then it counts as an error. Ours, not verl's."""
    max_error_rate: Share = 0.1
    """Share of a batch's scores that may fail before the run ends. Ours, not verl's."""
    mode: Literal["strict", "flexible"] = "strict"
    """GSM8K: strict wants `#### number`; flexible compares the value, in any usual form. Ours, not verl's."""
    skip_special_tokens: Literal["template", "all", "none"] = "template"
    """Special tokens that the text for rewards leaves out: those of the chat template and the end, or all, or none.
    Ours, not verl's, which leaves all out."""
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)


@dataclass(frozen=True)
class WeightedFunction:
    """One reward of the sum."""

    name: str
    weight: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What its score is called in metrics and records: of a function of the user's own, the function's name."""
        return self.name.rpartition(":")[2]


def reads_data_source(c: Config) -> bool:
    """Whether the rows choose their reward."""
    return c.custom_reward_function.path is None and GRADER in _names(c)


def reads_ground_truth(c: Config) -> bool:
    """Whether a reward of the run cannot score a row that has no ground truth."""
    if c.custom_reward_function.path is not None:
        return False
    return any(name not in _WITHOUT_TRUTH and not is_own_code(name) for name in _names(c))


def _setting(functions: ReadOnlyMapping[str, Any]) -> str:
    """`reward.functions` as one writes it in a shell."""
    entries = ", ".join(f"{name}: {_text(entry)}" for name, entry in functions.items())
    return f"'{KEY}={{{entries}}}'"


def _text(value: Any) -> str:
    if isinstance(value, ReadOnlyMapping):
        return "{" + ", ".join(f"{name}: {_text(entry)}" for name, entry in value.items()) + "}"
    return str(value)


def functions_of(value: ReadOnlyMapping[str, Any]) -> tuple[WeightedFunction, ...]:
    """The rewards of a mapping that `function_problems` finds nothing wrong with."""
    return tuple(
        WeightedFunction(name, float(entry["weight"]), {k: v for k, v in entry.items() if k != "weight"})
        if isinstance(entry, ReadOnlyMapping)
        else WeightedFunction(name, float(entry))
        for name, entry in value.items()
    )


def function_problems(value: ReadOnlyMapping[str, Any]) -> list[str]:
    """What is wrong with `reward.functions`: names, weights, two rewards of one label. Options are checked later, by
    the function itself."""
    weights = {str(name): str(name).rpartition(":") for name in value}
    if any(bare and _is_number(tail) for bare, _, tail in weights.values()):
        meant = {
            bare if bare and _is_number(tail) else name: tail if bare and _is_number(tail) else value[name]
            for name, (bare, _, tail) in weights.items()
        }
        return [f"{KEY}: weights are given in a mapping, with quotes around the setting: {_setting(meant)}."]
    problems = [problem for name, entry in value.items() for problem in _entry_problems(str(name), entry)]
    labels = [str(name).rpartition(":")[2] for name in value]
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        problems.append(
            f"{KEY}: two rewards are called {label}, so their scores could not be distinguished. Rename one."
        )
    return problems


def _entry_problems(name: str, entry: Any) -> list[str]:
    if name not in NAMES and not is_own_code(name):
        guess = nearest(name, NAMES)
        hint = f" Did you mean {guess}?" if guess else ""
        if name.endswith(".py"):
            hint = f" A function of your own has its name behind the file: {_setting({f'{name}:compute_score': 1.0})}."
        return [f"{KEY}: no such reward: {name}.{hint} Known: {', '.join(NAMES)}, or file.py:function of your own."]
    weight = entry.get("weight") if isinstance(entry, ReadOnlyMapping) else entry
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < float("inf"):
        example = {name: {"weight": 1.0, "option": "value"}}
        return [
            f"{KEY}.{name}={_text(entry)}: expected its weight, a number, or a mapping with it: {_setting(example)}."
        ]
    if weight == 0:
        return [f"{KEY}.{name}: weight 0 changes nothing. Remove it, or give another weight."]
    options = sorted(set(entry) - {"weight"}) if isinstance(entry, ReadOnlyMapping) else []
    if options and name in (GRADER, REWARD_MODEL, JUDGE):
        home = "reward.mode" if name == GRADER else f"reward.{name}.*"
        return [f"{KEY}.{name}: takes no option ({', '.join(options)}). What can be set is {home}."]
    return []


@SECTION.null
def resolve(d: Deriver) -> None:
    d.copy(f"{MODEL}.hub", f"{_RM}.hub")
    d.copy(f"{ACTOR}.fsdp_config.dtype", f"{_RM}.dtype")
    path, _, name = str(d["custom_reward_function.path"] or "").rpartition(":")
    if path.endswith(".py") and not d.is_set("custom_reward_function.name"):  # file.py:function, as elsewhere
        d.replace("custom_reward_function.path", path, "custom_reward_function.path")
        d.replace("custom_reward_function.name", name, "custom_reward_function.path")
    if d[f"{_RM}.enable"] and not d["reward.functions"]:
        d.replace("reward.functions", {REWARD_MODEL: 1.0}, f"{_RM}.enable")
    d.fill(f"{_RM}.enable", REWARD_MODEL in d["reward.functions"], "reward.functions")


@SECTION.rule("reward.overlong_buffer.enable", "reward.overlong_buffer.len", "data.max_response_length")
def the_overlong_buffer_has_a_length(c: Config, is_set: IsSet) -> Iterator[str]:
    buffer, longest = c.reward.overlong_buffer, c.data.max_response_length
    if buffer.enable and (buffer.len is None or buffer.len > longest):
        yield (
            f"reward.overlong_buffer.len={'null' if buffer.len is None else buffer.len}: must be at most "
            f"data.max_response_length={longest}, the tokens before that limit in which the penalty grows, "
            f"e.g. {max(1, longest // 5)}."
        )


@SECTION.rule(KEY)
def functions_are_rewards_with_weights(c: Config, is_set: IsSet) -> Iterator[str]:
    yield from function_problems(c.reward.functions)


@SECTION.rule(KEY, "custom_reward_function.path")
def one_way_to_score(c: Config, is_set: IsSet) -> Iterator[str]:
    custom = c.custom_reward_function
    if custom.path is not None and c.reward.functions:
        yield (
            f"custom_reward_function.path={custom.path}: it scores every row, and {KEY} says otherwise. Remove one; "
            f"in a sum your function is {_setting({f'{custom.path}:{custom.name}': 1.0})}."
        )


@SECTION.rule(KEY, f"{_RM}.enable", f"{_RM}.model_path")
def the_reward_model_is_there(c: Config, is_set: IsSet) -> Iterator[str]:
    model, named = c.reward.reward_model, REWARD_MODEL in c.reward.functions
    if bool(model.enable) != named:
        has = "names no" if model.enable else "names"
        yield f"{_RM}.enable={model.enable}: {KEY} {has} reward_model. Make the two agree, or leave enable out."
    elif named and model.model_path is None:
        yield f"{KEY} names reward_model: set {_RM}.model_path, the folder or hub id of the model."


@SECTION.rule(KEY, "reward.judge.base_url", "reward.judge.model")
def the_judge_is_there(c: Config, is_set: IsSet) -> Iterator[str]:
    judge = c.reward.judge
    if JUDGE not in c.reward.functions:
        return
    for name, value in (("base_url", judge.base_url), ("model", judge.model)):
        if not value:
            yield f"{KEY} names judge: set reward.judge.{name}."
    if judge.base_url and not judge.base_url.startswith(("http://", "https://")):
        yield f"reward.judge.base_url={judge.base_url}: expected an address that begins with http:// or https://."


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        NoEffect(
            names_of("reward.overlong_buffer", "len penalty_factor log"),
            lambda c: not c.reward.overlong_buffer.enable,
            "reward.overlong_buffer.enable is off",
        ),
        NoEffect(
            ("custom_reward_function.name", "custom_reward_function.reward_kwargs"),
            lambda c: c.custom_reward_function.path is None,
            "no custom_reward_function.path",
        ),
        NoEffect(
            ("reward.mode",), lambda c: c.custom_reward_function.path is not None, "custom_reward_function scores"
        ),
        NoEffect(
            ("reward.mode",), lambda c: not _names(c) & {GRADER, "gsm8k"}, "no reward of reward.functions has modes"
        ),
        NoEffect(
            names_of("reward", "num_workers timeout_s"),
            lambda c: (
                not any(name in IN_WORKERS or (is_own_code(name) and not name.startswith(GIVEN)) for name in _names(c))
            ),
            "no reward of reward.functions runs in worker processes",
        ),
        NoEffect(
            names_of(_RM, "model_path hub revision label micro_batch_size_per_gpu dtype trust_remote_code"),
            lambda c: not c.reward.reward_model.enable,
            f"reward.functions names no reward_model, and {_RM}.enable is off",
        ),
        NoEffect(
            names_of(_RM, "hub revision"),
            lambda c: is_here(str(c.reward.reward_model.model_path)),
            f"{_RM}.model_path is on this machine",
        ),
        NoEffect(("reward.judge",), lambda c: JUDGE not in _names(c), "reward.functions names no judge"),
    ]


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False


def _names(c: Config) -> set[str]:
    """Names of the rewards that score, `grader` where reward.functions has none."""
    return {function.name for function in functions_of(c.reward.functions)} or {GRADER}
