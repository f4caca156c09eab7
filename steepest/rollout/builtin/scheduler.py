"""Schedules generation: distinct prompts wait, the longest first; all samples of a prompt are admitted together."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from steepest.errors import RolloutError, setting

_WORTH_SHARING = 256
"""A common prefix is shared if it saves at least this number of prompt tokens."""


@dataclass(frozen=True)
class Group:
    """One distinct prompt and the result rows that sample from it. One prefill serves all of them."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]


class Scheduler:
    """Holds the waiting groups, the longest prompt first. Row r = prompt index * n + sample index."""

    def __init__(self, prompts: Sequence[Sequence[int]], n: int, num_slots: int) -> None:
        """Equal prompts share a group. A group larger than `num_slots` is cut, and its prompt is prefilled once per
        part."""
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_prompt.setdefault(tuple(prompt), []).extend(range(i * n, i * n + n))
        # Longest first: then neighbouring slots have about equal length, which makes decoding in chunks faster.
        by_prompt = dict(sorted(by_prompt.items(), key=lambda item: -len(item[0])))
        self._waiting = deque(
            Group(prompt, tuple(rows[start : start + num_slots]))
            for prompt, rows in by_prompt.items()
            for start in range(0, len(rows), num_slots)
        )
        self._num_slots = num_slots
        self._num_waiting = len(prompts) * n

    def first_prompt(self) -> tuple[int, ...]:
        """The first of the waiting prompts."""
        return self._waiting[0].prompt

    def common_prefix(self) -> int:
        """The number of first tokens that all waiting prompts share, without the last token of the shortest prompt; 0
        if sharing them would save too little."""
        prompts = {group.prompt for group in self._waiting}
        room = min(len(p) for p in prompts) - 1
        low, high = min(prompts), max(prompts)  # all others are between these two, so they share their common prefix
        length = next((i for i in range(room) if low[i] != high[i]), room)
        return length if length * (len(prompts) - 1) >= _WORTH_SHARING else 0

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def admit(self, num_active: int, max_prefill_tokens: int) -> list[Group]:
        """The groups to prefill now, in one pass; empty if decoding should continue.

        While rows are active, admission waits until an eighth of the slots is free, or enough slots for all waiting
        rows: a prefill costs about as much as a decoding step, so it should admit more than a row or two.
        """
        free = self._num_slots - num_active
        if num_active and free < min(self._num_waiting, self._num_slots / 8):
            return []
        admitted: list[Group] = []
        tokens = 0
        while self._waiting and len(self._waiting[0].rows) <= free:
            tokens += len(self._waiting[0].prompt)
            if admitted and tokens > max_prefill_tokens:
                break
            admitted.append(self._waiting.popleft())
            free -= len(admitted[-1].rows)
            self._num_waiting -= len(admitted[-1].rows)
        return admitted


def num_slots_for(capacity: int, num_rows: int, max_num_seqs: int, bytes_per_token: int, kv_memory_bytes: int) -> int:
    """How many sequences of up to `capacity` tokens may be active at once.

    Raises RolloutError when the cache budget cannot hold a single one.
    """
    fit = kv_memory_bytes // (capacity * bytes_per_token)
    if fit < 1:
        raise RolloutError(
            f"the KV cache may take {kv_memory_bytes / 2**20:.1f} MiB, but one sequence of {capacity} tokens needs "
            f"{capacity * bytes_per_token / 2**20:.1f} MiB ({bytes_per_token} bytes a token). Raise "
            f"{setting('gpu_memory_utilization')}, or lower {setting('max_response_length')}, "
            f"{setting('max_prompt_length')} or {setting('max_model_len')}."
        )
    return min(fit, num_rows, max_num_seqs)
