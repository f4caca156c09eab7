"""`critic`: the value model, on a model of its own or on the actor's frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from steepest.config.algorithms import ESTIMATORS
from steepest.config.checks import ACTOR, MODEL, Deriver, IsSet, NoEffect, Section, names_of
from steepest.config.needs import uses_reference
from steepest.config.sections.model import (
    OptimConfig,
    adapter_problems,
    model_without_effect,
    optim_without_effect,
    small_rate,
)
from steepest.config.tree import put
from steepest.config.types import (
    DERIVED,
    ComputeDtype,
    File,
    Hub,
    LossAggMode,
    Mapping,
    NonNegative,
    Positive,
    PositiveFloat,
    Seed,
)

if TYPE_CHECKING:
    from steepest.config.schema import Config

SECTION = Section()


@dataclass(frozen=True)
class CriticModelConfig:
    """`critic.model`: the value model's start, a backbone with a value head that begins at zero."""

    path: File = DERIVED
    """Folder in Hugging Face layout, GGUF file, or hub id; null: `actor_rollout_ref.model.path`."""
    hub: Hub = DERIVED
    """Hub of `path`; null: the actor's."""
    revision: str | None = None
    """Branch, tag or commit of `path` on the hub; null: the actor's if `path` is the same, else the newest."""
    trust_remote_code: bool = DERIVED
    """Run Python code that comes with the model folder; null: the actor's."""
    override_config: Mapping = field(default_factory=dict)
    """Values that replace those of the model's config.json."""
    enable_gradient_checkpointing: bool = DERIVED
    """Recompute activations in the backward pass; null: the actor's."""
    lora_rank: NonNegative = DERIVED
    """Train a LoRA adapter and the value head on the frozen model; 0: all weights. null: 0, with
    `critic.share_base=adapter` the actor's."""
    lora_alpha: Positive = DERIVED
    """The adapter's output is scaled by `lora_alpha / lora_rank`; null: the actor's."""
    target_modules: tuple[str, ...] = DERIVED
    """Linear layers that get the adapter, by name; null: the actor's."""
    exclude_modules: tuple[str, ...] | None = None
    """Of those, the ones left out, by name; null: the actor's."""


@dataclass(frozen=True)
class CriticComputeConfig:
    """`critic.fsdp`: how the critic computes."""

    dtype: ComputeDtype = DERIVED
    """dtype of forward and backward; null: the actor's."""


@dataclass(frozen=True)
class CriticConfig:
    """`critic`: the value model. Exists when the advantage estimator reads values (gae)."""

    enable: bool | None = None
    """null: on when the advantage estimator needs values."""
    share_base: Literal["adapter", "head"] | None = None
    """With LoRA, no model of the critic's own: adapter: a second adapter and a value head on the actor's frozen base;
    head: a value head alone, on hidden states of the reference's pass. Ours, not verl's."""
    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-5))
    fsdp: CriticComputeConfig = field(default_factory=CriticComputeConfig)
    ppo_mini_batch_size: Positive = DERIVED
    """Prompts an optimizer step; null: the actor's."""
    ppo_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward and backward; null: filled to `ppo_max_token_len_per_gpu`."""
    use_dynamic_bsz: bool = DERIVED
    """Fill micro-batches to a token budget; null: on unless `ppo_micro_batch_size_per_gpu` is given."""
    ppo_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch; null: the actor's."""
    forward_micro_batch_size_per_gpu: Positive | None = None
    """Sequences a forward of the pass that only reads values; null: `ppo_micro_batch_size_per_gpu`."""
    forward_max_token_len_per_gpu: Positive = DERIVED
    """Tokens a micro-batch of that pass; null: `ppo_max_token_len_per_gpu`."""
    cliprange_value: PositiveFloat = 0.5
    """The new value may move this far from the old one before its loss stops shrinking."""
    loss_agg_mode: LossAggMode = DERIVED
    """How token losses become one number; null: the actor's."""
    loss_scale_factor: PositiveFloat | None = None
    """Divisor of seq-mean-token-sum-norm; null: the actor's."""
    ppo_epochs: Positive = DERIVED
    """Passes over a step's batch; null: the actor's."""
    shuffle: bool = DERIVED
    """Shuffle the rows before they are cut into mini-batches; null: the actor's."""
    data_loader_seed: Seed = 42
    """Seed of that shuffle."""


@SECTION.null
def resolve(d: Deriver) -> None:
    estimator = ESTIMATORS.find(d["algorithm.adv_estimator"])
    if estimator is not None:  # else it is known when the run begins: plan.py
        d.fill("critic.enable", estimator.needs_critic, "algorithm.adv_estimator")
    _resolve_model(d)
    d.copy(f"{ACTOR}.fsdp_config.dtype", "critic.fsdp.dtype")
    for name in ("ppo_epochs", "shuffle", "loss_scale_factor"):
        d.copy(f"{ACTOR}.{name}", f"critic.{name}")
    # The critic follows the user's word, not what suits a loss of whole responses.
    mode = f"{ACTOR}.loss_agg_mode"
    d.fill("critic.loss_agg_mode", "token-mean" if mode in d.derived else d[mode], mode)


def _resolve_model(d: Deriver) -> None:
    d.fill("critic.model.path", d[f"{MODEL}.path"] or None, f"{MODEL}.path")
    for name in ("trust_remote_code", "hub", "enable_gradient_checkpointing"):
        d.copy(f"{MODEL}.{name}", f"critic.model.{name}")
    if d["critic.model.path"] == d[f"{MODEL}.path"] and d["critic.model.hub"] == d[f"{MODEL}.hub"]:
        d.copy(f"{MODEL}.revision", "critic.model.revision")
    share = d["critic.share_base"]
    if share == "adapter":
        d.copy(f"{MODEL}.lora_rank", "critic.model.lora_rank")
    d.fill("critic.model.lora_rank", 0, "critic.share_base")
    if share is not None and not d["critic.model.override_config"]:
        put(d.values, "critic.model.override_config", dict(d[f"{MODEL}.override_config"]))
    for name in ("lora_alpha", "target_modules", "exclude_modules"):
        d.copy(f"{MODEL}.{name}", f"critic.model.{name}")


@SECTION.rule("algorithm.adv_estimator", "critic.enable", "trainer.critic_warmup")
def critic_fits_the_estimator(c: Config, is_set: IsSet) -> Iterator[str]:
    name = c.algorithm.adv_estimator
    spec = ESTIMATORS.find(name)
    if spec is not None and spec.needs_critic and c.critic.enable is False:
        yield f"critic.enable=False with algorithm.adv_estimator={name}: {name} needs values. Remove it."
    if spec is not None and not spec.needs_critic and c.critic.enable:
        yield f"critic.enable=True with algorithm.adv_estimator={name}: nothing would read the values. Remove it."
    if c.trainer.critic_warmup and c.critic.enable is False:
        yield (
            f"trainer.critic_warmup={c.trainer.critic_warmup} without a critic (adv_estimator={name}): "
            "nothing would be trained in those steps. Remove it."
        )


@SECTION.rule("critic.share_base", f"{MODEL}.lora_rank", "critic.model.lora_rank")
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


_SHARED = ("path", "hub", "revision", "trust_remote_code", "override_config")
"""What actor and critic have in common when they share a base."""


@SECTION.rule(
    "critic.share_base", f"{MODEL}.path", "critic.model.path", "critic.fsdp.dtype", f"{ACTOR}.fsdp_config.dtype"
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


@SECTION.rule("critic.model.target_modules", "critic.model.exclude_modules")
def critic_adapter_has_layers(c: Config, is_set: IsSet) -> Iterator[str]:
    def given(name: str) -> tuple[str, ...] | None:
        """None where they are the actor's, which are checked there."""
        names: tuple[str, ...] | None = getattr(c.critic.model, name)
        return names if is_set(f"critic.model.{name}") else None

    yield from adapter_problems("critic.model", given("target_modules"), given("exclude_modules"))


@SECTION.no_effect
def keys_without_effect() -> list[NoEffect]:
    return [
        # asked before the section of the advantages, which has other reasons for the second key
        NoEffect(
            ("critic", "algorithm.bootstrap_truncated"),
            lambda c: c.critic.enable is False,
            "this run has no critic (algorithm.adv_estimator)",
        ),
        NoEffect(
            ("critic.loss_scale_factor",),
            lambda c: not str(c.critic.loss_agg_mode).endswith("-norm"),
            "no -norm loss_agg_mode",
        ),
        NoEffect(("critic.data_loader_seed",), lambda c: not c.critic.shuffle, "critic.shuffle is off"),
        NoEffect(
            names_of("critic", "model.enable_gradient_checkpointing model.lora_alpha model.target_modules fsdp.dtype")
            + names_of("critic.model", "exclude_modules"),
            lambda c: c.critic.share_base == "head",
            "critic.share_base=head trains a value head alone, on hidden states that are there already",
        ),
        NoEffect(
            names_of("critic", "forward_micro_batch_size_per_gpu forward_max_token_len_per_gpu"),
            lambda c: c.critic.share_base == "head" and uses_reference(c),
            "critic.share_base=head reads its values in the reference's own pass",
        ),
        *model_without_effect("critic.model", lambda c: c.critic.model),
        *optim_without_effect("critic.optim", lambda c: c.critic.optim),
    ]


@SECTION.warning
def small_critic_rate(given: dict[str, Any], config: Config) -> Iterator[str]:
    """An adapter or a head with the learning rate that suits all weights."""
    critic, key = config.critic, "critic.optim.lr"
    if critic.enable is False or key in given:
        return
    if critic.model.lora_rank > 0:
        yield small_rate(key, critic.optim.lr, "1e-4")
    if critic.share_base == "head":
        yield small_rate(key, critic.optim.lr, "1e-3")
