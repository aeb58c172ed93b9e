"""Whether two systems differ by more than the photographs they were compared on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["paired_bootstrap"]


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the mean of first minus second and the 95 % interval of it.

    Both are scores of the same photographs, which are drawn anew with replacement. Raises
    ``ValueError`` when they are not of one length. Source: Efron and
    Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores cannot be paired with {len(second)}")
    gaps = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(gaps), size=(draws, len(gaps)))
    low, high = np.percentile(gaps[drawn].mean(axis=1), (2.5, 97.5))
    return float(gaps.mean()), float(low), float(high)
