"""What a model is asked for in one forward pass, and what it answers.

A model has one entry, its call: `model(LogProbs(packed))`, `model(Values(packed))`. So whatever hooks the call of a
module sees every pass; torch's FSDP2 gathers the weights there. Outside of the call nothing reads a weight, with one
exception: `Distributions` hands out the output projection.

Answers are named tuples, since hooks look for tensors in tuples. `flops` is the arithmetic of the pass, its backward
pass included where a gradient is recorded (see `models.flops`).

N packed tokens, M targets, b sequences, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from steepest.models.packing import Packed


@dataclass(frozen=True)
class LogProbs:
    """Log-probability of each target at a temperature. `CausalLM` answers `Scores`.

        log softmax(logits[predict_index] / temperature)[targets]

    The vocabulary projection runs on the M predicting positions only, in chunks. With no targets the answer is empty,
    and still differentiable.
    """

    packed: Packed
    temperature: float = 1.0
    with_entropy: bool = False
    with_squares: bool = False
    """Also the sum of the squared probabilities of each distribution, without a kernel of its own:

        log sum p^2 = logsumexp(2 s) - 2 logsumexp(s) = 2 log p(y) - log q(y)

    for any token y, where q is the distribution at half the temperature: the head runs twice on the same states."""


@dataclass(frozen=True)
class ExactKL:
    """`LogProbs`, and the exact KL to a reference at each target. `CausalLM` answers `Scores`."""

    packed: Packed
    reference: DistributionsFound
    """What the reference answered for the same `packed`. Nothing flows into it."""
    temperature: float = 1.0
    with_entropy: bool = False


class Scores(NamedTuple):
    """Answer to `LogProbs` and `ExactKL`."""

    log_probs: Tensor
    """(M,) f32."""
    entropies: Tensor | None
    """(M,) f32; None without `with_entropy`."""
    squares: Tensor | None
    """(M,) f32, sum over the vocabulary of the squared probabilities; None without `with_squares`."""
    kl: Tensor | None
    """(M,) f32 KL of the policy's next-token distributions to the reference's; None but for `ExactKL`."""
    flops: float


@dataclass(frozen=True)
class Distributions:
    """What the distributions of the targets are made of. `CausalLM` answers `DistributionsFound`."""

    packed: Packed


class DistributionsFound(NamedTuple):
    """Answer to `Distributions`, for the exact KL of another model to this one.

    `weight` and `bias` are the model's own, without a copy: a model that is sharded has to keep its output projection
    gathered until the pass that reads it, backward included, is over.
    """

    states: Tensor
    """(M, H), the last hidden states at `predict_index`."""
    weight: Tensor
    """(V, H) of the output projection, without gradient; in bf16, its copy there, under autocast to that."""
    bias: Tensor | None
    """(V,)."""
    flops: float


@dataclass(frozen=True)
class HiddenStates:
    """The last hidden states where a value is read. `CausalLM` answers `StatesFound`."""

    packed: Packed
    temperature: float = 1.0
    with_log_probs: bool = False


class StatesFound(NamedTuple):
    """Answer to `HiddenStates`."""

    before: Tensor
    """(M, H), at `predict_index`: before each target."""
    final: Tensor
    """(b, H), at `final_index`: after each sequence's last token."""
    log_probs: Tensor | None
    """(M,) f32 as of `LogProbs`; None without `with_log_probs`."""
    flops: float


@dataclass(frozen=True)
class Values:
    """Values of the states before each target, and after each sequence's last token. `ValueModel` answers
    `ValuesFound`."""

    packed: Packed
    with_final: bool = False


@dataclass(frozen=True)
class HeadValues:
    """Values of states that another model has computed: the head alone runs. `ValueModel` answers `ValuesFound`."""

    hidden: Tensor
    """(M, H)."""


class ValuesFound(NamedTuple):
    """Answer to `Values` and `HeadValues`. The head runs in fp32 under autocast too."""

    values: Tensor
    """(M,) f32."""
    final: Tensor | None
    """(b,) f32; None without `with_final`."""
    flops: float
