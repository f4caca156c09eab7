"""The policy: a Hugging Face causal language model run on packed sequences."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from steepest.core.exact_kl import exact_kl
from steepest.core.log_probs import token_log_probs
from steepest.errors import ModelError, setting
from steepest.models.attention import IMPLEMENTATION, AttentionContext, attention_implementation
from steepest.models.flops import backbone_flops, head_flops
from steepest.models.fused.patch import fuse
from steepest.models.hf_logging import quiet_transformers
from steepest.models.packing import Packed
from steepest.models.passes import (
    Distributions,
    DistributionsFound,
    ExactKL,
    HiddenStates,
    LogProbs,
    Scores,
    StatesFound,
)
from steepest.models.rows import RowsContext, rows_reason, run_rows, use_rows
from steepest.models.varlen import Attention, attention_of
from steepest.models.working_weights import casts, half, in_dtype


class CausalLM(nn.Module):
    """A causal LM whose log-probs are computed only where they are needed.

    `hf` is the transformers model with Steepest's packed attention. Its weights are fp32 masters; the trainer's
    autocast decides what is computed in bf16 (by copies, see `models.working_weights`). Dropout is off, also in
    training mode.
    """

    has_adapter = False
    """True if `hf` has LoRA layers (see `LoraCausalLM`): then the weights are the matrices and the adapter."""

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        prepare(hf)
        self.attention = Attention()
        """The attention of `log_probs`; the trainer sets the one of the device. See `attention_of`."""

    @property
    def config(self) -> PretrainedConfig:
        return self.hf.config

    @property
    def vocab_size(self) -> int:
        """Number of rows of the output projection; it may exceed the tokenizer's vocabulary."""
        return self.hf.get_output_embeddings().weight.shape[0]

    def forward(self, request: LogProbs | ExactKL | Distributions | HiddenStates) -> Any:
        """The one entry of passes over packed sequences: `Scores`, `DistributionsFound` or `StatesFound`, as the
        request says (see models/passes.py)."""
        packed = request.packed
        context = attention_of(self.hf, self.attention).context(packed)
        hidden = self.hidden_states(packed.input_ids, packed.position_ids, context)
        flops = backbone_flops(self.hf.base_model, len(packed.input_ids), context, backward=hidden.requires_grad)
        before = hidden.index_select(0, packed.predict_index)
        if isinstance(request, LogProbs):
            return self._log_probs(request, before, flops)
        if isinstance(request, ExactKL):
            return self._exact_kl(request, before, flops)
        if isinstance(request, Distributions):
            head = self.hf.get_output_embeddings()
            weight = half(head.weight) if casts(before) else head.weight
            return DistributionsFound(before, weight.detach(), head.bias, flops)
        log_probs = None
        if request.with_log_probs:
            log_probs, _, of_head = self._score(before, packed, request.temperature)
            flops += of_head
        return StatesFound(before, hidden.index_select(0, packed.final_index), log_probs, flops)

    def log_probs(
        self, packed: Packed, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(log-probs, entropies) of the targets: a pass by `LogProbs`, without its other numbers."""
        found = self(LogProbs(packed, temperature, with_entropy))
        return found.log_probs, found.entropies

    def _log_probs(self, request: LogProbs, states: Tensor, flops: float) -> Scores:
        found, entropies, more = self._score(states, request.packed, request.temperature, request.with_entropy)
        if not request.with_squares:
            return Scores(found, entropies, None, None, flops + more)
        sharper, _, again = self._score(states, request.packed, request.temperature / 2)
        return Scores(found, entropies, (2 * found - sharper).exp(), None, flops + more + again)

    def _exact_kl(self, request: ExactKL, states: Tensor, flops: float) -> Scores:
        found, entropies, more = self._score(states, request.packed, request.temperature, request.with_entropy)
        head, reference = self.hf.get_output_embeddings(), request.reference
        more += head_flops(head.weight, states) + head_flops(reference.weight, reference.states)
        scale, softcap = logit_transform(self.config)
        kl = exact_kl(
            (states, head.weight, head.bias),
            (reference.states, reference.weight, reference.bias),
            temperature=request.temperature,
            logit_scale=scale,
            softcap=softcap,
            half=half,
        )
        return Scores(found, entropies, None, kl, flops + more)

    def _score(
        self, states: Tensor, packed: Packed, temperature: float, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None, float]:
        """(log-probs, entropies, operations) of the targets from the (M, hidden) states at `predict_index`."""
        head = self.hf.get_output_embeddings()
        scale, softcap = logit_transform(self.config)
        found, entropies = token_log_probs(
            states,
            head.weight,
            head.bias,
            packed.targets,
            temperature=temperature,
            with_entropy=with_entropy,
            logit_scale=scale,
            softcap=softcap,
            half=half,
        )
        return found, entropies, head_flops(head.weight, states)

    # -- for engines, which own the weights that they compute with -----------------------------------------------

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
        """Last hidden states, final norm included: (N,) ids and positions -> (N, hidden)."""
        return run_backbone(self.hf.base_model, input_ids, position_ids, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) -> (n, V) f32 logits, with the config's scale and soft cap. Meant for the few rows of
        decoding."""
        scale, softcap = logit_transform(self.config)
        logits = self.hf.get_output_embeddings()(hidden).float()
        if scale != 1.0:
            logits = logits * scale
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    def check_length(self, length: int) -> None:
        """Raises ModelError when the model cannot take sequences of `length` tokens as one causal context."""
        check_length(self.config, length)

    def save(self, folder: Path | str, tokenizer: Any) -> None:
        """Write a Hugging Face folder: safetensors in memory's dtype, config, generation config, tokenizer."""
        save_folder(self.hf, folder, tokenizer)

    def saved_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What `save` writes, and what an optimizer may train, by name."""
        return self.named_parameters()

    def named_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every weight once under its Hugging Face name, as the policy computes with it now; a head that is tied to the
        embedding is left out. These are the live tensors; a model with an adapter returns merged copies. For callers
        that store or send weights. `dtype`: the one that the caller casts to; it gets the copies that the model keeps
        in it (see models/working_weights.py)."""
        seen: set[int] = set()
        for name, tensor in self.hf.state_dict(keep_vars=True).items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield name, in_dtype(tensor, dtype)

    @torch.no_grad()
    def write_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Copy the weights that another model's `named_weights` returns into this model, in this model's dtypes."""
        own = self.hf.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)

    def computes_as(self, other: CausalLM, *, in_bf16: bool = False) -> bool:
        """True if another model of the same class has equal weights, also if they are stored in another dtype.
        `in_bf16`: both do their products in bf16, where a matrix is equal to one that the other has rounded."""
        pairs = zip(self.hf.parameters(), other.hf.parameters(), strict=True)
        if in_bf16:
            return all(torch.equal(in_dtype(mine, theirs.dtype).to(theirs.dtype), theirs) for mine, theirs in pairs)
        return all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in pairs)

    def copy_as(self, dtype: torch.dtype) -> CausalLM:
        """A frozen copy with weights in `dtype`. Tied weights stay tied; buffers (rotary tables) keep their dtype."""
        # deepcopy takes what it finds in this memo: each weight is converted once, also if it is used twice.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False) for p in self.hf.parameters()
        }
        return CausalLM(copy.deepcopy(self.hf, memo))


def run_backbone(backbone: nn.Module, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """One pass through a transformers base model: (N,), (N,) -> (N, hidden). Packed, or in rows with a RowsContext."""
    if isinstance(context, RowsContext):
        return context.run(backbone, input_ids)
    output = backbone(
        input_ids=input_ids[None],
        position_ids=position_ids[None],
        attention_mask=None,
        use_cache=False,
        attention_context=context,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def prepare(hf: PreTrainedModel) -> None:
    """Switch a transformers model to packed attention, and to fused layers where these compute the same.

    A model that does not use transformers' attention interface is marked to run in rows. That one which does can run
    packed is found by the self-check (`models/self_check.py`), on its weights.
    """
    if hf.base_model is hf and len(inner := [n for n, part in hf.named_children() if _is_backbone(part, hf)]) == 1:
        # The text model of a larger one (Llama 4) has the prefix of the larger one and calls its backbone otherwise.
        hf.base_model_prefix = inner[0]
    if rows_reason(hf) is not None:
        return
    try:
        hf.set_attn_implementation(IMPLEMENTATION)
        taken = hf.config._attn_implementation == IMPLEMENTATION
    except ValueError:
        taken = False
    if taken:
        fuse(hf)
    else:
        use_rows(hf, "it does not use transformers' attention interface")


def _is_backbone(part: nn.Module, hf: PreTrainedModel) -> bool:
    return isinstance(part, PreTrainedModel) and part.config is hf.config


@torch.no_grad()
def hidden_width(hf: PreTrainedModel) -> int:
    """The number of last hidden states of a token, by a trial: families name it differently, and in some a projection
    follows the last layer."""
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(hf.parameters()).device)
    with attention_implementation(hf, "eager"):
        return run_rows(hf.base_model, one).shape[-1]


def save_folder(hf: PreTrainedModel, folder: Path | str, tokenizer: Any) -> None:
    """save_pretrained of model and tokenizer. A generation config that transformers refuses to write is corrected."""
    generation = getattr(hf, "generation_config", None)
    if generation is not None and not generation.do_sample:
        # Sampling settings without do_sample are an error to transformers, although many released models have them.
        corrected = copy.deepcopy(generation)
        corrected.temperature = corrected.top_p = corrected.top_k = None
        hf.generation_config = corrected
    try:
        with quiet_transformers():
            hf.save_pretrained(folder)
    finally:
        if generation is not None:
            hf.generation_config = generation
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


_PATH = setting("path")
_SHORTER = f"Lower {setting('max_length')}"


def check_length(config: PretrainedConfig, length: int) -> None:
    """Raise ModelError if sequences of `length` tokens need more positions than the model has."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ModelError(
            f"{_PATH}: a sequence may reach {length} tokens, but the model has positions for {limit} only "
            f"(max_position_embeddings). {_SHORTER}."
        )
    for rope in _rope_tables(text):
        original = rope.get("original_max_position_embeddings") or math.inf
        if rope.get("rope_type") in ("dynamic", "longrope") and length > original:
            raise ModelError(
                f"{_PATH}: a sequence may reach {length} tokens, but beyond {original} this model's position code "
                f"({rope['rope_type']}) changes with the longest sequence of a batch, so log-probs would depend on the "
                f"batch. {_SHORTER}."
            )


def longest_length(config: PretrainedConfig, wanted: int) -> int:
    """The longest sequence up to `wanted` tokens that `check_length` lets pass, at least 0."""
    fits, too_long = 0, wanted + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        try:
            check_length(config, middle)
            fits = middle
        except ModelError:
            too_long = middle
    return fits


def _rope_tables(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    tables = nested or [rope]
    limit = getattr(config, "original_max_position_embeddings", None)
    limit = limit or getattr(config, "max_position_embeddings", None)
    return [{"original_max_position_embeddings": limit, **t} for t in tables]


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """(factor, soft cap) that the family applies to its logits: Cohere multiplies, Granite divides, Gemma 2 caps."""
    text = config.get_text_config()
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)
    return scale, None if softcap is None else float(softcap)
