"""What the scores promise beyond being coco-caption's (that is tested in test_coco_caption)."""

from __future__ import annotations

import importlib.util
import math
import shutil
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from captioner.metrics import (
    MissingToolError,
    References,
    diversity,
    meteor,
    paired_bootstrap,
    ptb_tokenize,
    score,
    spice,
)
from test_coco_caption import SETS, needs_java

USUAL = SETS["usual"]["candidates"], SETS["usual"]["references"]
captions = st.lists(st.sampled_from(["a", "the", "dog", "cat", "runs", "on", "grass"]), max_size=9)


def split(texts: list[str]) -> list[list[str]]:
    return [text.split() for text in texts]


@settings(deadline=None)  # other work on the machine is no failure
@given(st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=1))
def test_order_and_company_change_nothing(images: list[tuple[list[str], list[list[str]]]]) -> None:
    candidates, wanted = [c for c, _ in images], [r for _, r in images]
    references = References(wanted)
    together = references.cider_d(candidates)
    alone = [references.cider_d([c], [i])[0] for i, c in enumerate(candidates)]
    assert together == pytest.approx(alone, abs=1e-12)
    backward = References(wanted[::-1]).score(candidates[::-1])
    assert backward.cider_d_per_image[::-1] == pytest.approx(together, abs=1e-12)
    assert backward.bleu == pytest.approx(references.score(candidates).bleu)
    assert references.bleu(candidates) == pytest.approx(
        references.bleu(candidates, range(len(images)))
    )


@settings(deadline=None)  # other work on the machine is no failure
@given(st.lists(captions, min_size=1, max_size=5), st.lists(captions, min_size=1, max_size=5))
def test_scores_stay_in_their_ranges(candidates: list[list[str]], wanted: list[list[str]]) -> None:
    references = References([wanted] * 2)
    images = [0] * len(candidates)
    assert (
        (references.bleu(candidates, images) >= 0) & (references.bleu(candidates, images) <= 1)
    ).all()
    for values, most in (
        (references.rouge_l(candidates, images), 1.0),
        (references.cider_d(candidates, images), 10.0),
    ):
        assert ((values >= 0.0) & (values <= most + 1e-9)).all()


def test_document_frequencies_of_a_corpus() -> None:
    corpus = [["red dog"], ["a red car"], ["a cat"], ["a boat"]]
    references = References([[["dog"]]], [split(texts) for texts in corpus])
    # "dog" is in one of the four images and "red" in two; a word more is a bigram more.
    weights = math.log(4), math.log(2)
    cosine = weights[0] ** 2 / (math.hypot(*weights) * weights[0])
    wanted = 10.0 * cosine / 4.0 * math.exp(-1.0 / 72.0)
    assert references.cider_d([["red", "dog"]])[0] == pytest.approx(wanted, abs=1e-12)


def test_rouge_takes_precision_and_recall_from_different_references() -> None:
    references = References([split(["a dog", "a dog runs on green grass"])])
    precision, recall = 1.0, 1.0  # "a dog runs" is all in the second, and all of the first
    wanted = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert references.rouge_l([["a", "dog", "runs"]])[0] == pytest.approx(wanted)


def nltk_bleu(candidates: list[str], references: list[list[str]], n: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk's, of n-grams that are nowhere found
        weights = (1.0 / n,) * n
        return float(
            corpus_bleu([split(texts) for texts in references], split(candidates), weights)
        )


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_nltk_agrees_when_captions_are_long_enough(n: int) -> None:
    long = [place for place, text in enumerate(USUAL[0]) if len(text.split()) >= n]
    candidates, references = ([texts[place] for place in long] for texts in USUAL)
    ours = score(candidates, references).bleu[n - 1]
    assert ours == pytest.approx(nltk_bleu(candidates, references, n), abs=1e-8)


def test_nltk_differs_on_captions_shorter_than_n() -> None:
    # It takes a caption of two words to have one trigram, which no reference has.
    candidates, references = ["a dog runs", "a boat"], [["a dog runs"], ["a boat"]]
    assert score(candidates, references).bleu[2] == pytest.approx(1.0, abs=1e-8)
    assert nltk_bleu(candidates, references, 3) == pytest.approx(0.5 ** (1 / 3))


def test_nltk_differs_where_nothing_is_found() -> None:
    assert nltk_bleu(["a cat"], [["a dog"]], 2) < 1e-100
    assert score(["a cat"], [["a dog"]]).bleu[1] == pytest.approx(math.sqrt(0.5e-15), rel=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="2 candidates for 1 sets"):
        score(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        score(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="no image to score"):
        score([], [])
    with pytest.raises(TypeError, match="candidate 1 is None; a caption is a string"):
        score(["a", None], [["a"], ["b"]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"reference 0 is \['a'\]"):
        score(["a"], [[["a"]]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="image 0 are one string, 'a dog'"):
        score(["a"], ["a dog"])
    references = References([[["a"]], [["b"]]])
    with pytest.raises(ValueError, match="1 candidates for 2 images"):
        references.cider_d([["a"]])
    for measure in (references.bleu, references.rouge_l, references.cider_d):
        assert len(measure([], [])) == 0
        with pytest.raises(ValueError, match="there is no image -1; they are 0 to 1"):
            measure([["a"]], [-1])
        with pytest.raises(TypeError, match="'a dog' is no list of words"):
            measure(["a dog"], [0])
    with pytest.raises(ValueError, match="no image to score"):
        References([[["a"]]], corpus=[])
    with pytest.raises(ValueError, match="image 1 has no reference"):
        References([[["a"]]], corpus=[[["a"]], []])
    with pytest.raises(TypeError, match="the captions are one string, 'abc'"):
        diversity("abc")


def test_diversity() -> None:
    written = ["A dog runs.", "a dog runs", "a man in a", "the man looks at the"]
    found = diversity(written, training=["A dog runs .", "a boat"])
    assert found.distinct_1 == 8 / 15
    assert found.distinct_2 == 9 / 11
    assert found.words_used == 8
    assert found.mean_length == 15 / 4
    assert found.bad_endings == 0.5
    assert found.novel == 0.5
    assert diversity(["", "a"]).novel is None
    # Whether a full stop is the last word's must not depend on the caption that follows.
    assert diversity(["vitamin C."], ["vitamin C.", "The dog"]).novel == 0.0
    with pytest.raises(ValueError, match="no caption"):
        diversity([])


@needs_java
def test_meteor_is_pycocoevalcaps() -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    candidates, references = [*USUAL[0], "a dog runs"], [*USUAL[1], ["a dog runs"]]
    wanted = {i: [" ".join(words) for words in ptb_tokenize(r)] for i, r in enumerate(references)}
    written = {i: [" ".join(words)] for i, words in enumerate(ptb_tokenize(candidates))}
    scorer = Meteor()
    with scorer.meteor_p:
        total, each = scorer.compute_score(wanted, written)
    assert meteor(candidates, references) == (total, *each)
    assert each[-1] > 0.9
    with pytest.raises(ValueError, match="1 candidates for 0 sets"):
        meteor(["a"], [])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for by_java in (meteor, spice):
        with pytest.raises(MissingToolError, match=r'pip install "captioner\[coco\]"'):
            by_java(*USUAL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for by_java in (meteor, spice):
        with pytest.raises(MissingToolError, match="needs Java: install"):
            by_java(*USUAL)


@needs_java
def test_spice_says_what_to_download() -> None:
    with pytest.raises(MissingToolError, match=r"stanford-corenlp-3\.6\.0 and its models"):
        spice(*USUAL)


def test_bootstrap() -> None:
    mean, low, high = paired_bootstrap([1.0, 2.0, 3.0] * 50, [0.5, 2.0, 2.0] * 50)
    assert mean == pytest.approx(0.5)
    assert 0.4 < low < 0.5 < high < 0.6
    assert paired_bootstrap([1.0] * 5, [1.0] * 5) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="2 scores cannot be paired with 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
