"""Values of keys that the user left open and that follow from device, rows and model: known once data is read.
They replace the schema's defaults, are printed, and stand in the run's `config.yaml`.

All are functions of what does not change between two starts of a run, so that a resumed run has the same.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, TypeVar

from steepest.config import tree
from steepest.config.checks import ACTOR
from steepest.config.schema import Config, SFTConfig

ConfigT = TypeVar("ConfigT", Config, SFTConfig)
BATCH, MINI, CRITIC_MINI = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size"
CARD_RESPONSES, CPU_RESPONSES = 512, 128
"""Responses of a step where the user gave no batch size."""
UPDATES = 4
"""Mini-batches of such a step, as in verl's defaults (1024 prompts, 256 an update)."""


def is_open(config: Config | SFTConfig, key: str) -> bool:
    """Whether the value follows from no choice of the user's."""
    source = config.provenance.sources.get(key, "default")
    return source == "default" or source.startswith("derived from ")


def with_values(config: ConfigT, values: Mapping[str, Any], origin: str) -> ConfigT:
    """The configuration with other values, whose source is "derived from <origin>"."""
    plain = tree.thaw(config)
    for key, value in values.items():
        tree.put(plain, key, value)
    sources = {**config.provenance.sources, **dict.fromkeys(values, f"derived from {origin}")}
    return tree.freeze(type(config), plain, provenance=dataclasses.replace(config.provenance, sources=sources))


def settle_batch(config: Config, num_rows: int, *, on_card: bool) -> tuple[Config, list[str]]:
    """The prompts of a step, and of an update, where the user gave none; and sentences that say so."""
    if not is_open(config, BATCH) or num_rows == 0:
        return config, []
    n, responses = config.actor_rollout_ref.rollout.n, CARD_RESPONSES if on_card else CPU_RESPONSES
    sizes = {MINI: config.actor_rollout_ref.actor.ppo_mini_batch_size, CRITIC_MINI: config.critic.ppo_mini_batch_size}
    given = {key: size for key, size in sizes.items() if not is_open(config, key)}
    unit = math.lcm(*given.values()) if given else UPDATES  # mini-batches divide the batch
    batch = min(max(1, responses // n), num_rows)
    batch = batch // unit * unit or (unit if given else batch)
    actor = given.get(MINI, batch // UPDATES if batch % UPDATES == 0 else batch)
    values: dict[str, Any] = {BATCH: batch, MINI: actor, CRITIC_MINI: actor}
    values = {key: value for key, value in values.items() if key not in given}
    where = "a card" if on_card else "a CPU"
    note = (
        f"{BATCH}={batch} was chosen: about {responses} responses a step on {where} ({n} a prompt, {num_rows} rows), "
        f"{actor} prompts an update. Give the key for another size."
    )
    return with_values(config, values, "device and rows"), [note]


def settle_sft_batch(config: SFTConfig, num_rows: int) -> tuple[SFTConfig, list[str]]:
    """No more samples a step than there are, where the user gave no number."""
    if not is_open(config, BATCH) or not 0 < num_rows < config.data.train_batch_size:
        return config, []
    note = f"{BATCH}={num_rows} was chosen: there are no more rows. Give the key for a smaller size."
    return with_values(config, {BATCH: num_rows}, "rows"), [note]


def settle_sft_length(config: SFTConfig, limit: int, longest: int) -> tuple[SFTConfig, list[str]]:
    """`data.max_length` within the model's `limit`, where the user gave none and the `longest` row fits."""
    key = "data.max_length"
    if not is_open(config, key) or config.data.max_length <= limit or longest > limit:
        return config, []
    note = f"{key}={limit} was chosen: the model takes no longer sequences (the default is {config.data.max_length})."
    return with_values(config, {key: limit}, "model.path"), [note]


def settle_lengths(config: Config, limit: int, longest_prompt: int) -> tuple[Config, list[str]]:
    """Lengths of prompt and response that fit the model's `limit` together, where the user left one of them open.

    `longest_prompt` is the longest of the data, in tokens. What the user gave is kept, and refused later if it does not
    fit.
    """
    keys = "data.max_prompt_length", "data.max_response_length"
    prompt, response = (operator.attrgetter(key)(config) for key in keys)
    free = [is_open(config, key) for key in keys]
    if prompt + response <= limit or not any(free):
        return config, []
    needed = min(longest_prompt, prompt) if free[0] else prompt
    if free[1]:
        response = min(response, limit - needed)
    if free[0]:
        prompt = min(prompt, limit - response)
    if response < 1 or prompt < needed:
        return config, []
    values = {key: value for key, value, is_free in zip(keys, (prompt, response), free, strict=True) if is_free}
    said = ", ".join(f"{key}={value}" for key, value in values.items())
    note = f"{said} was chosen: the model takes sequences of at most {limit} tokens, prompt and response together."
    origin = "actor_rollout_ref.model.path"
    return with_values(config, {**values, "actor_rollout_ref.rollout.max_model_len": _model_len(config, limit)},
                       origin), [note]  # fmt: skip


def _model_len(config: Config, limit: int) -> int:
    return min(config.actor_rollout_ref.rollout.max_model_len, limit)
