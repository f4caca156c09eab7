"""Chooses the engine's network by layout, device and dtype, and compares it with the model before it is used."""

from __future__ import annotations

import torch
from torch import Tensor

from steepest.core.log_probs import log_softmax
from steepest.models.architectures import TRIAL_ERRORS
from steepest.models.attention import PackedContext
from steepest.models.causal_lm import CausalLM
from steepest.models.rows import rows_reason
from steepest.rollout.builtin.kv_cache import DecodeContext, KVCache, PrefillContext
from steepest.rollout.builtin.layout import Layout, UnknownLayout, read_layout
from steepest.rollout.builtin.linear import can_pack
from steepest.rollout.builtin.network import FusedNetwork, ModelNetwork, Network
from steepest.rollout.builtin.own_forward import OwnForward

TOLERANCE = 1e-4
"""Largest accepted difference of log-probs for fp32 weights; for other dtypes it is 0.1, the size of their rounding."""
PACKED_SHARE = 1 / 8
"""Largest share of the machine's memory for packed weights. Larger ones are not made if the policy's own can be
used."""
_LENGTHS = (5, 7)


def choose_network(
    model: CausalLM, dtype: torch.dtype, max_length: int, total_memory: int, packed_share: float = PACKED_SHARE
) -> tuple[Network, tuple[str, ...]]:
    """The network, and notes for the user about the choice. `packed_share`: see PACKED_SHARE."""
    if (reason := rows_reason(model.hf)) is not None:
        return _own_forward(model, dtype, reason)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(next(model.parameters()).device.type, enabled=False):
            return _choose(model, dtype, max_length, total_memory, packed_share)
    finally:
        model.train(training)


def _choose(
    model: CausalLM, dtype: torch.dtype, max_length: int, total_memory: int, packed_share: float
) -> tuple[Network, tuple[str, ...]]:
    try:
        layout = read_layout(model, max(max_length, sum(_LENGTHS)))
        held = layout.embedding.weight.dtype
        check(FusedNetwork(model, layout, held, copies=False, packed=False), model, held)
        network, notes = _fused(model, layout, dtype, total_memory, packed_share)
        if dtype == held:
            check(network, model, dtype)
        return network, notes
    except UnknownLayout as error:
        held = model.hf.get_input_embeddings().weight.dtype
        try:
            check(ModelNetwork(model, held), model, held)
        except (UnknownLayout, *TRIAL_ERRORS) as wrong:
            return _own_forward(model, dtype, f"on the engine's cache {wrong}")
        note = (
            f"rollout: {type(model.hf).__name__} runs on its own forward pass, which is slower than the engine's "
            f"decoder: {error}."
        )
        return ModelNetwork(model, dtype), (note,)


def _own_forward(model: CausalLM, dtype: torch.dtype, reason: str) -> tuple[Network, tuple[str, ...]]:
    network = OwnForward(model, dtype)
    cache = "and its own cache" if network.with_cache else "and without a cache, which is very slow"
    note = (
        f"rollout: {type(model.hf).__name__} generates with its own forward pass {cache}, prompts of equal length "
        f"together, which is slower than the engine's decoder: {reason}."
    )
    return network, (note,)


def _fused(
    model: CausalLM, layout: Layout, dtype: torch.dtype, total_memory: int, packed_share: float
) -> tuple[FusedNetwork, tuple[str, ...]]:
    """Make our decoder. It copies weights if the dtype requires it, or if packed copies are faster and fit into
    memory."""
    shared = all(part.base.weight.dtype == dtype for part in layout.matrices())
    packed = can_pack(layout.embedding.weight.device, dtype)
    size = sum(part.base.weight.numel() for part in layout.matrices()) * dtype.itemsize
    if shared and packed and size > total_memory * packed_share:
        note = (
            f"rollout: generates with the policy's own weights: a packed copy is faster with few sequences, but would "
            f"take {size / 2**30:.1f} GiB, more than {packed_share:.0%} of this machine's memory."
        )
        return FusedNetwork(model, layout, dtype, copies=False, packed=False), (note,)
    return FusedNetwork(model, layout, dtype, copies=packed or not shared, packed=packed), ()


def check(network: Network, model: CausalLM, dtype: torch.dtype) -> None:
    """Compare the network's log-probs with the model's, after two prompts and after one more token of each.

    Raises UnknownLayout when they differ by more than rounding.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (sum(_LENGTHS),), generator=generator).to(device)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS]).to(device)
    want = model.logits(model.hidden_states(ids, positions, PackedContext(_LENGTHS, device)))
    last = torch.tensor(_LENGTHS, device=device).cumsum(0) - 1
    found = _in_two_steps(network, ids, positions, last, dtype)
    difference = max(_difference(want[last - 1], found[0]), _difference(want[last], found[1]))
    tolerance = TOLERANCE if dtype == torch.float32 else 0.1
    if not difference <= tolerance:  # also refuses NaN
        raise UnknownLayout(f"its log-probs differ from the decoder's by {difference:.2g} (allowed {tolerance:.0e})")


def _difference(want: Tensor, found: Tensor) -> float:
    if want.shape != found.shape:
        return float("inf")
    return float((log_softmax(want) - log_softmax(found)).abs().max())


def _in_two_steps(
    network: Network, ids: Tensor, positions: Tensor, last: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(logits of a prefill over all but the last token of each prompt, logits of a decoding step with the last
    token)."""
    device = ids.device
    cache = KVCache(network.shapes(), dtype, device)
    cache.lay_out(len(_LENGTHS), max(_LENGTHS))
    cache.reserve(max(_LENGTHS), 0)
    slots = torch.arange(len(_LENGTHS), device=device)
    early = torch.ones(len(ids), dtype=torch.bool, device=device)
    early[last] = False
    lengths = [n - 1 for n in _LENGTHS]
    of_token = slots.repeat_interleave(torch.tensor(lengths, device=device))
    prefill = PrefillContext(cache, lengths, of_token, positions[early])
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    first = network.logits(network.hidden_states(ids[early], positions[early], prefill, ends))
    chunks = [(i, i + 1, length) for i, length in enumerate(_LENGTHS)]
    decode = DecodeContext(cache, positions[last], slots, chunks)
    return first, network.logits(network.hidden_states(ids[last], positions[last], decode, None))
