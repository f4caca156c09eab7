"""Times one layer of a run's model in each dtype: a micro-batch forward and backward, and a token step of the engine.

The layer is computed by the run's own code, the passes of `Trainable` and the built-in engine, on random weights of the
model's shape. It takes less than a second, however large the model is: of a large layer, fewer tokens are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steepest.assembly.compute import ACTOR_MODEL, compute_settings, overrides
from steepest.assembly.lora import lora_settings
from steepest.config.sections.model import ModelConfig
from steepest.devices.api import Device
from steepest.learner.metrics import Sums
from steepest.learner.micro_batches import MicroBatches
from steepest.learner.optim import OptimSettings
from steepest.learner.trainable import Trainable
from steepest.models.bf16_storage import hold_in_bf16
from steepest.models.causal_lm import CausalLM
from steepest.models.load import SOURCE_DTYPE, one_layer
from steepest.models.lora_models import LoraCausalLM
from steepest.models.packing import Packed, pack_sequences
from steepest.models.passes import HiddenStates
from steepest.process.malloc import give_back_freed
from steepest.rollout.api import GenerationRequest, SamplingParams
from steepest.rollout.builtin.engine import BuiltinEngine
from steepest.rollout.weights import LocalWeights, ModelDescription

DTYPES = ("float32", "bfloat16")
_PASSES, _DECODING = 0.2, 0.1
"""Seconds for repetitions of micro-batches, and of token steps."""
_LONGEST = 0.06
"""Seconds of the longest micro-batch."""
_FIRST = 16
"""Tokens of the first micro-batch, which shows how long one takes."""
_MOST_STEPS = 4
"""Token steps of one call of the engine."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """The sizes at which a layer is timed: those of the run."""

    micro_tokens: int
    """Tokens of a micro-batch; 0: no micro-batch is timed."""
    sequence: int
    """Tokens of a row in it."""
    decoded_rows: int
    """Rows decoded at once; 0: no token step is timed."""
    context: int
    """Tokens before the one that is decoded."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one layer at a `Shape`; 0 for what is not timed."""

    forward: float = 0.0
    backward: float = 0.0
    token_step: float = 0.0


@torch.random.fork_rng([])
def time_layer(
    model: ModelConfig, folder: Path, shape: Shape, device: Device, clock: Clock = time.perf_counter
) -> Mapping[str, Cost]:
    """dtype -> cost. It draws no random number of the run."""
    first = one_layer(folder, trust_remote_code=model.trust_remote_code, override_config=overrides(model))
    trials = {}
    for dtype, trunk in zip(DTYPES, (first, first.copy_as(torch.float32).requires_grad_(True)), strict=True):
        compute = compute_settings(model, ACTOR_MODEL, dtype, device)
        trials[dtype] = _Layer(_as_trained(trunk, model), compute=compute, optim=OptimSettings(lr=0.0))
    passes = _micro_batches(trials, shape, clock) if shape.micro_tokens else dict.fromkeys(DTYPES, (0.0, 0.0))
    steps = _token_steps(trials, shape, clock) if shape.decoded_rows else dict.fromkeys(DTYPES, 0.0)
    trials.clear()
    give_back_freed()
    return {dtype: Cost(*passes[dtype], steps[dtype]) for dtype in DTYPES}


@torch.no_grad()
def _as_trained(trunk: CausalLM, model: ModelConfig) -> CausalLM:
    """The model as the run trains it: as it is, or under an adapter with its base held as the files have it."""
    settings = lora_settings(model)
    if settings is None:
        return trunk
    adapted = LoraCausalLM(trunk.hf, settings)
    if getattr(trunk.config, SOURCE_DTYPE, None) == "bfloat16":
        hold_in_bf16(adapted.hf, rounding=True)
    return adapted


class _Layer(Trainable[CausalLM]):
    role = "actor"

    def timed(self, part: Packed, clock: Clock) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass."""
        between = 0.0

        def loss_of(packed: Packed, sums: Sums) -> Tensor:
            nonlocal between
            with self.autocast():
                found = self.run(HiddenStates(packed))
            loss: Tensor = found.before.float().sum()
            between = clock()
            return loss

        start = clock()
        self.accumulate([part], loss_of, MicroBatches())
        return between - start, clock() - between


def _micro_batches(trials: Mapping[str, _Layer], shape: Shape, clock: Clock) -> dict[str, tuple[float, float]]:
    """dtype -> seconds forward and backward of a micro-batch, scaled from the one that there is time for."""
    probe = _packed(_FIRST, shape.sequence)
    for trial in trials.values():
        trial.timed(probe, clock)  # starts threads, allocates gradients, compiles
    slowest = max(sum(trial.timed(probe, clock)) for trial in trials.values())
    fits = int(len(probe.input_ids) * _LONGEST / slowest)
    part = _packed(max(_FIRST, min(shape.micro_tokens, fits)), shape.sequence)
    scale = shape.micro_tokens / len(part.input_ids)

    def once(dtype: str) -> tuple[float, float]:
        return trials[dtype].timed(part, clock)

    best = _best(once, _PASSES, clock)
    return {dtype: (scale * forward, scale * backward) for dtype, (forward, backward) in best.items()}


def _packed(tokens: int, sequence: int) -> Packed:
    """About `tokens` tokens in rows of at most `sequence`."""
    length = max(2, min(tokens, sequence))
    rows = max(1, tokens // length)
    return pack_sequences([[1] * length] * rows, [[False, *[True] * (length - 1)]] * rows)


def _token_steps(trials: Mapping[str, _Layer], shape: Shape, clock: Clock) -> dict[str, float]:
    """dtype -> seconds of a token step, sampling from a small vocabulary included."""
    engines: dict[str, BuiltinEngine] = {}
    for dtype, trial in trials.items():
        engines[dtype] = BuiltinEngine(
            ModelDescription.of(trial.model),
            end_token_ids=(),
            pad_token_id=0,
            dtype=getattr(torch, dtype),
            max_num_seqs=shape.decoded_rows,
            max_model_len=shape.context + _MOST_STEPS + 1,
        )
        engines[dtype].load_weights(LocalWeights(trial.model), 0)
    calls = {steps: _request(shape, steps) for steps in (1, _MOST_STEPS)}

    def once(dtype: str) -> tuple[float, ...]:
        engines[dtype].generate(calls[steps])
        stats = engines[dtype].stats
        return (stats.decode_s / stats.decode_steps,)

    steps = 1
    if max(once(dtype)[0] for dtype in DTYPES) * _MOST_STEPS <= _DECODING / 4:
        steps = _MOST_STEPS
    return {dtype: found for dtype, (found,) in _best(once, _DECODING, clock).items()}


def _request(shape: Shape, steps: int) -> Sequence[GenerationRequest]:
    """One prompt, whose rows are decoded for a number of steps after their first token."""
    sampling = SamplingParams(max_tokens=1 + steps, n=shape.decoded_rows, ignore_eos=True)
    return [GenerationRequest([1] * shape.context, sampling, "trial")]


def _best(once: Callable[[str], tuple[float, ...]], seconds: float, clock: Clock) -> dict[str, tuple[float, ...]]:
    """dtype -> the shortest of its runs, which take turns, since others may use the machine meanwhile. The first runs
    compile and allocate, and do not count."""
    deadline = clock() + seconds
    for dtype in DTYPES:
        once(dtype)
    runs: dict[str, list[tuple[float, ...]]] = {dtype: [] for dtype in DTYPES}
    while not runs[DTYPES[-1]] or clock() < deadline:
        for dtype in DTYPES:
            runs[dtype].append(once(dtype))
    return {dtype: min(found, key=sum) for dtype, found in runs.items()}
