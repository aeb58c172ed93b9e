"""Tags: content words, one a stem, in the order of agreement; scores that are probabilities."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from captioner.data.example import Example
from captioner.data.tags import Calibration, TagSet, content_words, fit_calibration

CAPTIONS = (
    "a brown dog runs on the beach",
    "the dog is running along the beach",
    "a dog on sand",
)


def test_content_words_are_no_function_words() -> None:
    assert content_words("Two men are standing in front of the man's red car .") == [
        "men",
        "standing",
        "man",
        "red",
        "car",
    ]


def test_tags_from_captions() -> None:
    examples = [
        Example(Path("1.jpg"), CAPTIONS),
        Example(Path("2.jpg"), ("a man runs", "a man is running", "the man can run fast")),
    ]
    tags = TagSet.build(examples, size=10, min_count=1)
    assert "run" in tags.vocabulary
    assert "running" not in tags.vocabulary
    assert tags.of(examples[0]) == ["dog", "beach", "run"]
    assert tags.of(Example(Path("3.jpg"), ("a dog runs",))) == ["dog", "run"]
    assert list(TagSet.build(examples, 10, min_count=2).vocabulary.words[4:]) == ["run"]


def test_named_objects_are_taken_as_they_are() -> None:
    examples = [
        Example(Path("1.jpg"), CAPTIONS, ("traffic light", "dog")),
        Example(Path("2.jpg"), CAPTIONS, ("dog",)),
    ]
    tags = TagSet.build(examples, size=10, min_count=1)
    assert tags.vocabulary.words[4:] == ("dog", "traffic light")
    assert tags.of(examples[0]) == ["traffic light", "dog"]


def test_calibration_is_a_probability() -> None:
    generator = np.random.default_rng(0)
    log_probs = np.log(generator.uniform(0.01, 0.99, 20_000))
    # Platt's own model, with a known slope and offset.
    truth = Calibration(0.6, 0.4)
    right = [bool(generator.random() < truth(float(lp))) for lp in log_probs]
    fitted = fit_calibration([float(lp) for lp in log_probs], right)
    assert fitted.slope == pytest.approx(0.6, abs=0.05)
    assert fitted.offset == pytest.approx(0.4, abs=0.05)


def test_calibration_without_data_is_the_identity() -> None:
    assert fit_calibration([], [])(math.log(0.3)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("probabilities", "right"),
    [
        ([0.3] * 3000, [True] * 900 + [False] * 2100),
        ([0.331, 0.332] * 1500, [True, False] * 1500),
        ([1e-9, 1.0] * 1500, [False, True] * 1500),
        ([1e-9, 1.0] * 1500, [True, False] * 1500),
        ([0.2, 0.4, 0.9], [True, True, True]),
    ],
)
def test_calibration_of_any_data_is_the_share_that_is_right(
    probabilities: list[float], right: list[bool]
) -> None:
    log_probs = [math.log(p) for p in probabilities]
    calibration = fit_calibration(log_probs, right)
    assert math.isfinite(calibration.slope)
    if len(right) > 100:
        mean = sum(map(calibration, log_probs)) / len(right)
        assert mean == pytest.approx(sum(right) / len(right), abs=0.01)
