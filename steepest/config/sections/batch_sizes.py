"""Mini-batches and micro-batches: how actor, critic, reference and the pass for old log-probs cut the rows of a step.

The keys are fields of the four sections; what they must be to each other is here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from steepest.config.checks import ACTOR, REF, ROLLOUT, Deriver, IsSet, Section, without_effect
from steepest.config.needs import uses_reference

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()
TOKEN_BUDGET = 4096
"""Tokens a micro-batch by default. verl's 16384 (32768 for the critic) suit an 80 GB card; a 0.5B model needs about
2.5 MB a token for float32 activations, so 4096 tokens fit in 16 GB with the weights."""
MINI_BATCH = 256


_UPDATE = ("ppo_micro_batch_size_per_gpu", "ppo_max_token_len_per_gpu", "use_dynamic_bsz")
_FORWARD = ("log_prob_micro_batch_size_per_gpu", "log_prob_max_token_len_per_gpu", "log_prob_use_dynamic_bsz")
_PASSES = [
    (section, *(f"{section}.{name}" for name in names))
    for section, names in ((ACTOR, _UPDATE), (ROLLOUT, _FORWARD), ("critic", _UPDATE), (REF, _FORWARD))
]
"""(section, key of the rows of a micro-batch, key of its token budget, key that chooses)"""
_BUDGETS = [tokens for _, _, tokens, _ in _PASSES] + [
    "critic.forward_max_token_len_per_gpu",
    f"{ROLLOUT}.max_model_len",
]
"""Keys of at least one longest sequence."""


@SECTION.null
def resolve(d: Deriver) -> None:
    batch, longest = d["data.train_batch_size"], d["data.max_prompt_length"] + d["data.max_response_length"]
    d.fill(f"{ACTOR}.ppo_mini_batch_size", batch if batch % MINI_BATCH else MINI_BATCH, "data.train_batch_size")
    d.copy(f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size")
    actors = f"{ACTOR}.ppo_max_token_len_per_gpu"
    d.fill(actors, max(TOKEN_BUDGET, longest), "data.max_response_length")
    for _, rows, tokens, dynamic in _PASSES:
        d.copy(actors, tokens)
        d.fill(dynamic, d[rows] is None, rows)
        if d[dynamic] and d[rows] is not None:
            d.replace(rows, None, dynamic)
    forward = "critic.forward_micro_batch_size_per_gpu"
    if d["critic.use_dynamic_bsz"] and d[forward] is not None:
        d.replace(forward, None, "critic.use_dynamic_bsz")
    d.copy("critic.ppo_micro_batch_size_per_gpu", forward)
    d.copy("critic.ppo_max_token_len_per_gpu", "critic.forward_max_token_len_per_gpu")


@SECTION.rule("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size")
def mini_batches_divide_the_batch(c: Config, is_set: IsSet) -> Iterator[str]:
    if not is_set("data.train_batch_size"):  # it is chosen to fit, see config/settle.py
        return
    batch = c.data.train_batch_size
    sizes = {f"{ACTOR}.ppo_mini_batch_size": c.actor_rollout_ref.actor.ppo_mini_batch_size}
    if is_set("critic.ppo_mini_batch_size"):
        sizes["critic.ppo_mini_batch_size"] = c.critic.ppo_mini_batch_size
    for key, size in sizes.items():
        if size and batch % size:
            divisors = [d for d in range(1, batch + 1) if batch % d == 0]
            near = min(divisors, key=lambda d: (abs(d - size), d))
            yield f"{key}={size}: must divide data.train_batch_size={batch}, e.g. {near}."


@SECTION.rule(*(key for _, rows, _, dynamic in _PASSES for key in (rows, dynamic)))
def micro_batches_have_a_size(c: Config, is_set: IsSet) -> Iterator[str]:
    for _, rows, _, dynamic in _PASSES:
        if _value(c, dynamic) is False and not _value(c, rows):
            yield f"{dynamic}=False: needs {rows}, or remove it and micro-batches are filled to a token budget."


@SECTION.rule("data.max_prompt_length", "data.max_response_length", *_BUDGETS)
def one_sequence_fits(c: Config, is_set: IsSet) -> Iterator[str]:
    longest = c.data.max_prompt_length + c.data.max_response_length
    for key in _BUDGETS:
        tokens = _value(c, key)
        if is_set(key) and tokens is not None and tokens < longest:
            yield (
                f"{key}={tokens}: one sequence may have data.max_prompt_length + data.max_response_length = {longest} "
                f"tokens. Use at least {longest}."
            )


def _value(c: Config, key: str) -> Any:
    return operator.attrgetter(key)(c)


@SECTION.warning
def overruled_micro_batches(given: dict[str, Any], config: Config) -> Iterator[str]:
    """Micro-batch sizes that a token budget (use_dynamic_bsz=True) overrules, and budgets that a size overrules."""
    is_run = {"critic": config.critic.enable is not False, REF: uses_reference(config)}
    for section, rows, tokens, dynamic in _PASSES:
        if not is_run.get(section, True):
            continue
        if _value(config, dynamic) and given.get(rows) is not None:
            yield without_effect([rows], f"{dynamic}=True fills micro-batches to {tokens}")
        # the actor's budget is also the default of the other passes, so it always has an effect
        elif not _value(config, dynamic) and tokens in given and section in (REF, ROLLOUT):
            yield without_effect([tokens], f"{rows} gives the size in sequences")


@SECTION.warning
def critic_forward_is_overruled(given: dict[str, Any], config: Config) -> Iterator[str]:
    """The critic's forward size next to a token budget for its update."""
    key = "critic.forward_micro_batch_size_per_gpu"
    if config.critic.enable is not False and config.critic.use_dynamic_bsz and given.get(key) is not None:
        yield without_effect(
            [key], "the critic fills micro-batches to a token budget; critic.ppo_micro_batch_size_per_gpu is null"
        )
