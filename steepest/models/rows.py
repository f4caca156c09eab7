"""Sequences as rows of a model's own forward pass: for models that cannot run on packed sequences.

Rows are padded to the right. In a causal model, recurrent or not, no real token sees what comes after it, so a mask is
not needed, and positions count from 0 as the model counts them itself. Attention is the model's own, with whatever it
adds to it: ALiBi, windows, states of recurrent layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steepest.models.attention import PackedContext, set_own_attention, unpad

_MARK = "_steepest_rows"


def use_rows(hf: PreTrainedModel, reason: str) -> None:
    """Let a model run in rows, with attention of its own. `reason` ("it ...", "its ...") says why it is not packed."""
    set_own_attention(hf)
    setattr(hf, _MARK, reason)


def rows_reason(hf: nn.Module) -> str | None:
    """Why a model runs in rows; None if it runs on packed sequences. A copy of the model has the same."""
    return getattr(hf, _MARK, None)


class RowsContext(PackedContext):
    """The rows of packed sequences. Sequences of similar length share a pass."""

    def run(self, backbone: nn.Module, input_ids: Tensor) -> Tensor:
        """The last hidden states of packed tokens: (N,) -> (N, hidden)."""
        if self._uniform:
            return run_rows(backbone, input_ids.view(len(self.lengths), -1)).flatten(0, 1)
        padded, start, outs = input_ids[self._padded_index], 0, []
        for rows, width in self._buckets:
            part = padded[start : start + rows * width].view(rows, width)
            outs.append(run_rows(backbone, part).flatten(0, 1))
            start += rows * width
        return unpad(torch.cat(outs), self._padded_index, self._packed_index, self._is_pad)


def run_rows(backbone: nn.Module, input_ids: Tensor) -> Tensor:
    """The last hidden states of rows without padding, or with padding on the right: (b, L) -> (b, L, hidden)."""
    output: Any = backbone(input_ids=input_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
