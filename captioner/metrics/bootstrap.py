"""Whether two systems differ by more than the photographs they were compared on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["paired_bootstrap"]


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean difference of two systems' scores and its 95 % confidence interval.

    The photographs are drawn with replacement, each with both of its scores. Source: Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.

    Args:
        first: The scores of the first system, one per photograph.
        second: The scores of the second system, of the same photographs in the same order.
        draws: How many times as many photographs are drawn.
        seed: The seed of the random numbers.

    Returns:
        The mean of first minus second, and the ends of the interval.

    Raises:
        ValueError: There are not as many scores of the one as of the other.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores cannot be paired with {len(second)}")
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(axis=1), (2.5, 97.5))
    return float(gaps.mean()), float(low), float(high)
