"""Statistics of a finished batch, under verl's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steepest.core.batch import Batch, RowStatus
from steepest.devices.api import Device
from steepest.learner.metrics import Metrics


def three(name: str, values: Tensor) -> Metrics:
    """mean, max and min of a tensor of any shape; nothing when it is empty."""
    if values.numel() == 0:
        return {}
    values = values.float()
    return {
        f"{name}/mean": values.mean().item(),
        f"{name}/max": values.max().item(),
        f"{name}/min": values.min().item(),
    }


def batch_metrics(batch: Batch) -> Metrics:
    """`critic/{score,rewards}` per sequence, `critic/{advantages,returns,values}` per token of loss_mask, and lengths.

    Rows without a token of loss_mask (a reward that failed) count in no statistic but the lengths and `rows/*`.
    `response_length/clip_ratio` is the share of responses that hit the length limit. `rows/trained`,
    `rows/reward_failed`, `rows/truncated`, `rows/equal_group` and `rows/rejected` count rows by `row_status`; they sum
    to B.
    """
    mask = batch.loss_mask
    scored = mask.any(dim=1)
    metrics: Metrics = {}
    for name, field in (("score", batch.token_level_scores), ("rewards", batch.token_level_rewards)):
        if field is not None:
            metrics |= three(f"critic/{name}", field.sum(dim=1)[scored])
    for name in ("advantages", "returns", "values"):
        field = getattr(batch, name)
        if field is not None:
            metrics |= three(f"critic/{name}", field[mask])
    if (baselines := batch.extras.get("reward_baselines")) is not None:
        failed = baselines.isnan()
        metrics |= three("remax/baseline_reward", baselines[~failed])
        metrics["remax/baseline_reward/error_rate"] = failed.float().mean().item()
    metrics |= three("response_length", batch.response_lengths)
    metrics["response_length/clip_ratio"] = batch.truncated.float().mean().item()
    metrics |= three("prompt_length", batch.prompt_lengths)
    if len(batch) > int(batch.group_ids.max()) + 1:
        metrics["group/equal_ratio"] = equal_groups(batch)
    metrics |= score_with_length(batch)
    return metrics | {f"rows/{s.name.lower()}": float((batch.row_status == s).sum()) for s in RowStatus}


def equal_groups(batch: Batch) -> float:
    """Share of prompts whose responses all have one score: they teach a group-relative estimator nothing.

    Compared are the rows with a token of loss_mask.
    """
    assert batch.token_level_scores is not None
    scored = batch.loss_mask.any(dim=1)
    scores, groups = batch.token_level_scores.sum(dim=1)[scored], batch.group_ids[scored]
    if groups.numel() == 0:
        return 0.0
    num_groups = int(groups.max()) + 1
    high = torch.full((num_groups,), -torch.inf).scatter_reduce_(0, groups, scores, "amax")
    low = torch.full((num_groups,), torch.inf).scatter_reduce_(0, groups, scores, "amin")
    present = high >= low
    return (high == low)[present].float().mean().item()


def score_with_length(batch: Batch) -> Metrics:
    """`response_length/score_corr`: Pearson's correlation of score and length over the rows with a token of loss_mask.

    Both are taken relative to the means of the row's prompt, where prompts have several responses, since long answers
    may belong to easy prompts. Nothing where one of them does not vary.
    """
    assert batch.token_level_scores is not None
    rows = batch.loss_mask.any(dim=1)
    both = torch.stack([batch.token_level_scores.sum(dim=1), batch.response_lengths.float()])[:, rows].double()
    groups = batch.group_ids[rows]
    if groups.numel() == 0:
        return {}
    num_groups = int(groups.max()) + 1
    if len(batch) > int(batch.group_ids.max()) + 1:
        counts = torch.bincount(groups, minlength=num_groups).clamp(min=1)
        means = torch.zeros(2, num_groups, dtype=torch.float64).index_add_(1, groups, both) / counts
        both = both - means[:, groups]
    if bool((both.std(dim=1, correction=0) < 1e-9).any()):
        return {}
    return {"response_length/score_corr": torch.corrcoef(both)[0, 1].item()}


def speed_metrics(metrics: Metrics) -> Metrics:
    """Tokens a second, from a step's numbers of tokens and its timings.

    `perf/throughput` and `/update` count prompts and responses, over the step and over its updates; `/gen` counts
    responses, over generation.
    """
    num_tokens, seconds = metrics["perf/total_num_tokens"], metrics["timing_s/step"]
    update = metrics["timing_s/update_critic"] + metrics["timing_s/update_actor"]
    return {
        "perf/time_per_step": seconds,
        "perf/throughput": num_tokens / seconds if seconds > 0 else 0.0,
        "perf/throughput/gen": metrics["perf/total_num_response_tokens"] / metrics["timing_s/gen"],
        "perf/throughput/update": num_tokens / update,
    }


_MFU = {
    "perf/mfu": ("step",),
    "perf/mfu/actor": ("update_actor",),
    "perf/mfu/critic": ("values", "update_critic"),
    "perf/mfu/actor_infer": ("old_log_prob",),
}
"""verl's name of a share of the machine's limit -> the parts of a step that it speaks of. The critic's are two, since
one pass may serve both."""


def mfu_metrics(seconds: Mapping[str, float], done: Mapping[str, float], *, limit: float) -> Metrics:
    """Operations a second of the models' passes as a share of `limit`, for the step and for the parts that ran."""
    found: Metrics = {}
    for name, parts in _MFU.items():
        time, work = (sum(of.get(part, 0.0) for part in parts) for of in (seconds, done))
        if time and work:
            found[name] = work / (time * limit)
    return found


def memory_metrics(device: Device) -> Metrics:
    """Peak memory since the process started, as verl has it: never set back, so the last step's number is the run's.

    `perf/max_memory_gb` is what a card has held in tensors, or the resident size of the process on the CPU. Cards have
    verl's two names too: held, and taken from the card by torch's allocator.
    """
    memory = device.memory()
    metrics: Metrics = {"perf/max_memory_gb": memory.peak / 2**30}
    if memory.peak_reserved is not None:
        metrics["perf/max_memory_allocated_gb"] = memory.peak / 2**30
        metrics["perf/max_memory_reserved_gb"] = memory.peak_reserved / 2**30
    return metrics
