"""Scores equal coco-caption's own, frozen here from pycocoevalcap 1.2."""

from __future__ import annotations

import pytest

from captioner.metrics import paired_bootstrap, score

CANDIDATES = [
    "a dog runs on the grass",
    "a man in a red hat",
    "two children play",
    "a boat",
    "the the the the",
]
REFERENCES = [
    ["a dog runs across the green grass", "the dog is running on grass", "a brown dog runs"],
    ["a man wears a red hat", "a man in a hat stands outside", "man with red hat on his head"],
    ["two children are playing in the sand", "two kids play at the beach on a sunny day"],
    ["a boat", "a small boat on a calm lake"],
    ["a bird on the wire", "the bird sits on the wire above the street"],
]
# pycocoevalcap 1.2: Bleu(4).compute_score and Cider().compute_score on the sentences above.
BLEU = (0.7505977406383345, 0.5768503569978225, 0.45687430098988807, 0.321900888444212)
CIDER = (
    2.336035521787936,
    3.654772618868079,
    1.059424242430951,
    2.941655173661073,
    0.32704020753643304,
)


def test_equal_to_coco_caption() -> None:
    scores = score(CANDIDATES, REFERENCES)
    assert scores.bleu == pytest.approx(BLEU, abs=1e-9)
    assert scores.cider_d_per_image == pytest.approx(CIDER, abs=1e-9)
    assert scores.cider_d == pytest.approx(sum(CIDER) / 5, abs=1e-9)


def test_order_of_images_changes_nothing() -> None:
    forward, backward = score(CANDIDATES, REFERENCES), score(CANDIDATES[::-1], REFERENCES[::-1])
    assert backward.bleu == pytest.approx(forward.bleu)
    assert backward.cider_d_per_image[::-1] == pytest.approx(forward.cider_d_per_image)


def test_empty_candidate_scores_nothing() -> None:
    scores = score(["", "a small boat"], [["a dog runs"], ["a small boat"]])
    assert scores.cider_d_per_image[0] == 0.0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="2 candidates for 1 sets"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        score(["a", "b"], [["a"], []])


def test_bootstrap() -> None:
    mean, low, high = paired_bootstrap([1.0, 2.0, 3.0] * 50, [0.5, 2.0, 2.0] * 50)
    assert mean == pytest.approx(0.5)
    assert 0.4 < low < 0.5 < high < 0.6
    assert paired_bootstrap([1.0] * 5, [1.0] * 5) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="2 scores cannot be paired with 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
