"""Scores of tags: how well they are ranked, chosen and calibrated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from captioner.metrics.reliability import Reliability, calibration_error, reliability

__all__ = [
    "Choice",
    "TagMeasures",
    "average_precision",
    "mean_average_precision",
    "measure_tags",
    "most_likely",
]

Array = np.ndarray[Any, Any]
# Of each photograph so many tags are judged on their calibration: those that a person may see.
_SHOWN = 10


class Choice(NamedTuple):
    """Precision, recall and F1 of chosen tags, as fractions.

    Per class: means over the tags that a photograph has; F1 is that of the means. Overall: of all
    tags of all photographs together. Source: Wang et al., "CNN-RNN: A Unified Framework for
    Multi-label Image Classification" (2016), section 4.
    """

    class_precision: float
    class_recall: float
    class_f1: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class TagMeasures:
    """How good the scores of tags are, as fractions."""

    mean_average_precision: float
    """The mean over tags of the area under the curve of precision and recall."""
    top3: Choice
    """The three highest scores of each photograph are chosen."""
    chosen: Choice
    """The tags that the model gives are chosen, those from its threshold on."""
    coverage: float
    """The share of photographs to which the model gives a tag."""
    calibration_error: float
    """The expected calibration error, 15 bins, of the ten highest scores of each photograph."""
    reliability: tuple[Reliability, ...]
    """The bins of it that hold any scores, from the lowest to the highest."""

    def as_dict(self) -> dict[str, float]:
        """Return all figures by name."""
        short = ("c_p", "c_r", "c_f1", "o_p", "o_r", "o_f1")
        figures = {"map": self.mean_average_precision}
        for suffix, choice in (("_top3", self.top3), ("", self.chosen)):
            figures |= {name + suffix: x for name, x in zip(short, choice, strict=True)}
        return figures | {"coverage": self.coverage, "tag_ece": self.calibration_error}


def measure_tags(scores: Array, labels: Array, chosen: Array) -> TagMeasures:
    """Measure the tags of some photographs.

    Args:
        scores: ``(photographs, T)``, in 0…1.
        labels: ``(photographs, T)``: 1 where a photograph has a tag, 0 where it has not, -1 where
            that is not known; these count neither way.
        chosen: ``(photographs, T)`` of bool: the tags that are given.
    """
    bins = _reliability(scores, labels)
    return TagMeasures(
        mean_average_precision(scores, labels),
        _choice(most_likely(scores, 3), labels),
        _choice(chosen, labels),
        float(chosen.any(axis=1).mean()) if len(chosen) else 0.0,
        calibration_error(bins),
        bins,
    )


def most_likely(scores: Array, count: int) -> Array:
    """Return which are the ``count`` highest scores of each row, as ``(photographs, T)`` of bool.

    A score of 0 is none of them; of equal scores the first are.
    """
    highest = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, highest, True, axis=1)
    return chosen & (scores > 0.0)


def average_precision(scores: Array, right: Array) -> float:
    """Return the area under the steps of precision over recall; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    last = np.append(np.diff(scores[order]) != 0.0, True)
    gained = np.diff(hits[last], prepend=0)
    return float(np.sum(gained * hits[last] / (np.flatnonzero(last) + 1.0)) / max(hits[-1], 1))


def mean_average_precision(scores: Array, labels: Array) -> float:
    """Return the mean average precision over the tags that a photograph has.

    Both are ``(photographs, T)``, as in :func:`measure_tags`.
    """
    known, right = labels >= 0, labels > 0
    tags = np.flatnonzero(right.any(axis=0))
    each = [average_precision(scores[known[:, t], t], right[known[:, t], t]) for t in tags]
    return float(np.mean(each)) if each else 0.0


def _choice(chosen: Array, labels: Array) -> Choice:
    known, right = labels >= 0, labels > 0
    hits, given = (chosen & right).sum(axis=0), (chosen & known).sum(axis=0)
    there = right.sum(axis=0)
    tags = there > 0
    per_class = (hits / np.maximum(given, 1), hits / np.maximum(there, 1))
    class_p, class_r = (float(x[tags].mean()) if tags.any() else 0.0 for x in per_class)
    p, r = (float(hits.sum() / max(total, 1)) for total in (given.sum(), there.sum()))
    return Choice(class_p, class_r, _f1(class_p, class_r), p, r, _f1(p, r))


def _f1(precision: float, recall: float) -> float:
    return 2.0 * precision * recall / max(precision + recall, 1e-12)


def _reliability(scores: Array, labels: Array) -> tuple[Reliability, ...]:
    judged = most_likely(scores, _SHOWN) & (labels >= 0)
    return reliability(scores[judged], labels[judged] > 0)
