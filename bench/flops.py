"""The arithmetic of a step: the number of floating-point operations that its passes need at least.

A decoder-only model of L layers, hidden size H, query width Q (heads x head size), key-value width K, intermediate size
I and vocabulary V. A product of (m, k) and (k, n) is 2mkn operations. One forward pass costs

    linear layers   2 L (H (Q + 2K) + Q H + 3 H I)      a token
    attention       2 L Q T (T + 1)                     a sequence of T tokens: scores and values, causal half
    vocabulary      2 H V                               a position that is scored

and a backward pass costs twice that: once for the inputs' gradient, once for the weights'. With frozen weights (LoRA)
it costs it once, and an adapter of rank r adds 2 r (inputs + outputs) per token to a forward pass and twice that to a
backward pass. Norms, softmax, sampling and the optimizer are left out: memory limits them, not arithmetic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Critic = Literal["none", "full", "adapter", "head"]
"""adapter and head: the critic uses the actor's frozen base (`critic.share_base`)."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model with gated MLPs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int

    @staticmethod
    def of(folder: Path) -> Shape:
        """Read from a model folder's config.json."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocab=config["vocab_size"],
        )

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's products as (inputs, outputs), those on one input fused."""
        q, k = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "qkv": (self.hidden, q + 2 * k),
            "o": (q, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def adapted(self) -> list[tuple[int, int]]:
        """The same products unfused, as LoRA adapts them: seven matrices."""
        q, k, h, i = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden, self.intermediate
        return [(h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h)]


@dataclass(frozen=True)
class Group:
    """A prompt and the responses sampled for it, in tokens."""

    prompt: int
    responses: tuple[int, ...]


def groups_of(prompts: Sequence[int], responses: Sequence[Sequence[int]]) -> list[Group]:
    return [Group(prompt, tuple(sizes)) for prompt, sizes in zip(prompts, responses, strict=True)]


def body(shape: Shape, groups: Sequence[Group], *, share_prompts: bool) -> int:
    """A forward pass through the layers; with `share_prompts` a prompt counts once, however many responses it has."""
    tokens = attended = 0
    for group in groups:
        for i, response in enumerate(group.responses):
            length = group.prompt + response
            tokens += length
            attended += length * (length + 1)
            if share_prompts and i:
                tokens -= group.prompt
                attended -= group.prompt * (group.prompt + 1)
    per_token = 2 * shape.layers * sum(inputs * outputs for inputs, outputs in shape.matrices.values())
    return tokens * per_token + 2 * shape.layers * shape.heads * shape.head_size * attended


def vocabulary(shape: Shape, groups: Sequence[Group]) -> int:
    """The output projection at every response token."""
    return 2 * shape.hidden * shape.vocab * sum(sum(group.responses) for group in groups)


def adapters(shape: Shape, groups: Sequence[Group], rank: int) -> int:
    """A forward pass through adapters of all linear layers."""
    tokens = sum(group.prompt + sum(group.responses) for group in groups)
    return tokens * 2 * shape.layers * rank * sum(inputs + outputs for inputs, outputs in shape.adapted)


def rollout_flops(shape: Shape, groups: Sequence[Group]) -> int:
    """Generation with a cache of keys and values: each prompt once, each response token once."""
    return body(shape, groups, share_prompts=True) + vocabulary(shape, groups)


def step_flops(
    shape: Shape,
    groups: Sequence[Group],
    *,
    critic: Critic,
    reference: bool,
    old_log_probs: bool,
    values: bool = True,
    lora_rank: int = 0,
    share_prompts: bool = False,
) -> dict[str, int]:
    """Operations of each pass of a step with one update.

    `old_log_probs`, `values`: true if the actor's log-probs, or the critic's values, have their own pass before the
    update. `share_prompts`: the training passes compute a group's prompt once. A value head alone (critic "head") is
    not counted, because it reads the hidden states of the reference's pass.
    """
    trunk = body(shape, groups, share_prompts=share_prompts)
    scored = trunk + vocabulary(shape, groups)
    extra = adapters(shape, groups, lora_rank)
    backward = 1 if lora_rank else 2
    return {
        "gen": rollout_flops(shape, groups),
        "old_log_prob": scored + extra if old_log_probs else 0,
        "ref": scored if reference else 0,
        "values": {"full": trunk, "adapter": trunk + extra}.get(critic, 0) if values else 0,
        "update_critic": {"full": 3 * trunk, "adapter": 2 * trunk + 3 * extra}.get(critic, 0),
        "update_actor": (1 + backward) * scored + 3 * extra,
    }
