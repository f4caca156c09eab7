"""The attention over packed sequences: a device's own, torch's (`PackedContext`) or plain products (`ProductContext`).

The device supplies the kernel (`Device.varlen_attention`). The choice is for training and for log-probs; prefill and
decoding of the builtin rollout engine use torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from steepest.devices.api import PACKED_SDPA, VARLEN, Device, VarlenAttention, device_of
from steepest.errors import ConfigError, ModelError
from steepest.models.attention import PLAIN, AttentionContext, PackedContext, Terms
from steepest.models.flops import attention_heads, causal_pairs, number
from steepest.models.packing import Packed
from steepest.models.product_attention import ProductContext
from steepest.models.rows import RowsContext, rows_reason
from steepest.models.shared_prompts import SharedPromptContext

OWN_FORWARD = "own_forward"
"""The name of the attention of a model that runs in rows."""
PRODUCTS = "products"
"""The name of attention by plain batched products."""
OVERRIDE = "attn_implementation"
"""The entry of `override_config` that chooses the attention; the name is verl's."""
TOLERANCE = 0.05
"""Largest accepted difference from plain attention in half precision, as a share of the largest number."""
_LENGTHS = (5, 1, 70)


@dataclass(frozen=True)
class Attention:
    """The attention of a model, and the reason for it."""

    name: str = PACKED_SDPA
    why: str = "the default"
    kernel: VarlenAttention | None = None
    key: str = f"override_config.{OVERRIDE}"
    """The configuration key that chooses the attention; messages name it."""
    asked: bool = False
    """The user has asked for it."""

    def describe(self) -> str:
        """One sentence for the start summary."""
        if self.name == OWN_FORWARD:
            return f"the model's own forward pass, on padded rows ({self.why})"
        return f"{self.name}, on packed sequences ({self.why})"

    def context(self, packed: Packed) -> AttentionContext:
        """The attention context of one forward pass."""
        if self.name == OWN_FORWARD:
            return RowsContext(packed.lengths, packed.input_ids.device)
        if packed.shared is not None:
            return SharedPromptContext(packed.shared, max(packed.lengths), packed.input_ids.device)
        if self.kernel is None:
            kind = ProductContext if self.name == PRODUCTS else PackedContext
            return kind(packed.lengths, packed.input_ids.device)
        return VarlenContext(packed.lengths, packed.input_ids.device, self.kernel)


def attention_of(hf: PreTrainedModel, wanted: Attention) -> Attention:
    """The attention that a model is run with: `wanted`, or its own if it runs in rows (`models/rows.py`).

    Raises ConfigError if the user has asked for the other one.
    """
    reason = rows_reason(hf)
    if reason is None:
        return wanted
    if wanted.asked:
        raise ConfigError(
            f"{wanted.key}={wanted.name}: {type(hf).__name__} cannot run on packed sequences: {reason}. Leave the key "
            "out; then the model's own forward pass is used."
        )
    return Attention(OWN_FORWARD, reason, None, wanted.key)


def choose_attention(asked: str | None, device: Device, dtype: torch.dtype, key: str) -> Attention:
    """Choose the requested attention; without a request the device's fused one for `dtype`, else packed SDPA.

    `key` is the configuration key of the request. Raises ConfigError for a name that is unknown or not available on
    this device: a requested attention is never replaced by another.
    """
    kernel, why = device.varlen_attention(dtype)
    if asked is None:
        return Attention(PACKED_SDPA if kernel is None else VARLEN, why, kernel, key)
    where = f"{key}={asked}"
    if asked in (PACKED_SDPA, PRODUCTS):
        return Attention(asked, f"asked for by {key}", None, key, asked=True)
    if asked != VARLEN:
        raise ConfigError(
            f"{where}: no such attention over packed sequences. Known: {VARLEN}, {PACKED_SDPA}, {PRODUCTS}. Leave "
            "the key out to get the best one of the device."
        )
    if kernel is None:
        raise ConfigError(f"{where}: it cannot run here: {why}. Leave the key out, or set it to {PACKED_SDPA}.")
    return Attention(VARLEN, f"asked for by {key}", kernel, key, asked=True)


class VarlenContext:
    """Causal attention within each packed sequence, by one call of the device's fused attention per layer."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str, kernel: VarlenAttention) -> None:
        """`lengths` are those of the packed sequences, in packed order."""
        self.lengths = tuple(lengths)
        self.max_length = max(self.lengths)
        self.num_pairs = causal_pairs(self.lengths)
        self._kernel = kernel
        self._with_terms: PackedContext | None = None
        self._ends = torch.tensor([0, *self.lengths]).cumsum(0).to(device, torch.int32)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: Terms = PLAIN
    ) -> Tensor:
        """See AttentionContext. `layer` plays no part. The kernel knows no terms: layers with some take torch's."""
        if not terms.within(self.max_length).are_plain:
            if self._with_terms is None:
                self._with_terms = PackedContext(self.lengths, query.device)
            return self._with_terms.attend(layer, query, key, value, scale, terms)
        if value.shape[-1] != key.shape[-1]:
            raise ModelError(
                f"this model's values have another size ({value.shape[-1]}) than its keys ({key.shape[-1]}), which "
                f"{VARLEN} does not compute. Set override_config.{OVERRIDE}={PACKED_SDPA}."
            )
        # Autocast does not cast the inputs of the kernel, so they are cast here: norms with fp32 weights give fp32
        # queries.
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
        parts = [x.transpose(0, 1).to(dtype).contiguous() for x in (query, key, value)]
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self._kernel(*parts, ends=self._ends, lengths=self.lengths, scale=scale)


def check_varlen(attention: Attention, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Compare the fused attention with plain attention: outputs and gradients, for this model's heads.

    It is called once, when a model is moved to its device, so that a kernel of a wrong version, or on a card that it
    was not made for, does not train a model wrongly. Raises ModelError if the kernel fails or its numbers differ.
    """
    if attention.kernel is None:
        return
    remedy = f"Install the version that fits this torch and this card, or set {attention.key}={PACKED_SDPA}."
    text = config.get_text_config()
    heads, size = attention_heads(text)
    if not heads:
        return
    groups = number(text, "num_key_value_heads") or heads
    generator = torch.Generator().manual_seed(0)
    shapes = [(count, sum(_LENGTHS), size) for count in (heads, groups, groups)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    with torch.autocast(device.type, enabled=False):
        want = _outputs_and_gradients(PackedContext(_LENGTHS, device), made)
        try:
            found = _outputs_and_gradients(VarlenContext(_LENGTHS, device, attention.kernel), made)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            if device_of(device).is_out_of_memory(error):
                raise
            words = str(error).splitlines() or [type(error).__name__]
            raise ModelError(f"{attention.name} fails for {heads} heads of {size} ({words[0]}). {remedy}") from error
    difference = max(_difference(a.float(), b.float()) for a, b in zip(want, found, strict=True))
    if not difference <= TOLERANCE:  # also refuses NaN
        raise ModelError(
            f"{attention.name} differs from plain attention by {difference:.2g} (allowed {TOLERANCE}) for {heads} "
            f"heads of {size}. {remedy}"
        )


def _difference(want: Tensor, found: Tensor) -> float:
    return float((want - found).abs().max() / want.abs().max())


def _outputs_and_gradients(context: AttentionContext, made: Sequence[Tensor]) -> list[Tensor]:
    parts = [x.detach().clone().requires_grad_() for x in made]
    with torch.enable_grad():
        out = context.attend(0, parts[0], parts[1], parts[2], None)
        gradients = torch.autograd.grad(out.float().square().sum(), parts)
    return [out.detach(), *gradients]
