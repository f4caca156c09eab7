"""Thresholds of rollout correction as they are written: `2.0`, or a band `low_high` such as `0.5_5.0`."""

from __future__ import annotations


def read_band(text: str) -> tuple[float | None, float]:
    """(low, high); low is None for a single number. Raises ValueError whose text is the reason."""
    low, between, high = text.strip().partition("_")
    try:
        numbers = [float(low), float(high)] if between else [float(low)]
    except ValueError:
        raise ValueError("must be a number, or low_high, e.g. 0.5_2.0") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise ValueError("must be above 0")
    if numbers[-1] < 1.0 or (numbers[0] > 1.0 and between):
        # `0.5_2` is a way to write the number 0.52, and it arrives as that.
        raise ValueError(
            "1, the ratio of two policies that agree, must be within (a band has a dot in both numbers, e.g. 0.5_2.0)"
        )
    return (numbers[0], numbers[1]) if between else (None, numbers[0])


def read_bound(text: str) -> float:
    """A divergence in nats. Raises ValueError whose text is the reason."""
    try:
        bound = float(text)
    except ValueError:
        raise ValueError("must be one number, a divergence in nats, e.g. 0.01") from None
    if not 0 < bound < float("inf"):
        raise ValueError("must be above 0")
    return bound


def pair_thresholds(kinds: tuple[str, ...], thresholds: tuple[str, ...]) -> list[tuple[str, float | None, float]]:
    """(kind, low, high) of each rejection; a single threshold serves all. Raises ValueError naming what is wrong.

    k1 is bounded by ratios rollout / old, of which low is None for 1 / high; k2 and k3 by a divergence.
    """
    if len(thresholds) not in (1, len(kinds)):
        raise ValueError(f"{len(thresholds)} thresholds for {len(kinds)} rejections: give one each, or one for all")
    pairs = []
    for kind, text in zip(kinds, thresholds * (len(kinds) if len(thresholds) == 1 else 1), strict=True):
        try:
            low, high = read_band(text) if kind.endswith("k1") else (None, read_bound(text))
        except ValueError as error:
            raise ValueError(f"{text} for {kind}: {error}") from None
        pairs.append((kind, low, high))
    return pairs
