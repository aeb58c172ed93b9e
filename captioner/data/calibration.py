"""From what a model says of tags to probabilities, and from these to which tags are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Calibration",
    "Confidence",
    "TagScoring",
    "fit_calibration",
    "fit_confidence",
    "fit_scoring",
]

Array = np.ndarray
# The precisions whose thresholds a checkpoint holds.
_PRECISIONS = tuple(round(0.01 * percent, 2) for percent in range(30, 100))
# Fewer tags than this say little about a precision.
_ENOUGH = 30


class Calibration:
    """Platt scaling: the probability that a tag is right, from the decoder's probability.

    For models that have no :class:`TagScoring`, as those of version 0.1. Source: Platt,
    "Probabilistic Outputs for Support Vector Machines" (1999).
    """

    def __init__(self, slope: float = 1.0, offset: float = 0.0) -> None:
        """``score = sigmoid(slope * logit(p) + offset)``; the default leaves p as it is.

        Raises ``ValueError`` for numbers that are not finite, or so large that no fit gives them.
        """
        if not (abs(slope) <= 1e4 and abs(offset) <= 1e4):
            raise ValueError(f"the calibration {slope}, {offset} is out of range")
        self.slope, self.offset = slope, offset

    def __call__(self, log_prob: float) -> float:
        """Return the score in 0…1 of a tag that the decoder gave this log-probability."""
        return 1.0 / (1.0 + math.exp(-max(self.slope * _logit(log_prob) + self.offset, -700.0)))


def _logit(log_prob: float) -> float:
    p = min(max(math.exp(log_prob), 1e-6), 1.0 - 1e-6)
    return math.log(p / (1.0 - p))


def fit_calibration(log_probs: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Fit Platt scaling to log-probabilities of tags and whether each was right.

    Without data the identity comes back.
    """
    features = np.array([[_logit(lp), 1.0] for lp in log_probs]).reshape(-1, 2)
    slope, offset = _logistic(features, np.asarray(right, np.float64), np.array([1.0, 0.0]))
    return Calibration(float(slope), float(offset))


@dataclass(frozen=True)
class TagScoring:
    """How a tag's evidence becomes a probability, and which probability is enough.

    The score is ``sigmoid(weights · [evidence, 1])``: the logistic regression of whether a
    photograph has a tag, fitted on the validation split.
    """

    weights: tuple[float, ...]
    """One for each kind of evidence, then the offset."""
    threshold: float
    """The lowest score of a tag that is given by default: that of the best overall F1."""
    precisions: tuple[tuple[float, float], ...] = ()
    """Precisions in rising order, each with the lowest score above which it was reached."""

    @classmethod
    def of(cls, stored: Any) -> TagScoring | None:
        """Return the scoring that a file has as a dict; ``None`` stays ``None``."""
        if stored is None:
            return None
        return cls(
            tuple(map(float, stored["weights"])),
            float(stored["threshold"]),
            tuple((float(precision), float(score)) for precision, score in stored["precisions"]),
        )

    def __post_init__(self) -> None:
        """Check the numbers, which may come from a file; ``ValueError`` if they are absurd."""
        if not self.weights or not all(abs(weight) <= 1e4 for weight in self.weights):
            raise ValueError(f"the weights {self.weights} of the tags' scores are out of range")
        shares = [self.threshold, *(value for pair in self.precisions for value in pair)]
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise ValueError("a threshold of the tags' scores is not in 0…1")

    def threshold_of(self, precision: float) -> float | None:
        """Return the score from which tags have a precision, or ``None`` if no score has it."""
        return next((score for reached, score in self.precisions if reached >= precision), None)


@dataclass(frozen=True)
class Confidence:
    """How the evidence for a caption becomes the probability that the caption is right.

    It is ``sigmoid(weights · [evidence, 1])``: the logistic regression of whether a caption is
    right, fitted on the validation split.
    """

    weights: tuple[float, ...]
    """One for each kind of evidence, then the offset."""

    def __post_init__(self) -> None:
        """Check the numbers, which may come from a file; ``ValueError`` if they are absurd."""
        if len(self.weights) < 2 or not all(abs(weight) <= 1e4 for weight in self.weights):
            raise ValueError(f"the weights {self.weights} of a caption's confidence make no sense")

    def __call__(self, evidence: Sequence[float]) -> float:
        """Return the probability, 0…1, that a caption with this evidence is right."""
        *weights, offset = self.weights
        logit = sum(w * x for w, x in zip(weights, evidence, strict=True)) + offset
        return 1.0 / (1.0 + math.exp(-min(max(logit, -700.0), 700.0)))


def fit_confidence(evidence: Array, right: Array) -> Confidence:
    """Fit the confidence to the evidence ``(captions, kinds)`` and whether each is right."""
    features = np.concatenate([evidence, np.ones((len(evidence), 1))], axis=1)
    weights = _logistic(features, right.astype(np.float64), np.zeros(features.shape[1]))
    return Confidence(tuple(map(float, weights)))


def fit_scoring(evidence: Array, labels: Array) -> TagScoring:
    """Fit the scores of tags, and their thresholds.

    Args:
        evidence: ``(photographs, T, kinds)``. What is not finite, as of a model whose training
            diverged, is left out.
        labels: ``(photographs, T)``: 1 where a photograph has the tag, 0 where it has not, and
            -1 where that is not known, which is left out.
    """
    known = (labels >= 0) & np.isfinite(evidence).all(axis=2)
    right = labels[known] > 0
    features = np.concatenate([evidence[known], np.ones((len(right), 1), np.float32)], axis=1)
    start = np.zeros(features.shape[1])
    start[-1] = _logit(math.log(min(max(right.mean(), 1e-6), 0.5))) if len(right) else 0.0
    weights = _logistic(features.astype(np.float64), right.astype(np.float64), start)
    scores = 1.0 / (1.0 + np.exp(-np.clip(features @ weights, -700.0, 700.0)))
    order = np.argsort(-scores, kind="stable")
    return TagScoring(tuple(map(float, weights)), *_thresholds(scores[order], right[order]))


def _thresholds(scores: Array, right: Array) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Return the threshold of the best F1, and those of precisions; the highest score is first."""
    if not right.any():
        return 0.5, ()
    hits, given = np.cumsum(right), np.arange(1, len(right) + 1)
    best = float(scores[np.argmax(2.0 * hits / (given + right.sum()))])
    reached = hits / given
    found: list[tuple[float, float]] = []
    for precision in _PRECISIONS:
        places = np.flatnonzero((reached >= precision) & (given >= _ENOUGH))
        if len(places):
            found.append((precision, float(scores[places[-1]])))
    return best, tuple(found)


def _logistic(features: Array, labels: Array, start: Array) -> Array:
    """Return the weights of a logistic regression, ``features`` ``(n, k)``, ``labels`` 0 or 1.

    Newton's method, with steps halved until they help, on the log-likelihood with a weak pull
    towards the start, so that it ends for any data.
    """
    weights = start

    def loss(at: Array) -> float:
        z = features @ at
        return float(np.sum(np.logaddexp(0.0, z) - labels * z) + 0.5 * np.sum((at - start) ** 2))

    for _ in range(30):
        p = 0.5 * (1.0 + np.tanh(0.5 * (features @ weights)))
        gradient = features.T @ (p - labels) + (weights - start)
        hessian = features.T @ (features * (p * (1.0 - p))[:, None]) + np.eye(len(start))
        move = np.linalg.solve(hessian, gradient)
        if np.abs(move).max() < 1e-9:
            break
        while loss(weights - move) > loss(weights) and np.abs(move).max() > 1e-9:
            move /= 2.0
        weights = weights - move
    return weights
