"""Values of keys that the user left open and that follow from device, rows and model: known once data is read.
They replace the schema's defaults, are printed, and stand in the run's `config.yaml`.

A start that goes on with a run may find another device or other rows; the batch sizes are then those of the run's
`config.yaml`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from steepest.config import tree
from steepest.config.checks import ACTOR, ROLLOUT
from steepest.config.schema import Config, SFTConfig

ConfigT = TypeVar("ConfigT", Config, SFTConfig)
BATCH, MINI, CRITIC_MINI = "data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", "critic.ppo_mini_batch_size"
CARD_RESPONSES, CPU_RESPONSES = 512, 128
"""Responses of a step where the user gave no batch size."""
UPDATES = 4
"""Mini-batches of such a step, as in verl's defaults (1024 prompts, 256 an update)."""


PPO_DTYPES = (f"{ACTOR}.fsdp_config.dtype", f"{ROLLOUT}.dtype", "critic.fsdp.dtype", "reward.reward_model.dtype")
SFT_DTYPES = ("engine.dtype",)
"""Keys of the dtypes of compute; the first decides for those that are left open."""


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


def settle_batch(
    config: Config, num_rows: int, *, on_card: bool, earlier: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """The prompts of a step, and of an update, where the user gave none; and sentences that say so.

    earlier: the values of the run that goes on, by key. They are kept where they fit what the user gave now.
    """
    if not is_open(config, BATCH) or num_rows == 0:
        return config, []
    if kept := _sizes_of_the_run(config, num_rows, earlier or {}):
        said = ", ".join(f"{key}={value}" for key, value in kept.items())
        return with_values(config, kept, "the run's config.yaml"), [f"{said}: as at the run's last start."]
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


def _sizes_of_the_run(config: Config, num_rows: int, earlier: Mapping[str, Any]) -> dict[str, int]:
    """The sizes that the user left open as they were in `earlier`; empty where they do not fit rows and given sizes."""
    given = {MINI: config.actor_rollout_ref.actor.ppo_mini_batch_size, CRITIC_MINI: config.critic.ppo_mini_batch_size}
    found = {key: earlier.get(key) for key in (BATCH, *given) if is_open(config, key)}
    sizes = {key: size for key, size in found.items() if type(size) is int and size > 0}
    batch = sizes.get(BATCH, 0)
    fits = sizes.keys() == found.keys() and batch <= num_rows
    return sizes if fits and all(batch % size == 0 for size in {**given, **sizes}.values()) else {}


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


def settle_dtype(
    config: ConfigT,
    keys: tuple[str, ...],
    choose: Callable[[], tuple[str, str | None]],
    earlier: Mapping[str, Any] | None = None,
) -> tuple[ConfigT, str | None]:
    """One dtype for the `keys` that are auto: the first key's, if that is given; else that of the run that goes on
    (`earlier`: its values, by key); else what `choose` says. Also the sentence for the summary, if there is one."""
    first, asked = keys[0], {key: operator.attrgetter(key)(config) for key in keys}
    if "auto" not in asked.values():
        return config, None
    dtype, said, origin = asked[first], None, first
    if dtype == "auto":
        kept = (earlier or {}).get(first)
        if kept in ("bfloat16", "float32"):
            dtype, origin = kept, "the run's config.yaml"
            said = f"{kept}: as at the run's last start. {first} gives another."
        else:
            dtype, said = choose()
            origin = "the device"
    return with_values(config, {key: dtype for key, value in asked.items() if value == "auto"}, origin), said
