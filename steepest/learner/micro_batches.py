"""Micro-batches: which rows go through the model together. The result of an update does not depend on the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from steepest.errors import setting


@dataclass(frozen=True)
class MicroBatches:
    """How rows are cut into forward passes. Give `rows` or `tokens`; with both, `rows` wins."""

    rows: int | None = None
    """Sequences per pass, in the order of the batch."""
    tokens: int | None = 16384
    """Real (padding-free) tokens per pass, prompt and response together."""
    purpose: str = ""
    """Whose passes these are, such as `critic.update`: messages name the setting of that part when memory runs out."""

    @property
    def setting(self) -> str:
        """The one that counts, for messages."""
        return setting("micro_batch_tokens" if self.rows is None else "micro_batch_rows", self.purpose)

    def __post_init__(self) -> None:
        if self.rows is None and self.tokens is None:
            raise ValueError("micro-batches need a number of rows or a number of tokens")
        for name, value in (("rows", self.rows), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise ValueError(f"micro-batch {name}={value}: must be at least 1")

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """The micro-batches of sequences with these token counts, as lists of indices. See `split`."""
        return split(lengths, rows=self.rows) if self.rows is not None else split(lengths, tokens=self.tokens)

    def split_groups(self, prompts: Sequence[int], responses: Sequence[int], groups: Sequence[int]) -> list[list[int]]:
        """The same for rows whose group shares a prompt. See `split_groups`."""
        if self.tokens is None or self.rows is not None:
            return self.split([*responses])
        return split_groups(prompts, responses, groups, tokens=self.tokens)


def split(lengths: Sequence[int], *, rows: int | None = None, tokens: int | None = None) -> list[list[int]]:
    """Cut indices 0..n-1 into micro-batches. Every index occurs once; the same lengths give the same cut.

    rows:   `rows` neighbours at a time, in order; the last one may be smaller.
    tokens: bins of at most `tokens` tokens, longest first into the first bin with room (first fit decreasing,
            at most 11/9 of the fewest bins possible). A sequence longer than the budget gets a bin of its own.
            Indices are ascending in a bin, and bins are ordered by their first index.
    """
    if (rows is None) == (tokens is None):
        raise ValueError("give rows or tokens, not both and not none")
    if rows is not None:
        return [list(range(start, min(start + rows, len(lengths)))) for start in range(0, len(lengths), rows)]
    assert tokens is not None
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = next((b for b, left in enumerate(room) if lengths[index] <= left), None)
        if fits is None:
            bins.append([index])
            room.append(tokens - lengths[index])
        else:
            bins[fits].append(index)
            room[fits] -= lengths[index]
    return sorted(sorted(found) for found in bins)


def split_groups(
    prompts: Sequence[int], responses: Sequence[int], groups: Sequence[int], *, tokens: int
) -> list[list[int]]:
    """As `split` with `tokens`, for rows that share the tokens of their prompt with the rows of their group.

    A group stays together, and its prompt counts once. One over the budget is cut, and each piece has the prompt.
    """
    pieces: list[list[int]] = []
    costs: list[int] = []
    open_piece: dict[int, int] = {}
    for row, group in enumerate(groups):
        at = open_piece.get(group)
        if at is None or costs[at] + responses[row] > tokens:
            at = open_piece[group] = len(pieces)
            pieces.append([])
            costs.append(prompts[row])
        pieces[at].append(row)
        costs[at] += responses[row]
    return sorted(sorted(row for piece in found for row in pieces[piece]) for found in split(costs, tokens=tokens))
