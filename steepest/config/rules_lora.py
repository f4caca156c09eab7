"""Rules about LoRA, and about a critic on the actor's frozen base. See rules.py."""

from __future__ import annotations

from collections.abc import Iterator

from steepest.config.resolve import ACTOR, MODEL, IsSet
from steepest.config.rules import Rule, rule
from steepest.config.schema import Config
from steepest.config.sections.model import CriticModelConfig, ModelConfig
from steepest.config.sections.sft import SFTConfig

LORA_RULES: list[Rule] = []
SFT_LORA_RULES: list[Rule] = []
_SHARED = ("path", "hub", "revision", "trust_remote_code", "override_config")
"""What actor and critic have in common when they share a base."""


@rule("critic.share_base", f"{MODEL}.lora_rank", "critic.model.lora_rank", table=LORA_RULES)
def a_shared_base_is_frozen(c: Config, is_set: IsSet) -> Iterator[str]:
    share, rank = c.critic.share_base, c.critic.model.lora_rank
    if share is not None and c.actor_rollout_ref.model.lora_rank == 0:
        yield (
            f"critic.share_base={share}: the actor's base is frozen with LoRA only. Set {MODEL}.lora_rank, e.g. 16, or "
            "remove it."
        )
    elif share == "adapter" and rank == 0:
        yield "critic.share_base=adapter with critic.model.lora_rank=0: an adapter of rank 0 is none. Remove the rank."
    elif share == "head" and rank > 0:
        yield (
            f"critic.share_base=head with critic.model.lora_rank={rank}: a head has no adapter. Remove the rank, or "
            "use critic.share_base=adapter."
        )


@rule(
    "critic.share_base",
    f"{MODEL}.path",
    "critic.model.path",
    "critic.fsdp.dtype",
    f"{ACTOR}.fsdp_config.dtype",
    table=LORA_RULES,
)
def a_shared_base_is_one_model(c: Config, is_set: IsSet) -> Iterator[str]:
    if c.critic.share_base is None:
        return
    values = [
        (f"model.{name}", getattr(c.critic.model, name), getattr(c.actor_rollout_ref.model, name)) for name in _SHARED
    ]
    values.append(("fsdp.dtype", c.critic.fsdp.dtype, c.actor_rollout_ref.actor.fsdp_config.dtype))
    for name, mine, actors in values:
        if mine != actors:
            yield (
                f"critic.{name}={mine}: with critic.share_base={c.critic.share_base} the critic runs on the actor's "
                f"base, where it is {actors}. Remove it, or give the critic a model of its own "
                "(critic.share_base=null)."
            )


def _chosen(key: str, names: tuple[str, ...]) -> Iterator[str]:
    if not names:
        yield f"{key}=[]: no layer would be trained. Give names of layers, or all-linear."
    if "all-linear" in names and len(names) > 1:
        yield f"{key}=[{','.join(names)}]: all-linear stands alone, for all linear layers. Give it, or names of layers."


def _left_out(key: str, names: tuple[str, ...] | None) -> Iterator[str]:
    if "all-linear" in (names or ()):
        yield f"{key}=[{','.join(names or ())}]: nothing would be left. Give names of layers."


@rule(f"{MODEL}.target_modules", f"{MODEL}.exclude_modules", "critic.model.target_modules", table=LORA_RULES)
def adapters_have_layers(c: Config, is_set: IsSet) -> Iterator[str]:
    models: list[tuple[str, ModelConfig | CriticModelConfig]] = [(MODEL, c.actor_rollout_ref.model)]
    models.append(("critic.model", c.critic.model))
    for section, model in models:
        if section == MODEL or is_set(f"{section}.target_modules"):  # else they are the actor's, and told there
            yield from _chosen(f"{section}.target_modules", model.target_modules)
        if section == MODEL or is_set(f"{section}.exclude_modules"):
            yield from _left_out(f"{section}.exclude_modules", model.exclude_modules)


@rule("model.target_modules", "model.exclude_modules", table=SFT_LORA_RULES)
def sft_adapter_has_layers(c: SFTConfig, is_set: IsSet) -> Iterator[str]:
    yield from _chosen("model.target_modules", c.model.target_modules)
    yield from _left_out("model.exclude_modules", c.model.exclude_modules)
