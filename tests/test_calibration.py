"""Scores that are probabilities, and thresholds that keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from captioner.data.calibration import TagScoring, fit_scoring

Array = np.ndarray


def drawn(seed: int, photographs: int = 2000, tags: int = 20) -> tuple[Array, Array]:
    """Return evidence of two kinds, and labels by a known logistic regression of it."""
    generator = np.random.default_rng(seed)
    evidence = generator.normal(size=(photographs, tags, 2)).astype(np.float32)
    logits = evidence @ np.array([1.5, -0.5], np.float32) - 1.0
    labels = (generator.random(logits.shape) < 1.0 / (1.0 + np.exp(-logits))).astype(np.int8)
    return evidence, labels


def scores(scoring: TagScoring, evidence: Array) -> Array:
    *weights, offset = scoring.weights
    return np.asarray(1.0 / (1.0 + np.exp(-(evidence @ np.array(weights) + offset))))


def test_the_weights_are_those_that_drew_the_labels() -> None:
    scoring = fit_scoring(*drawn(0))
    assert scoring.weights == pytest.approx((1.5, -0.5, -1.0), abs=0.05)


def test_what_is_not_known_is_left_out() -> None:
    evidence, labels = drawn(0)
    spoilt = labels.copy()
    spoilt[:, ::2] = -1
    assert (
        fit_scoring(evidence, spoilt).weights
        == fit_scoring(evidence[:, 1::2], labels[:, 1::2]).weights
    )


def test_the_threshold_has_the_best_f1() -> None:
    evidence, labels = drawn(0)
    scoring = fit_scoring(evidence, labels)
    found, right = scores(scoring, evidence), labels > 0

    def f1(threshold: float) -> float:
        chosen = found >= threshold
        return float(2 * (chosen & right).sum() / (chosen.sum() + right.sum()))

    assert f1(scoring.threshold) >= max(f1(t / 50) for t in range(51)) - 1e-4


def test_a_precision_is_kept_on_photographs_that_were_not_fitted_on() -> None:
    scoring = fit_scoring(*drawn(0))
    evidence, labels = drawn(1)
    found = scores(scoring, evidence)
    for precision in (0.5, 0.7, 0.9):
        threshold = scoring.threshold_of(precision)
        assert threshold is not None
        assert labels[found >= threshold].mean() == pytest.approx(precision, abs=0.03)
    assert scoring.threshold_of(0.999) is None


def test_thresholds_rise_with_the_precision() -> None:
    thresholds = [score for _, score in fit_scoring(*drawn(0)).precisions]
    assert thresholds == sorted(thresholds)


@pytest.mark.parametrize("labels", [np.zeros((3, 2), np.int8), np.full((3, 2), -1, np.int8)])
def test_without_any_tag_there_is_a_scoring_all_the_same(labels: Array) -> None:
    scoring = fit_scoring(np.zeros((3, 2, 2), np.float32), labels)
    assert scoring.threshold == 0.5
    assert scoring.precisions == ()


@pytest.mark.parametrize(
    "values",
    [
        ((), 0.5),
        ((float("nan"),), 0.5),
        ((1e9,), 0.5),
        ((1.0,), -0.1),
        ((1.0,), 0.5, ((2.0, 0.1),)),
    ],
)
def test_absurd_numbers_are_refused(values: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"out of range|not in 0…1"):
        TagScoring(*values)  # type: ignore[arg-type]
