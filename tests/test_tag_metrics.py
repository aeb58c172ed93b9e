"""Measures of tags, against hand-worked cases and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from captioner.metrics.tags import (
    average_precision,
    mean_average_precision,
    measure_tags,
    most_likely,
)

SCORES = np.array([[0.9, 0.2, 0.6], [0.8, 0.7, 0.1], [0.3, 0.95, 0.5]], np.float32)
LABELS = np.array([[1, 0, 0], [0, 1, -1], [1, 1, 0]], np.int8)


def test_average_precision_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for digits in (1, 8):  # with many equal scores, and with none
        scores = generator.random(200).round(digits)
        right = generator.random(200) < 0.2
        expected = metrics.average_precision_score(right, scores)
        assert average_precision(scores, right) == pytest.approx(expected)


def test_the_mean_is_over_the_tags_that_a_photograph_has() -> None:
    # Tag 0 has its photographs at ranks 1 and 3, tag 1 at ranks 1 and 2; no photograph has tag 2.
    assert mean_average_precision(SCORES, LABELS) == pytest.approx(((1 + 2 / 3) / 2 + 1.0) / 2)


def test_unknown_labels_count_neither_way() -> None:
    scores, labels = SCORES.copy(), LABELS.copy()
    labels[0, 0] = -1
    assert mean_average_precision(scores, labels) == pytest.approx((1 / 2 + 1.0) / 2)


def test_chosen_tags_are_measured_as_wang_does() -> None:
    chosen = SCORES >= 0.5
    measured = measure_tags(SCORES, LABELS, chosen).chosen
    # Tag 0 is given twice and right once, of two; tag 1 twice and right twice, of two; tag 2,
    # which no photograph has, twice, and counts overall alone.
    assert measured.class_precision == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert measured.class_recall == pytest.approx((1 / 2 + 2 / 2) / 2)
    assert measured.class_f1 == pytest.approx(0.75)
    assert measured.precision == pytest.approx(3 / 6)
    assert measured.recall == pytest.approx(3 / 4)
    assert measured.f1 == pytest.approx(2 * 0.5 * 0.75 / 1.25)


def test_the_highest_scores_are_most_likely() -> None:
    found = most_likely(np.array([[0.1, 0.4, 0.4, 0.3], [0.0, 0.2, 0.0, 0.0]]), 2)
    assert found.tolist() == [[False, True, True, False], [False, True, False, False]]


def test_the_calibration_error_is_that_of_the_bins() -> None:
    scores = np.array([[0.91, 0.05], [0.93, 0.02]], np.float32)
    labels = np.array([[1, 0], [0, 0]], np.int8)
    measured = measure_tags(scores, labels, scores > 0.5)
    assert [part.number for part in measured.reliability] == [2, 2]
    assert measured.calibration_error == pytest.approx((0.035 + abs(0.92 - 0.5)) / 2)
    assert measured.coverage == 1.0


def test_no_photographs_have_figures_too() -> None:
    nothing = np.zeros((0, 3), np.float32)
    figures = measure_tags(nothing, nothing.astype(np.int8), nothing > 0).as_dict()
    assert set(figures.values()) == {0.0}
