"""What an evaluation says of a model, and of two models on the same prompts: estimates with intervals, and a test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054
"""Quantile of the normal distribution for an interval of 95 %."""
FLIPS = 10_000
"""Random sign changes of the paired test, where it is not exact."""


@dataclass(frozen=True)
class Answered:
    """The responses to one prompt."""

    accuracies: tuple[float, ...]
    """Of each response, from 0 to 1; 1 is right."""
    votes: tuple[str, ...]
    """The answer that each response states, for the majority."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with the interval that covers its true value in 95 of 100 such samples of prompts."""

    value: float
    low: float
    high: float


def mean_at(groups: Sequence[Answered]) -> Estimate:
    """mean@n: the mean accuracy of a response.

    Responses to one prompt are not independent, so the interval is over the prompts' means. Where each of these is 0
    or 1, it is Wilson's, which is right for few prompts and near 0 and 1; else mean +- 1.96 standard errors, cut to
    [0, 1].
    """
    return _estimate(np.array([np.mean(group.accuracies) for group in groups]))


def pass_at(groups: Sequence[Answered], k: int) -> Estimate:
    """pass@k: the probability that one of k responses is right, without bias from n >= k responses of which c are
    right (Chen et al. 2021, arXiv 2107.03374):

        1 - C(n - c, k) / C(n, k)
    """
    return _estimate(np.array([_pass(len(g.accuracies), sum(a >= 1 for a in g.accuracies), k) for g in groups]))


def majority_at(groups: Sequence[Answered]) -> Estimate:
    """maj@n: the mean accuracy of the answer that most responses state; of equally many, the one stated first."""
    return _estimate(np.array([_majority(group) for group in groups]))


@dataclass(frozen=True)
class Paired:
    """Two models on the same prompts: how much better the second is, and how surprising that would be by chance."""

    difference: Estimate
    p_value: float
    better: int
    """Prompts on which the second is better."""
    worse: int
    test: str


def compare(first: Sequence[Answered], second: Sequence[Answered]) -> Paired:
    """The mean difference of the prompts' accuracies, second less first.

    Where all accuracies are 0 or 1, p is McNemar's, exact: of the prompts on which the two differ, half should favour
    each. Else it is the share of FLIPS random changes of the differences' signs (seeded) that give as large a mean.
    """
    gains = np.array([np.mean(b.accuracies) - np.mean(a.accuracies) for a, b in zip(first, second, strict=True)])
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    error = Z * _standard_error(gains)
    mean = float(gains.mean())
    found = Estimate(mean, max(-1.0, mean - error), min(1.0, mean + error))
    if set(np.abs(gains).tolist()) <= {0.0, 1.0}:
        return Paired(found, _mcnemar(better, worse), better, worse, "McNemar, exact")
    signs = np.random.default_rng(0).integers(0, 2, (FLIPS, len(gains))) * 2 - 1
    at_least = np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12
    return Paired(found, float((1 + at_least.sum()) / (1 + FLIPS)), better, worse, f"sign flips, {FLIPS:,} draws")


def summary(groups: Sequence[Answered]) -> Mapping[str, Estimate]:
    """Every estimate that n responses a prompt allow, by name: mean@n, pass@k for k = 2, 4, ... and n, maj@n."""
    n = min(len(group.accuracies) for group in groups)
    found = {f"mean@{n}": mean_at(groups)}
    if n > 1:
        ks = sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n})
        found |= {f"pass@{k}": pass_at(groups, k) for k in ks}
        found[f"maj@{n}"] = majority_at(groups)
    return found


def _estimate(means: np.ndarray) -> Estimate:
    value, count = float(means.mean()), len(means)
    if set(means.tolist()) <= {0.0, 1.0}:
        centre, spread = value + Z**2 / (2 * count), Z * math.sqrt(value * (1 - value) / count + (Z / (2 * count)) ** 2)
        low, high = ((centre + sign * spread) / (1 + Z**2 / count) for sign in (-1, 1))
        return Estimate(value, max(0.0, low), min(1.0, high))
    error = Z * _standard_error(means)
    return Estimate(value, max(0.0, value - error), min(1.0, value + error))


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def _pass(n: int, right: int, k: int) -> float:
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _majority(group: Answered) -> float:
    winner = Counter(group.votes).most_common(1)[0][0]  # of equal counts the first that occurred
    return group.accuracies[group.votes.index(winner)]


def _mcnemar(better: int, worse: int) -> float:
    """Two-sided binomial test of better among better + worse, at 1/2."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1)) / 2**total
    return min(1.0, 2 * tail)
