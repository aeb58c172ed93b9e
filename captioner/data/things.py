"""Whether a caption is right: the things that it names are in what people said."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from captioner.data.tags import content_words

__all__ = ["names_right", "things"]

# Words that say a person. People disagree about age and sex, so that each stands for all.
_PEOPLE_TEXT = """
    adult baby boy child gentleman girl guy kid lady man people person player teen teenager toddler
    woman
"""
_PEOPLE = frozenset(_PEOPLE_TEXT.split())


def things(caption: str) -> frozenset[str]:
    """Return the things that a caption names: its nouns in the singular, persons as "person".

    A word that is also a verb's form in -ing, as "running", is an action. Parts of speech are
    lemminflect's, which knows the word alone.
    """
    nouns = map(_noun, content_words(caption))
    return frozenset("person" if noun in _PEOPLE else noun for noun in nouns if noun)


@cache
def _noun(word: str) -> str | None:
    """Return the singular of a noun, and ``None`` for another word."""
    from lemminflect import getAllLemmas

    lemmas = getAllLemmas(word)
    is_action = word.endswith("ing") and "VERB" in lemmas
    return None if is_action else next(iter(lemmas.get("NOUN", ())), None)


def names_right(caption: str, references: Sequence[str], needed: int = 2) -> bool:
    """Return whether at least ``needed`` references name each thing that a caption names.

    Where there are fewer references, all of them must. A caption that names nothing is not right.
    Raises ``ValueError`` where there are no references.
    """
    if not references:
        raise ValueError("there are no references to judge a caption by")
    named = things(caption)
    seen = [things(reference) for reference in references]
    needed = min(needed, len(seen))
    return bool(named) and all(sum(thing in each for each in seen) >= needed for thing in named)
