"""Tokens and scores equal coco-caption's: those frozen here and, with Java, its own.

``python tests/test_coco_caption.py DATA`` writes the golden file anew, by pycocoevalcap 1.2.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from captioner.data.readers import read
from captioner.metrics import References, Scores, ptb_tokenize, score

GOLDEN = Path(__file__).parent / "golden" / "coco_caption.json"
FROZEN: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
LINES = [line for line, _ in FROZEN["lines"]]
SETS: dict[str, Any] = FROZEN["sets"]
FIGURES = ("bleu", "rouge_l", "cider_d", "bleu_per_image", "rouge_l_per_image", "cider_d_per_image")

Texts = Sequence[str]
Test = TypeVar("Test", bound=Callable[..., None])


def needs_java(test: Test) -> Test:
    """Mark a test; it is skipped where there is no Java, or no coco-caption."""
    skipped: Test = pytest.mark.skipif(
        shutil.which("java") is None or importlib.util.find_spec("pycocoevalcap") is None,
        reason='coco-caption itself needs Java and pip install "captioner[coco]"',
    )(test)
    marked: Test = pytest.mark.java(skipped)
    return marked


def their_tokens(captions: Texts) -> list[str]:
    """Return coco-caption's tokens, joined by spaces, of each caption in order."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    keyed = {place: [{"caption": caption}] for place, caption in enumerate(captions)}
    found = PTBTokenizer().tokenize(keyed)
    return [found[place][0] for place in range(len(captions)) if place in found]


def their_scores(candidates: Texts, references: Sequence[Texts]) -> dict[str, Any]:
    """Return coco-caption's scores of captions that are tokens joined by spaces."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = {place: list(texts) for place, texts in enumerate(references)}
    written = {place: [text] for place, text in enumerate(candidates)}
    bleu, bleus = Bleu(4).compute_score(wanted, written, verbose=0)
    rouge, rouges = Rouge().compute_score(wanted, written)
    cider, ciders = Cider().compute_score(wanted, written)
    each = [list(four) for four in zip(*bleus, strict=True)]
    values = bleu, float(rouge), float(cider), each, rouges.tolist(), ciders.tolist()
    return dict(zip(FIGURES, values, strict=True))


def assert_equal(ours: Scores, theirs: dict[str, Any]) -> None:
    for name in FIGURES:
        wanted = theirs[name]
        found = getattr(ours, name)
        pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
        for value, figure in pairs:
            assert value == pytest.approx(figure, abs=1e-9, rel=0.0), name


def joined(captions: Texts) -> list[str]:
    return [" ".join(words) for words in ptb_tokenize(captions)]


def digest(lines: Texts) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def grouped(lines: Texts, like: Sequence[Texts]) -> list[list[str]]:
    left = iter(lines)
    return [[next(left) for _ in texts] for texts in like]


def captions_of(data: Path, name: str) -> list[tuple[str, ...]]:
    if name == "Flickr8k":
        examples = read(data / "flickr8k" / "captions.token.txt").examples
    else:
        examples = read(data / "coco-mini" / "captions.json").examples
    return [example.captions for example in examples]


def first_against_the_rest(captions: Sequence[Texts]) -> tuple[list[str], list[Texts]]:
    several = [texts for texts in captions if len(texts) > 1][-1000:]
    return [texts[0] for texts in several], [texts[1:] for texts in several]


ODD = [*"abISTU059.,;:!?'\"`-_/\\()[]{}<>@#$%&*+=~ \t", *"é£€“”‘’«»—…½₂°\xa0\xad\u2009\u3000"]
ODD += [
    *"狗हि\u0301\u200b\x85\x92\x01\x1f\x7f😀",
    "n't",
    "'s",
    "&amp;",
    "http://",
    "www.",
    ".com",
    "No. ",
]


def odd_lines(count: int, seed: int) -> list[str]:
    """Put pieces of the golden lines together at random, and change some of what comes out."""
    draw = random.Random(seed)
    pieces = [piece for line in LINES for piece in [*line.split(" "), line[:20]]]
    lines = []
    for _ in range(count):
        parts = [
            draw.choice(pieces) + draw.choice(("", " ", " ")) for _ in range(draw.randint(0, 8))
        ]
        line = list("".join(parts))
        for _ in range(draw.randint(0, 4)):
            line.insert(draw.randint(0, len(line)), draw.choice(ODD))
        lines.append("".join(line))
    return lines


def without_line_ends(line: str) -> str:
    return line.translate(dict.fromkeys(map(ord, "\r\n\v\f\u2028\u2029"), " "))


@pytest.mark.parametrize(
    ("place", "line", "tokens"), [(n, *e) for n, e in enumerate(FROZEN["lines"])]
)
def test_tokens_are_those_frozen(place: int, line: str, tokens: str) -> None:
    assert joined(LINES)[place] == tokens, line


@pytest.mark.parametrize("name", SETS)
def test_scores_are_those_frozen(name: str) -> None:
    assert_equal(score(SETS[name]["candidates"], SETS[name]["references"]), SETS[name]["scores"])


@pytest.mark.data
@pytest.mark.parametrize("name", FROZEN["data"])
def test_real_captions_are_as_frozen(name: str, data: Path) -> None:
    captions = captions_of(data, name)
    frozen = FROZEN["data"][name]
    assert digest(joined([text for texts in captions for text in texts])) == frozen["tokens"]
    assert_summary(score(*first_against_the_rest(captions)), frozen["scores"])


def assert_summary(ours: Scores, theirs: dict[str, Any]) -> None:
    for name, wanted in theirs.items():
        assert getattr(ours, name) == pytest.approx(wanted, abs=1e-9, rel=0.0), name


@pytest.mark.parametrize("end", ["\n", "\r", "\v", "\f", "\r\n", "\u2028", "\u2029"])
def test_a_line_end_inside_a_caption_moves_no_other(end: str) -> None:
    captions = [f"a dog{end}runs", "a cat", "a man"]
    assert joined(captions) == ["a dog runs", "a cat", "a man"]


@needs_java
@pytest.mark.parametrize("end", ["\r", "\v", "\f", "\u2028", "\u2029"])
def test_there_it_moves_all_that_follow(end: str) -> None:
    assert their_tokens([f"a dog{end}runs", "a cat", "a man"]) == ["a dog", "runs", "a cat"]


@needs_java
def test_frozen_tokens_are_coco_captions() -> None:
    assert their_tokens(LINES) == [tokens for _, tokens in FROZEN["lines"]]


@needs_java
def test_odd_lines_have_the_same_tokens() -> None:
    lines = [without_line_ends(line) for line in odd_lines(20_000, seed=1)]
    for line, ours, theirs in zip(lines, joined(lines), their_tokens(lines), strict=True):
        assert ours == theirs, line


@needs_java
@pytest.mark.data
@pytest.mark.parametrize("name", ["Flickr8k", "COCO"])
def test_real_captions_have_the_same_tokens(name: str, data: Path) -> None:
    lines = [text for texts in captions_of(data, name) for text in texts]
    for line, ours, theirs in zip(lines, joined(lines), their_tokens(lines), strict=True):
        assert ours == theirs, line


@needs_java
@pytest.mark.parametrize("name", SETS)
def test_frozen_scores_are_coco_captions(name: str) -> None:
    candidates, references = SETS[name]["candidates"], SETS[name]["references"]
    theirs = scores_by_java(candidates, references)
    assert theirs == SETS[name]["scores"]


@needs_java
def test_scores_are_the_same_in_any_order() -> None:
    draw = random.Random(2)
    words = ["a", "the", "dog", "cat", "man", "runs", "on", "grass", "sand", ",", ".", "with"]
    for images in (1, 2, 30):
        references = [
            [
                " ".join(draw.choices(words, k=draw.randint(0, 15)))
                for _ in range(draw.randint(1, 6))
            ]
            for _ in range(images)
        ]
        candidates = [" ".join(draw.choices(words, k=draw.randint(0, 15))) for _ in range(images)]
        ours = References([[text.split() for text in texts] for texts in references])
        found = ours.score([text.split() for text in candidates])
        assert_equal(found, their_scores(candidates, references))


def scores_by_java(candidates: Texts, references: Sequence[Texts]) -> dict[str, Any]:
    flat = their_tokens([text for texts in references for text in texts])
    return their_scores(their_tokens(candidates), grouped(flat, references))


def freeze(data: Path) -> None:
    lines = list(zip(LINES, their_tokens(LINES), strict=True))
    sets = {
        name: {**s, "scores": scores_by_java(s["candidates"], s["references"])}
        for name, s in SETS.items()
    }
    real = {}
    for name in ("Flickr8k", "COCO"):
        captions = captions_of(data, name)
        scores = scores_by_java(*first_against_the_rest(captions))
        tokens = digest(their_tokens([text for texts in captions for text in texts]))
        real[name] = {"tokens": tokens, "scores": {n: scores[n] for n in FIGURES[:3]}}
    golden = {"lines": lines, "sets": sets, "data": real}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]))
