"""Sequences without padding: the real tokens one after another, with the places of the tokens that are scored.

N packed tokens, M scored tokens (targets), b sequences, T columns of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.core.batch import Batch


@dataclass(frozen=True)
class SharedPrompts:
    """The places of prompts that several responses share. Each prompt is followed by its responses."""

    segments: tuple[int, ...]
    """Lengths of the segments that attend causally within themselves, in order: a shared prompt, each of its responses,
    or a prompt with its response that share nothing. They sum to N."""
    spans: tuple[tuple[int, int, int], ...]
    """(start, middle, end) of each shared prompt: the tokens of middle..end attend to all of start..middle too."""


@dataclass(frozen=True)
class Packed:
    """b sequences, one after another. There is no padding, so there is neither a pad id nor a mask."""

    input_ids: Tensor
    """(N,) int64, the sequences' tokens in row order."""
    position_ids: Tensor
    """(N,) int64, the place of each token in its sequence, from 0."""
    lengths: tuple[int, ...]
    """b sequence lengths, each at least 1; they sum to N, or to more where a prompt is shared."""
    predict_index: Tensor
    """(M,) int64 into N: the token *before* each target. Its hidden state predicts the target and gives its value."""
    targets: Tensor
    """(M,) int64, the token ids to score."""
    rows: Tensor
    """(M,) int64, the sequence of each target."""
    cols: Tensor
    """(M,) int64, the column of each target in a (b, T) result."""
    final_index: Tensor
    """(b,) int64 into N: the last token of each sequence."""
    shared: SharedPrompts | None = None
    """Set if a prompt is stored once for several sequences."""

    def to(self, device: torch.device | str) -> Packed:
        """A copy on another device."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()}
        return Packed(**moved)


def pack_batch(batch: Batch, mask: Tensor) -> Packed:
    """Pack the prompt and response of every row; the targets are the response tokens with `mask` true.

    mask is (B, T) bool: `batch.trained_mask` before the update, `batch.loss_mask` in it. `cols` counts response tokens,
    so `scatter(x, packed, batch.responses.shape)` has the shape of `mask` and is 0 where it is false.
    Raises ValueError for an empty prompt: no token would precede its first response token.
    """
    if int(batch.prompt_lengths.min()) < 1:
        row = int(batch.prompt_lengths.argmin())
        raise ValueError(f"row {row} of the batch has an empty prompt, so nothing predicts its first response token")
    real = batch.attention_mask
    starts = batch.lengths.cumsum(0) - batch.lengths
    rows, cols = mask.nonzero(as_tuple=True)
    place = starts[rows] + batch.prompt_lengths[rows] + cols
    return Packed(
        input_ids=batch.input_ids[real],
        position_ids=batch.position_ids[real],
        lengths=tuple(batch.lengths.tolist()),
        predict_index=place - 1,
        targets=batch.responses[rows, cols],
        rows=rows,
        cols=cols,
        final_index=starts + batch.lengths - 1,
    )


def pack_shared(batch: Batch, mask: Tensor) -> Packed:
    """Pack like `pack_batch`, but rows with the same `group_ids` share the tokens of their prompt.

    A prompt is followed by the responses of its rows, whose positions continue where it ends; its last token predicts
    the first token of each of them. A prompt with one row is packed as in `pack_batch`, and so is a batch of such
    prompts. Example: two responses to a prompt of 10 tokens, of 3 and 5 tokens, take 10 + 3 + 5 packed tokens instead
    of 13 + 15. Raises ValueError when rows of a group have different prompts.
    """
    groups: dict[int, list[int]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        groups.setdefault(group, []).append(row)
    if len(groups) == len(batch):
        return pack_batch(batch, mask)
    first = torch.empty(len(batch), dtype=torch.int64)
    for rows in groups.values():
        first[rows] = rows[0]
    same = (batch.prompts == batch.prompts[first]).all(1) & (batch.prompt_lengths == batch.prompt_lengths[first])
    if not bool(same.all()) or int(batch.prompt_lengths.min()) < 1:
        raise ValueError("rows of one group have different prompts, or none: their prompt cannot be shared")
    return _lay_out(batch, mask, list(groups.values()))


def _lay_out(batch: Batch, mask: Tensor, groups: list[list[int]]) -> Packed:
    prompt_lengths, lengths = batch.prompt_lengths.tolist(), batch.response_lengths.tolist()
    width = batch.prompts.shape[1]
    ids, positions, segments, spans, place = [], [], [], [], 0
    starts, lasts = [0] * len(batch), [0] * len(batch)  # places: response's first, prompt's last token
    for rows in groups:
        size, start = prompt_lengths[rows[0]], place
        ids.append(batch.prompts[rows[0], width - size :])
        positions.append(torch.arange(size))
        place += size
        for row in rows:
            ids.append(batch.responses[row, : lengths[row]])
            positions.append(torch.arange(size, size + lengths[row]))
            starts[row], lasts[row] = place, start + size - 1
            place += lengths[row]
        if len(rows) == 1:
            segments.append(place - start)
        else:
            segments.extend([size, *(n for n in (lengths[row] for row in rows) if n)])
            spans.append((start, start + size, place))
    start_of, last_of = torch.tensor(starts), torch.tensor(lasts)
    rows_of, cols = mask.nonzero(as_tuple=True)
    before = torch.where(cols == 0, last_of[rows_of], start_of[rows_of] + cols - 1)
    final = torch.where(batch.response_lengths == 0, last_of, start_of + batch.response_lengths - 1)
    return Packed(
        input_ids=torch.cat(ids),
        position_ids=torch.cat(positions),
        lengths=tuple(batch.lengths.tolist()),
        predict_index=before,
        targets=batch.responses[rows_of, cols],
        rows=rows_of,
        cols=cols,
        final_index=final,
        shared=SharedPrompts(tuple(segments), tuple(spans)),
    )


def pack_sequences(token_ids: Sequence[Sequence[int]], loss_mask: Sequence[Sequence[bool]]) -> Packed:
    """Pack whole sequences (supervised training); the targets are the tokens whose `loss_mask` is true.

    `cols` counts the sequence's own tokens from 0. Raises ValueError for an empty sequence, for a mask of another
    length, and for a mask that is true on a first token, which nothing predicts.
    """
    for i, (ids, mask) in enumerate(zip(token_ids, loss_mask, strict=True)):
        if not ids or len(ids) != len(mask):
            raise ValueError(f"sequence {i}: {len(ids)} tokens with a loss mask of {len(mask)}; need equal, at least 1")
        if mask[0]:
            raise ValueError(f"sequence {i}: the loss mask is true on the first token, which nothing predicts")
    lengths = torch.tensor([len(ids) for ids in token_ids])
    starts = lengths.cumsum(0) - lengths
    flat = torch.tensor([t for ids in token_ids for t in ids])
    sequence = torch.arange(len(token_ids)).repeat_interleave(lengths)
    position = torch.arange(len(flat)) - starts[sequence]
    place = torch.tensor([bool(m) for mask in loss_mask for m in mask]).nonzero()[:, 0]
    return Packed(
        input_ids=flat,
        position_ids=position,
        lengths=tuple(lengths.tolist()),
        predict_index=place - 1,
        targets=flat[place],
        rows=sequence[place],
        cols=position[place],
        final_index=starts + lengths - 1,
    )


def pack_nothing() -> Packed:
    """One token without a target: what a rank that has no rows sends through a model that is sharded over ranks.

    Log-probs and values of its targets are empty, and gradients through it are 0.
    """
    none = torch.zeros(0, dtype=torch.int64)
    one = torch.zeros(1, dtype=torch.int64)
    return Packed(
        input_ids=one,
        position_ids=one,
        lengths=(1,),
        predict_index=none,
        targets=none,
        rows=none,
        cols=none,
        final_index=one,
    )


def scatter(values: Tensor, packed: Packed, shape: tuple[int, int]) -> Tensor:
    """Put one number per target into its place of a (b, T) tensor; other places are 0. Differentiable.

    values is (M,); T of `shape` must be beyond the largest column.
    """
    return values.new_zeros(shape).index_put((packed.rows, packed.cols), values)
