"""`dtype=auto`: the dtype that a run computes in. Actor, critic, reference and engine have the same.

A resumed run keeps that of its last start. A card computes in what it has by default, a processor without bf16
instructions in float32. A processor that has them is asked: one layer of the run's model is timed in both, and the one
in which a step takes less wins. Small models are faster in float32, since a cast costs more than a product saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from steepest.assembly.compute import shares_prompts
from steepest.assembly.layer_trial import DTYPES, Cost, Shape, time_layer
from steepest.config.algorithms import EstimatorSpec
from steepest.config.plan import Plan, make_plan
from steepest.config.schema import Config, SFTConfig
from steepest.config.sections.model import ModelConfig
from steepest.devices.api import Device
from steepest.errors import ModelError
from steepest.models.architectures import TRIAL_ERRORS, first_line
from steepest.models.attention import CannotPack

Measure = Callable[[Shape], Mapping[str, Cost]]
"""The cost of a layer of the run's model in each dtype."""
TRIAL = (*TRIAL_ERRORS, CannotPack, ModelError)
"""What may be raised where a model cannot be cut down to a layer."""


@dataclass(frozen=True)
class Work:
    """What a step asks of each layer."""

    shape: Shape
    updates: float = 0.0
    """Micro-batches forward and backward."""
    passes: Mapping[str, float] | None = None
    """dtype -> micro-batches forward only."""
    token_steps: int = 0

    def seconds(self, dtype: str, cost: Cost) -> float:
        """Seconds of one layer in a step."""
        forward = self.updates + (self.passes or {}).get(dtype, 0.0)
        return forward * cost.forward + self.updates * cost.backward + self.token_steps * cost.token_step


def choose_dtype(device: Device, work_of: Callable[[], Work], measure: Measure) -> tuple[str, str | None]:
    """(dtype, the sentence for the summary); None where nothing was timed, and the device's own sentence says why."""
    can, why = device.supports_bf16()
    default = str(device.default_dtype()).removeprefix("torch.")
    if not can or not device.measures_dtype:
        return default, None
    work = work_of()
    try:
        costs = measure(work.shape)
    except TRIAL as error:
        return default, f"{default}: {why}; a layer of this model cannot be timed alone ({first_line(error)})"
    seconds = {dtype: work.seconds(dtype, costs[dtype]) for dtype in DTYPES}
    best = min(DTYPES, key=lambda dtype: seconds[dtype])  # float32 where both are equal
    (other,) = set(DTYPES) - {best}
    return best, f"{best}: {_figures(work, costs[best], costs[other], other)}: {_ratio(seconds, best, other)}"


def _figures(work: Work, mine: Cost, theirs: Cost, other: str) -> str:
    shape, said = work.shape, []
    if shape.micro_tokens:
        pair = mine.forward + mine.backward, theirs.forward + theirs.backward
        said.append((f"a layer's micro-batch of {shape.micro_tokens} tokens", pair))
    if shape.decoded_rows:
        said.append((f"its token step of {shape.decoded_rows} row(s)", (mine.token_step, theirs.token_step)))
    return ", ".join(f"{what} {_ms(a)} ({other} {_ms(b)})" for what, (a, b) in said)


def _ms(seconds: float) -> str:
    """0.0123 -> 12.3 ms, 1.234 -> 1234 ms."""
    return f"{1e3 * seconds:.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _ratio(seconds: Mapping[str, float], best: str, other: str) -> str:
    return f"a step takes {seconds[best] / seconds[other]:.2f} of {other}'s time"


def measure_for(model: ModelConfig, folder: Path, device: Device) -> Measure:
    """Times a layer of the model in `folder`."""
    return lambda shape: time_layer(model, folder, shape, device)


def sft_work(config: SFTConfig, sample_tokens: float) -> Work:
    """The work of an SFT step. `sample_tokens`: of a sample, on average."""
    data = config.data
    batch = data.train_batch_size * sample_tokens
    rows = data.micro_batch_size_per_gpu
    micro = data.max_token_len_per_gpu if rows is None else rows * sample_tokens
    shape = Shape(max(1, round(min(micro, batch))), round(sample_tokens), decoded_rows=0, context=0)
    return Work(shape, updates=batch / shape.micro_tokens)


def ppo_work(
    config: Config, prompt_tokens: float, num_train: int, num_val: int, spec: EstimatorSpec | None, device: Device
) -> Work:
    """The work of a PPO step, or of a validation in a run that does nothing else. `prompt_tokens`: of a prompt, on
    average. Every response counts as long as it may be. Another engine than the built-in is not timed."""
    rollout, response = config.actor_rollout_ref.rollout, config.data.max_response_length
    ours = rollout.name == "builtin" and rollout.dtype == "auto"
    if config.trainer.val_only:
        rows = num_val * rollout.val_kwargs.n
        steps = _token_steps(config, rows) if ours else 0
        return Work(_shape(config, prompt_tokens, rows if steps else 0, 0), token_steps=steps)
    plans = {dtype: make_plan(config, num_train, spec, half_precision=dtype != "float32") for dtype in DTYPES}
    rows = plans["float32"].rows_per_step
    prompts = rows // rollout.n if shares_prompts(config, device) else rows
    tokens = prompts * prompt_tokens + rows * response
    micro = _micro_tokens(config, tokens * plans["float32"].mini_batch_rows / rows, prompt_tokens + response)
    times = tokens / micro
    steps = _token_steps(config, rows) if ours else 0
    own_critic = plans["float32"].needs_critic and config.critic.share_base != "head"
    return Work(
        _shape(config, prompt_tokens, rows if steps else 0, micro),
        updates=times * (config.actor_rollout_ref.actor.ppo_epochs + own_critic * config.critic.ppo_epochs),
        passes={dtype: times * _forward_passes(config, plan) for dtype, plan in plans.items()},
        token_steps=steps,
    )


def _shape(config: Config, prompt_tokens: float, rows: int, micro: int) -> Shape:
    response = config.data.max_response_length
    return Shape(
        micro_tokens=micro,
        sequence=round(prompt_tokens) + response,
        decoded_rows=min(rows, config.actor_rollout_ref.rollout.max_num_seqs),
        context=max(1, round(prompt_tokens) + response // 2),
    )


def _micro_tokens(config: Config, mini_batch: float, sequence: float) -> int:
    """Tokens of a micro-batch of the actor's update."""
    actor = config.actor_rollout_ref.actor
    rows, budget = actor.ppo_micro_batch_size_per_gpu, actor.ppo_max_token_len_per_gpu
    limit = rows * sequence if rows is not None and not actor.use_dynamic_bsz else max(budget, sequence)
    return max(1, round(min(limit, mini_batch)))


def _forward_passes(config: Config, plan: Plan) -> int:
    """Passes without gradient over all rows of a step."""
    reads_values = plan.needs_critic and not plan.values_by_update
    if config.critic.share_base == "head" and plan.needs_reference:
        reads_values = False  # the head reads what the reference has computed
    return (plan.old_log_probs == "pass") + plan.needs_reference + reads_values


def _token_steps(config: Config, rows: int) -> int:
    """Those of decoding: the first token of a response comes from the pass over its prompt."""
    at_once = min(rows, config.actor_rollout_ref.rollout.max_num_seqs)
    return -(-rows // at_once) * (config.data.max_response_length - 1)
