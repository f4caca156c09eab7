"""Chooses how a model runs and checks it: once per model, after loading, on a dozen tokens.

A model runs on packed sequences if that gives the numbers of transformers, each sequence alone and with eager
attention. If it does not, the model runs in rows (`models/rows.py`), which is compared in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from steepest.core.log_probs import log_softmax, token_log_probs
from steepest.errors import ModelError, setting
from steepest.models.architectures import TRIAL_ERRORS, first_line, refusal
from steepest.models.attention import CannotPack, RecordingContext, attention_implementation
from steepest.models.causal_lm import CausalLM, logit_transform, run_backbone
from steepest.models.packing import Packed, pack_sequences
from steepest.models.rows import RowsContext, rows_reason, use_rows

TOLERANCE = {torch.float32: 1e-4}
"""Largest accepted difference of log-probs; 1e-3 for other dtypes of weights."""
_LENGTHS = (5, 7)


@torch.no_grad()
def check_causal_lm(model: CausalLM) -> dict[int, tuple[int, int, int]]:
    """Choose packed sequences or rows for the model, by a comparison of log-probs.

    Covers attention, positions and the head's scale, bias and soft cap. Returns the key/value shapes of each layer if
    the model is packed (see RecordingContext.shapes). Raises ModelError if both ways differ from transformers.
    """
    hf, head = model.hf, model.hf.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        raise ModelError(_refusal(hf, "its logits do not come from one output projection"))
    if hf.base_model is hf:
        raise ModelError(_refusal(hf, "transformers does not tell its backbone from its head"))
    packed = _random_batch(model.vocab_size, _device(model))
    theirs = [_of_own(hf, ids) for ids in packed.input_ids.split(_LENGTHS)]

    def difference(hidden: Tensor) -> float:
        if hidden.shape[-1] != head.weight.shape[1]:
            return math.inf
        (scale, softcap), bias, states = logit_transform(model.config), head.bias, hidden[packed.predict_index]
        mine, _ = token_log_probs(states, head.weight, bias, packed.targets, logit_scale=scale, softcap=softcap)
        return _difference(mine, want)

    tolerance = TOLERANCE.get(head.weight.dtype, 1e-3)
    wanted = [log_softmax(logits[:-1].float()) for logits in theirs]
    targets = packed.targets.split([n - 1 for n in _LENGTHS])
    want = torch.cat([x.gather(1, ids[:, None])[:, 0] for x, ids in zip(wanted, targets, strict=True)])
    return _settle(hf, packed, difference, tolerance, "log-probs")


@torch.no_grad()
def check_backbone(hf: PreTrainedModel) -> None:
    """Do the same for a model without a vocabulary head: compare the hidden states that a value head reads."""
    packed = _random_batch(hf.get_input_embeddings().weight.shape[0], _device(hf))
    with _plain(hf):
        rows = packed.input_ids.split(_LENGTHS)
        want = torch.cat([hf.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in rows])
    unit = want.abs().max().clamp(min=1.0)
    tolerance = TOLERANCE.get(want.dtype, 1e-3)
    _settle(hf, packed, lambda hidden: _difference(hidden / unit, want / unit), tolerance, "hidden states")


def _settle(
    hf: PreTrainedModel, packed: Packed, difference: Callable[[Tensor], float], tolerance: float, what: str
) -> dict[int, tuple[int, int, int]]:
    """Leave the model packed if that works, else let it run in rows. Raises ModelError if neither does."""
    if rows_reason(hf) is None:
        context = RecordingContext(packed.lengths, _device(hf))
        try:
            found = difference(run_backbone(hf.base_model, packed.input_ids, packed.position_ids, context))
            _check_layers(hf.config.get_text_config(), context)
            if not found <= tolerance:  # also for NaN
                raise CannotPack(f"{what} of packed sequences differ by {found:.2g} from its own")
            return context.shapes
        except CannotPack as error:
            use_rows(hf, str(error))
        except TRIAL_ERRORS as error:
            use_rows(hf, f"its layers do not take packed sequences ({first_line(error)})")
    with _as_refusal(hf):
        rows = RowsContext(packed.lengths, _device(hf))
        found = difference(run_backbone(hf.base_model, packed.input_ids, packed.position_ids, rows))
    if not found <= tolerance:
        raise ModelError(_refusal(hf, _why_rows_differ(hf, packed, what, found, tolerance)))
    return {}


def _why_rows_differ(hf: PreTrainedModel, packed: Packed, what: str, found: float, tolerance: float) -> str:
    first, second = packed.input_ids.split(_LENGTHS)
    with _plain(hf):
        ids = torch.stack([torch.cat([first, second[: len(first)]]), torch.cat([first, first])])
        one, other = (hf.base_model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in ids)
    change = _difference(one[: len(first)], other[: len(first)]) / float(one.abs().max().clamp(min=1.0))
    if change > tolerance:
        return (
            "its tokens see the tokens after them, so it predicts nothing from left to right (some families need "
            f"{setting('override_config')}.is_decoder=true)"
        )
    if what == "log-probs":
        what = "its logits are not its output projection of its last hidden states: log-probs"
    return f"{what} differ from those of transformers by {found:.2g} (allowed {tolerance:.0e})"


@contextmanager
def _as_refusal(hf: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except TRIAL_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            _refusal(hf, f"its own forward pass fails on token ids alone ({first_line(error)})")
        ) from error


@contextmanager
def _plain(hf: PreTrainedModel) -> Iterator[None]:
    """transformers' own eager attention, and a refusal for what it raises."""
    with _as_refusal(hf), attention_implementation(hf, "eager"):
        yield


def _refusal(hf: PreTrainedModel, why: str) -> str:
    return refusal(hf.config.name_or_path or setting("path"), type(hf).__name__, why)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _random_batch(vocab_size: int, device: torch.device) -> Packed:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in _LENGTHS]
    return pack_sequences(ids, [[False] + [True] * (n - 1) for n in _LENGTHS]).to(device)


def _of_own(hf: PreTrainedModel, ids: Tensor) -> Tensor:
    """(n, V) logits of transformers."""
    with _plain(hf):
        logits: Tensor = hf(input_ids=ids[None], use_cache=False).logits[0]
        return logits


def _difference(mine: Tensor, theirs: Tensor) -> float:
    if mine.shape != theirs.shape:
        return math.inf
    return float((mine.float() - theirs.float()).abs().max())


def _check_layers(config: PretrainedConfig, context: RecordingContext) -> None:
    """Raises CannotPack unless attention ran in every layer, with the windows that the config names."""
    expected = getattr(config, "num_hidden_layers", None)
    if expected is not None and sorted(context.shapes) != list(range(expected)):
        raise CannotPack(f"attention runs in {len(context.shapes)} of its {expected} layers")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window_of(config) is None else "sliding_attention"] * len(context.shapes)
    if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise CannotPack(f"it has layers of the kind {strange[0]}")
    for layer, terms in context.terms.items():
        window = window_of(config) if kinds[layer] == "sliding_attention" else None
        if terms.window != window:
            raise CannotPack(
                f"layer {layer} passes the window {terms.window} to its attention, and its config says {window}"
            )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise CannotPack("its attention is cut into chunks (attention_chunk_size)")


def window_of(config: PretrainedConfig) -> int | None:
    """The sliding window that a config names; None without one, or if it is switched off."""
    window = getattr(config, "sliding_window", None)
    return int(window) if window is not None and getattr(config, "use_sliding_window", True) else None
