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
    """The accuracy of each response, from 0 to 1; 1 is right."""
    votes: tuple[str, ...] = ()
    """The answer that each response states; only the majority reads it."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with the interval that covers its true value in 95 of 100 such samples of prompts."""

    value: float
    low: float
    high: float


def mean_at(groups: Sequence[Answered]) -> Estimate:
    """mean@n: the mean accuracy of a response."""
    values = np.array([np.mean(group.accuracies) for group in groups])
    return _estimate(values, sum(len(group.accuracies) for group in groups))


def pass_at(groups: Sequence[Answered], k: int) -> Estimate:
    """pass@k: the probability that one of k responses is right, without bias from n >= k responses of which c are
    right (Chen et al. 2021, arXiv 2107.03374):

        1 - C(n - c, k) / C(n, k)
    """
    counts = [(len(group.accuracies), sum(one >= 1 for one in group.accuracies)) for group in groups]
    return _estimate(np.array([_pass(n, right, k) for n, right in counts]), len(groups))


def majority_at(groups: Sequence[Answered]) -> Estimate:
    """maj@n: the mean accuracy of the answer that most responses state; of equally many, the one stated first."""
    return _estimate(np.array([_majority(group) for group in groups]), len(groups))


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
    mean, half = float(gains.mean()), Z * float(gains.std()) / math.sqrt(len(gains))
    found = Estimate(mean, mean - half, mean + half)
    if set(np.abs(gains).tolist()) <= {0.0, 1.0}:
        return Paired(found, _mcnemar(better, worse), better, worse, "McNemar, exact")
    return Paired(found, _sign_flips(gains), better, worse, f"sign flips, {FLIPS:,} draws")


def summary(groups: Sequence[Answered]) -> Mapping[str, Estimate]:
    """Every estimate that n responses a prompt allow, by name: mean@n, pass@k for k = 2, 4, ... and n, maj@n."""
    n = min(len(group.accuracies) for group in groups)
    found = {f"mean@{n}": mean_at(groups)}
    if n > 1:
        ks = sorted({2**i for i in range(1, n.bit_length()) if 2**i <= n} | {n})
        found |= {f"pass@{k}": pass_at(groups, k) for k in ks}
        found[f"maj@{n}"] = majority_at(groups)
    return found


def _estimate(values: np.ndarray, most: int) -> Estimate:
    """The mean of the prompts' values, with the interval over prompts like these.

    A prompt is one observation, since answers to one prompt resemble each other. Values from 0 to 1 have Wilson's
    interval, which holds for few prompts and near 0 and 1 too, with as many observations as the variance between
    prompts stands for, at most `most`; for one answer a prompt, right or wrong, that is the number of prompts. Other
    values have the normal one.
    """
    count, mean, variance = len(values), float(values.mean()), float(values.var())
    if values.min() < 0.0 or values.max() > 1.0:
        half = Z * math.sqrt(variance / count)
        return Estimate(mean, mean - half, mean + half)
    observations = min(count * mean * (1 - mean) / variance, most) if variance > 0 else most
    share = Z**2 / observations
    middle, half = mean + share / 2, math.sqrt(share * mean * (1 - mean) + share**2 / 4)
    return Estimate(mean, max(0.0, (middle - half) / (1 + share)), min(1.0, (middle + half) / (1 + share)))


def _pass(n: int, right: int, k: int) -> float:
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _majority(group: Answered) -> float:
    winner = Counter(group.votes).most_common(1)[0][0]  # of equal counts the first that occurred
    return group.accuracies[group.votes.index(winner)]


def _sign_flips(gains: np.ndarray) -> float:
    """The share of random changes of sign by which the sum is as far from 0; a hundred at a time, to save memory."""
    random, at_least = np.random.default_rng(0), 0
    for _ in range(FLIPS // 100):
        signs = random.integers(0, 2, (100, len(gains))) * 2 - 1
        at_least += int((np.abs(signs @ gains) >= abs(gains.sum()) - 1e-12).sum())
    return (1 + at_least) / (1 + FLIPS)


def _mcnemar(better: int, worse: int) -> float:
    """Two-sided binomial test of better among better + worse, at 1/2."""
    total = better + worse
    tail = sum(math.comb(total, i) for i in range(min(better, worse) + 1)) / 2**total
    return min(1.0, 2 * tail)
