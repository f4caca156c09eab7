"""Checks that packing does not change a model's numbers: once per model, after loading, on a dozen tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steepest.core.log_probs import log_softmax, token_log_probs
from steepest.errors import ModelError
from steepest.models.attention import SUPPORTED, RecordingContext, attention_implementation
from steepest.models.causal_lm import CausalLM, logit_transform, run_backbone
from steepest.models.packing import Packed, pack_sequences

TOLERANCE = {torch.float32: 1e-4}
"""Largest accepted difference of log-probs; 1e-3 for other dtypes of weights."""
_LENGTHS = (5, 7)


@torch.no_grad()
def check_causal_lm(model: CausalLM) -> dict[int, tuple[int, int, int]]:
    """Compare packed log-probs with transformers' own, each sequence alone and with eager attention.

    Covers attention, positions and the head's scale, bias and soft cap. Returns the key/value shapes of each layer
    (see RecordingContext.shapes). Raises ModelError when anything differs.
    """
    packed, context = _random_batch(model.vocab_size, _device(model))
    hidden = _packed_hidden(model.hf, packed, context)
    head = model.hf.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    mine, _ = token_log_probs(
        hidden[packed.predict_index], head.weight, head.bias, packed.targets, logit_scale=scale, softcap=softcap
    )
    with attention_implementation(model.hf, "eager"):
        theirs = torch.cat([_own_log_probs(model.hf, ids) for ids in packed.input_ids.split(_LENGTHS)])
    _compare(model.hf, mine, theirs, "log-probs", TOLERANCE.get(head.weight.dtype, 1e-3))
    _check_layers(model.hf, context)
    return context.shapes


@torch.no_grad()
def check_backbone(model: PreTrainedModel) -> None:
    """Do the same for a model without a vocabulary head: compare the hidden states that a value head reads."""
    packed, context = _random_batch(model.get_input_embeddings().weight.shape[0], _device(model))
    mine = _packed_hidden(model, packed, context)
    with attention_implementation(model, "eager"):
        alone = [
            model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            for ids in packed.input_ids.split(_LENGTHS)
        ]
    theirs = torch.cat(alone)
    unit = float(theirs.abs().max().clamp(min=1.0))
    _compare(model, mine / unit, theirs / unit, "hidden states", TOLERANCE.get(mine.dtype, 1e-3))
    _check_layers(model, context)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _random_batch(vocab_size: int, device: torch.device) -> tuple[Packed, RecordingContext]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS]
    packed = pack_sequences(ids, [[False] + [True] * (n - 1) for n in _LENGTHS]).to(device)
    return packed, RecordingContext(packed.lengths, device)


def _packed_hidden(hf: PreTrainedModel, packed: Packed, context: RecordingContext) -> Tensor:
    try:
        return run_backbone(hf.base_model, packed.input_ids, packed.position_ids, context)
    except (TypeError, RuntimeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{type(hf).__name__}: this architecture cannot be packed: {type(error).__name__}: {error}. {SUPPORTED}"
        ) from error


def _own_log_probs(hf: PreTrainedModel, ids: Tensor) -> Tensor:
    logits = hf(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return log_softmax(logits.float()).gather(1, ids[1:, None])[:, 0]


def _compare(hf: PreTrainedModel, mine: Tensor, theirs: Tensor, what: str, tolerance: float) -> None:
    difference = float((mine.float() - theirs.float()).abs().max())
    if not difference <= tolerance:  # also refuses NaN
        raise ModelError(
            f"{type(hf).__name__}: this architecture cannot be packed: {what} of packed sequences differ from those "
            f"of transformers by {difference:.2g} (allowed {tolerance:.0e}). {SUPPORTED}"
        )


def _check_layers(hf: PreTrainedModel, context: RecordingContext) -> None:
    expected = hf.config.get_text_config().num_hidden_layers
    if sorted(context.shapes) != list(range(expected)):
        raise ModelError(
            f"{type(hf).__name__}: this architecture cannot be packed: it has {expected} layers, but attention ran in "
            f"{len(context.shapes)} of them. {SUPPORTED}"
        )
