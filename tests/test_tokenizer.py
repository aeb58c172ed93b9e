"""Captions to words and back."""

from __future__ import annotations

import pytest

from captioner.data.tokenizer import detokenize, stem, tokenize
from captioner.data.vocabulary import EOS, SPECIAL, UNK, Vocabulary


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("The man's T-shirt .", ["the", "man", "'s", "t-shirt"]),
        ('A black dog , and a "spotted" one!', ["a", "black", "dog", "and", "a", "spotted", "one"]),
        ("a man 's hat", ["a", "man", "'s", "hat"]),
        ("They don’t stop.", ["they", "do", "n't", "stop"]),
        ("two boys' bikes", ["two", "boys", "'", "bikes"]),
        ("", []),
        (" ... -- ! ", []),
    ],
)
def test_tokenize(caption: str, words: list[str]) -> None:
    assert tokenize(caption) == words


def test_detokenize_reads_as_a_person_writes() -> None:
    assert detokenize(["the", "man", "'s", "hat"]) == "the man's hat"
    assert detokenize(["they", "do", "n't", "stop"]) == "they don't stop"
    assert detokenize(["two", "boys", "'", "bikes"]) == "two boys' bikes"
    assert detokenize([]) == ""


def test_stem() -> None:
    assert {stem(word) for word in ("run", "runs", "running")} == {"run"}


def test_vocabulary_round_trip() -> None:
    vocabulary = Vocabulary.build([["a", "dog"], ["a", "cat"], ["a", "dog"]], size=6, min_count=1)
    assert vocabulary.words == (*SPECIAL, "a", "dog")
    assert vocabulary.encode(["a", "cat"]) == [4, UNK, EOS]
    assert vocabulary.decode([4, 5, EOS, 4]) == ["a", "dog"]
    assert "dog" in vocabulary
    assert "cat" not in vocabulary


def test_vocabulary_refuses_a_word_twice() -> None:
    with pytest.raises(ValueError, match="'dog' stands twice"):
        Vocabulary(["dog", "dog"])
