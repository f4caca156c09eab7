"""Writes token_samples.jsonl: what a few training groups of a step look like token by token, for report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steepest.core.batch import Batch, RowStatus
from steepest.loggers.rows import RowFile
from steepest.rewards.api import RewardResult
from steepest.trainer.experience.api import Experience
from steepest.trainer.experience.response_text import ResponseText

FILE = "token_samples.jsonl"
TOKENS = 4096
"""Response tokens of a step that are written at most, so that a line stays below about 200 kB."""
RESPONSES = 16
"""Responses of a group that are written at most: more do not fit side by side."""
_LONGEST_CHARACTER = 8
"""Tokens that are joined at most to find a character whose bytes several tokens share."""
_BROKEN = "\ufffd"


@dataclass
class TokenTexts:
    """The text of each token of a response. A character that several tokens share stands at the first of them, and the
    others are empty."""

    writer: ResponseText
    """One that leaves no token out."""
    known: dict[int, str] = field(default_factory=dict)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        new = [id for id in dict.fromkeys(ids) if id not in self.known]
        self.known |= zip(new, self.writer.decode([[id] for id in new]) if new else (), strict=True)
        texts, at = [self.known[id] for id in ids], 0
        while at < len(ids):
            at += self._join(ids, texts, at) if _BROKEN in texts[at] else 1
        return texts

    def _join(self, ids: Sequence[int], texts: list[str], at: int) -> int:
        """Write the characters that begin at token `at`; how many tokens they take. 1: they are no whole characters."""
        for count in range(2, min(_LONGEST_CHARACTER, len(ids) - at) + 1):
            text = self.writer.decode([ids[at : at + count]])[0]
            if _BROKEN not in text:
                texts[at : at + count] = [text, *[""] * (count - 1)]
                return count
        return 1


@dataclass
class TokenSamples:
    """An observer of the step that writes one row for each of the first `num_prompts` groups of a step that `due`
    chooses.

    A row has the prompt and, for each response, its reward and lists with one entry a token: `tokens` (texts) and those
    of `measures` that the run has. null stands for a token that has no such number, such as one of a row that is not
    trained.
    """

    rows: RowFile
    texts: TokenTexts
    num_prompts: int
    due: Callable[[int], bool]

    def __call__(self, step: int, experience: Experience) -> None:
        if self.due(step):
            for row in self.groups(experience):
                self.rows.write({"step": step, **row})

    def close(self) -> None:
        self.rows.close()

    def groups(self, experience: Experience) -> Iterator[dict[str, Any]]:
        batch, left = experience.batch, TOKENS
        groups = list(dict.fromkeys(batch.group_ids.tolist()))[: self.num_prompts]
        found = {number: (batch.group_ids == number).nonzero()[:, 0].tolist() for number in groups}
        results = results_of(experience, {batch.samples[rows[0]].uid for rows in found.values()})
        for rows in found.values():
            shown = rows[:RESPONSES]
            if left < len(shown):
                return
            group = batch.select(torch.tensor(shown))
            limit = left // len(shown)
            left -= int(group.response_lengths.clamp(max=limit).sum())
            sample = group.samples[0]
            yield {
                "id": sample.uid,
                "data_source": sample.data_source,
                "prompt": sample.messages,
                "ground_truth": sample.ground_truth,
                "num_responses": len(rows),
                "responses": self._responses(group, results, limit),
            }

    def _responses(
        self, group: Batch, results: dict[tuple[str, tuple[int, ...]], RewardResult], limit: int
    ) -> list[dict[str, Any]]:
        numbers = {name: values.tolist() for name, values in measures(group).items()}
        found = []
        for row, ids in enumerate(token_ids(group)):
            texts, kept = self.texts(ids), kept_places(len(ids), limit)
            result = results.get((group.samples[row].uid, ids))
            found.append(
                {
                    **reward_of(result),
                    "truncated": bool(group.truncated[row]),
                    "status": RowStatus(int(group.row_status[row])).name.lower(),
                    "length": len(ids),
                    **({} if len(kept) == len(ids) else {"left_out": [limit - limit // 2, len(ids) - limit]}),
                    "tokens": [texts[place] for place in kept],
                    **{name: [rounded(values[row][place]) for place in kept] for name, values in numbers.items()},
                }
            )
        return found


def token_ids(batch: Batch) -> list[tuple[int, ...]]:
    """The response of each row, without padding."""
    lengths = batch.response_lengths.tolist()
    return [tuple(row[:length]) for row, length in zip(batch.responses.tolist(), lengths, strict=True)]


def results_of(experience: Experience, uids: set[str]) -> dict[tuple[str, tuple[int, ...]], RewardResult]:
    """(prompt, response) -> what the rewards returned, for the prompts in `uids`. A collector may have chosen among
    the groups that were generated and changed their order, so rows are found by what they are."""
    found: dict[tuple[str, tuple[int, ...]], RewardResult] = {}
    for part in experience.responses:
        chosen = [row for row, sample in enumerate(part.batch.samples) if sample.uid in uids]
        if chosen:
            ids = token_ids(part.batch.select(torch.tensor(chosen)))
            found |= {
                (part.batch.samples[row].uid, response): part.results[row]
                for row, response in zip(chosen, ids, strict=True)
            }
    return found


def reward_of(result: RewardResult | None) -> dict[str, Any]:
    if result is None:
        return {"score": None, "parts": {}}
    error = {"error": result.error} if result.error else {}
    return {"score": result.score, "parts": result.named(), **error}


def measures(batch: Batch) -> dict[str, Tensor]:
    """Name -> (B, T) f32 of the numbers that tokens are coloured by; NaN where a token has none.

    ratio: probability by the trainer over that by the engine, before the update; in rows that the trainer computed. kl:
    log-prob by the policy less that by the reference.
    """
    trained, found = batch.trained_mask, dict[str, Tensor]()
    own = trained if batch.recomputed is None else trained & batch.recomputed[:, None]

    def add(name: str, values: Tensor, mask: Tensor) -> None:
        found[name] = values.float().masked_fill(~mask, torch.nan)

    if batch.advantages is not None:
        add("advantage", batch.advantages, batch.loss_mask)
    if batch.values is not None:
        add("value", batch.values, trained)
    if batch.rollout_log_probs is not None:
        add("log_prob", batch.rollout_log_probs, batch.response_mask)
        if batch.old_log_probs is not None:
            add("ratio", (batch.old_log_probs - batch.rollout_log_probs).exp(), own)
    if batch.old_log_probs is not None and batch.ref_log_probs is not None:
        add("kl", batch.old_log_probs - batch.ref_log_probs, trained)
    if batch.entropies is not None:
        add("entropy", batch.entropies, trained)
    return found


def kept_places(length: int, limit: int) -> list[int]:
    """The tokens of a response that are written: the first and the last ones where there are more than `limit`."""
    if length <= limit:
        return list(range(length))
    return [*range(limit - limit // 2), *range(length - limit // 2, length)]


def rounded(value: float) -> float | None:
    """Four digits, which a reader of colours does not miss; None for NaN."""
    return None if value != value else float(f"{value:.4g}")
