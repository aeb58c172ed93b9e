"""Captions to words and back: the only module that knows how English is split."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nltk.stem.snowball import SnowballStemmer
    from nltk.tokenize.treebank import TreebankWordTokenizer

__all__ = ["detokenize", "stem", "tokenize"]

# A clitic is written onto the word before it, as the Penn Treebank splits it off.
_CLITICS = frozenset({"'s", "'re", "'ve", "'ll", "'d", "'m", "n't", "'"})
_WORD = re.compile(r"\w|^(?:'s|n't|')$")


@cache
def _treebank() -> TreebankWordTokenizer:
    # nltk costs 0.3 s to import, and captioning a photograph never splits a caption.
    from nltk.tokenize.treebank import TreebankWordTokenizer

    return TreebankWordTokenizer()


@cache
def _stemmer() -> SnowballStemmer:
    from nltk.stem.snowball import SnowballStemmer

    return SnowballStemmer("english")


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case words, without punctuation.

    The conventions are those of the Penn Treebank, by nltk's ``TreebankWordTokenizer``, which
    needs no download. "The man's T-shirt." becomes ``["the", "man", "'s", "t-shirt"]``.
    """
    words = _treebank().tokenize(caption.lower().replace("\u2019", "'"))
    return [word for word in (w.strip('.`"_-/*') for w in words) if _WORD.search(word)]


def detokenize(words: Sequence[str]) -> str:
    """Join words as a person writes them: ``["the", "man", "'s", "hat"]`` is "the man's hat"."""
    text = ""
    for word in words:
        text += word if not text or word in _CLITICS else f" {word}"
    return text


@cache
def stem(word: str) -> str:
    """Return the stem of a lower-case word (Snowball's English stemmer): "running" gives "run"."""
    return str(_stemmer().stem(word))
