"""How well scores that claim to be probabilities agree with what was right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "ConfidenceMeasures",
    "Reliability",
    "calibration_error",
    "measure_confidence",
    "reliability",
]

Array = np.ndarray[Any, Any]
_BINS = 15


class Reliability(NamedTuple):
    """Scores in one of 15 bins of the same width: their mean, the share that is right, how many."""

    score: float
    right: float
    number: int


def reliability(scores: Array, right: Array) -> tuple[Reliability, ...]:
    """Return the bins that hold any scores, from the lowest to the highest.

    ``scores`` ``(n,)`` are in 0…1, ``right`` ``(n,)`` is of bool.
    """
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    return tuple(
        Reliability(float(scores[bins == b].mean()), float(right[bins == b].mean()), int(count))
        for b, count in enumerate(np.bincount(bins, minlength=_BINS))
        if count
    )


def calibration_error(bins: Sequence[Reliability]) -> float:
    """Return the expected calibration error: the mean distance of score and share that is right.

    Source: Guo et al., "On Calibration of Modern Neural Networks" (2017), equation 3.
    """
    total = sum(part.number for part in bins)
    return sum(part.number * abs(part.score - part.right) for part in bins) / max(total, 1)


class ConfidenceMeasures(NamedTuple):
    """How many captions are right, and how well their confidences say which; fractions."""

    right: float
    """The share of captions that are right."""
    calibration_error: float
    """The expected calibration error of the confidences, 15 bins."""
    coverage_50: float
    """The share of captions with a confidence of at least 0.5."""
    right_50: float
    """The share of these that are right."""
    coverage_70: float
    right_70: float


def measure_confidence(confidence: Array, right: Array) -> ConfidenceMeasures:
    """Measure confidences ``(n,)``, in 0…1, of captions; ``right`` ``(n,)`` is of bool."""
    kept = [confidence >= least for least in (0.5, 0.7)]
    shares = [x for given in kept for x in (_mean(given), _mean(right[given]))]
    error = calibration_error(reliability(confidence, right))
    return ConfidenceMeasures(_mean(right), error, *shares)


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else 0.0
