"""Which words of captions say which tag: one canonical form for several words, and compounds.

Lemmas and parts of speech are lemminflect's, whose data is in its wheel. It knows a word, not the
place where it stands. So where a word could be two things the captions decide: several people
describe one photograph, and words mean the same where one person says this and another that.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import pairwise

__all__ = ["Caption", "joined", "learn_forms", "singular"]

Caption = Sequence[str]
"""The words of a caption in order, with "" in place of each word that is no tag."""

# How often the other captions of a photograph say a word's lemma, as a share of how often they
# say the word itself, from which both are one tag. "running" and "run": 0.8; "waving" and "wave":
# 0.3; "building" and "build": 0.0 (Flickr8k's training captions, as all figures here).
_SAME_WORD = 0.3
# How often the other captions say the noun that an adjective is made of, from which the adjective
# says that thing. "snowy" and "snow": 0.8; "rocky" and "rock": 0.5; "dirty" and "dirt": 0.2.
_SAME_THING = 0.45
# How often the other captions say the second word of a compound alone, from which the compound
# says that tag too: a "soccer ball" is a "ball", but a "hot dog" is no "dog".
_KIND_OF = 0.5
# The normalized mutual information from which two words are a compound; more is asked where the
# first may be an adjective. "tennis racket": 0.7; "brown dog": 0.6; "golden retriever": 0.9.
_COMPOUND, _COMPOUND_OF_ADJECTIVE = 0.6, 0.85
# The share of a word that stands in a compound, from which the word alone says it: "hydrant".
_ONLY_THERE = 0.75
# Below this share of the plural's count, the singular is not what people say: "shorts".
_RARE = 0.1
# The captions that a rule needs to see before it departs from single words and their lemmas.
_EVIDENCE = 5


@cache
def _lemmas(word: str) -> dict[str, tuple[str, ...]]:
    """Return the lemmas of a word by part of speech; a word that is not known is a noun."""
    from lemminflect import getAllLemmas, getAllLemmasOOV

    found: dict[str, tuple[str, ...]] = getAllLemmas(word) or getAllLemmasOOV(word, "NOUN")
    return found


def joined(caption: Caption, known: Collection[str], longest: int) -> list[str]:
    """Return a caption whose runs of words that are known together stand as one: "stop sign".

    Args:
        caption: The words.
        known: Words, and several words with spaces between them; the longest that fits is taken.
        longest: The number of words in the longest.
    """
    found: list[str] = []
    start = 0
    while start < len(caption):
        lengths = range(min(longest, len(caption) - start), 1, -1)
        spans = {n: " ".join(caption[start : start + n]) for n in lengths}
        length = next((n for n, text in spans.items() if text in known), 1)
        found.append(spans.get(length, caption[start]))
        start += length
    return found


def singular(text: str) -> str:
    """Return words with the last in the singular: "traffic light" for "traffic lights"."""
    *first, last = text.split()
    return " ".join([*first, _singular(last)])


def learn_forms(
    photographs: Sequence[Sequence[Caption]], labels: Iterable[str], min_count: int
) -> dict[str, list[str]]:
    """Return the names of all tags that are said, each with the forms that say it.

    Args:
        photographs: The captions of each photograph.
        labels: Names that sources give to tags; those of several words are compounds.
        min_count: How often a compound that no source names must be said.
    """
    compounds = {" ".join(label.lower().split()) for label in labels}
    compounds = {label for label in compounds if " " in label}
    compounds |= _compounds(photographs, min_count)
    longest = max((len(text.split()) for text in compounds), default=1)
    corpus = _Corpus([[joined(c, compounds, longest) for c in each] for each in photographs])
    forms: dict[str, list[str]] = defaultdict(list)
    for word in sorted(corpus.counts, key=lambda w: (-corpus.counts[w], w)):
        for name in corpus.names(word):
            forms[name].append(word)
    said: dict[str, list[str]] = defaultdict(list)
    for name, words in forms.items():
        spelling = corpus.spelling(name, words)
        said[spelling] += (word for word in words if word not in said[spelling])
    return dict(said)


def _compounds(photographs: Sequence[Sequence[Caption]], min_count: int) -> set[str]:
    """Return the pairs of words that stand together so often that they are one."""
    captions = [caption for each in photographs for caption in each]
    words = Counter(_singular(word) for caption in captions for word in caption)
    pairs: Counter[tuple[str, str]] = Counter()
    spelled: dict[tuple[str, str], set[str]] = defaultdict(set)
    for caption in captions:
        for first, second in pairwise(caption):
            if first == _singular(first) and _is_noun(second) and first:
                pair = first, _singular(second)
                pairs[pair] += 1
                spelled[pair].add(f"{first} {second}")
    total = words.total()
    found: set[str] = set()
    for pair, count in pairs.items():
        information = math.log(count * total / (words[pair[0]] * words[pair[1]]))
        adjective = "ADJ" in _lemmas(pair[0])
        needed = _COMPOUND_OF_ADJECTIVE if adjective else _COMPOUND
        if count >= max(min_count, _EVIDENCE) and information >= -needed * math.log(count / total):
            found |= spelled[pair]
    return found


def _singular(word: str) -> str:
    lemmas = _lemmas(word).get("NOUN", (word,)) if word else (word,)
    return word if word in lemmas else lemmas[0]


def _is_noun(word: str) -> bool:
    return bool(word) and "NOUN" in _lemmas(word) and not word.endswith("ing")


class _Corpus:
    """Captions whose words are to be given names."""

    def __init__(self, photographs: Sequence[Sequence[Caption]]) -> None:
        self._captions = [[set(caption) - {""} for caption in each] for each in photographs]
        self.counts = Counter(w for each in self._captions for caption in each for w in caption)
        self._where: dict[str, list[int]] = defaultdict(list)
        self._related: dict[str, set[str]] = defaultdict(set)
        for index, each in enumerate(self._captions):
            for word in set().union(*each):
                self._where[word].append(index)
        for word in self.counts:
            if " " not in word:
                for lemmas in _lemmas(word).values():
                    for lemma in lemmas:
                        self._related[lemma].add(word)
        self._ending: dict[str, Counter[str]] = defaultdict(Counter)
        for text, count in self.counts.items():
            if " " in text:
                for last in {text.split()[-1], singular(text).split()[-1]}:
                    self._ending[last][singular(text)] += count

    def agreement(self, word: str, others: set[str]) -> tuple[float, int]:
        """Return the share of captions with a word beside which another has one of the others.

        The second number is that of the captions, each of a photograph with several.
        """
        seen = agreed = 0
        for index in self._where.get(word, ()):
            captions = self._captions[index]
            for place, caption in enumerate(captions):
                if word in caption and len(captions) > 1:
                    seen += 1
                    rest = captions[:place] + captions[place + 1 :]
                    agreed += any(others & other for other in rest)
        return agreed / max(seen, 1), seen

    def names(self, word: str) -> list[str]:
        """Return the names of the tags that a word says; none for a word that is no tag."""
        if " " not in word:
            whole = self._compound_of(word)
            return [whole] if whole else self._lemma(word)
        last = word.split()[-1]
        share, seen = self.agreement(word, self._related[_singular(last)])
        kind = self._lemma(last) if seen >= _EVIDENCE and share >= _KIND_OF else []
        return [singular(word), *kind]

    def _compound_of(self, word: str) -> str | None:
        """Return the compound that a word stands for even alone, as "hydrant" does."""
        text, count = max(self._ending[word].items(), key=lambda item: item[1], default=("", 0))
        return text if count >= _ONLY_THERE * (count + self.counts[word]) else None

    def _lemma(self, word: str) -> list[str]:
        lemmas = _lemmas(word)
        nouns, verbs = lemmas.get("NOUN", ()), lemmas.get("VERB", ())
        derived = bool(verbs) and verbs[0] != word and not word.endswith("s")
        if derived and (word.endswith("ing") or not nouns):
            return [verbs[0] if self._same(word, verbs[0]) else word]
        if nouns:
            singular = max(set(nouns) - {word} or {word}, key=lambda noun: self.counts[noun])
            return [word if word in nouns and not self._same(word, singular) else singular]
        if verbs:
            return [verbs[0]]
        return [self._thing(word, *lemmas["ADJ"][:1])] if "ADJ" in lemmas else []

    def _same(self, word: str, lemma: str) -> bool:
        share, seen = self.agreement(word, self._related[lemma] - {word})
        itself, _ = self.agreement(word, {word})
        return seen < _EVIDENCE or share >= _SAME_WORD * itself

    def _thing(self, adjective: str, lemma: str) -> str:
        """Return the noun that an adjective in -y says, or its lemma: "muddy" says "mud"."""
        if adjective.endswith("y"):
            stem = adjective[:-1]
            for noun in (stem, f"{stem}e", stem[:-1] if stem[-2:-1] == stem[-1:] else stem):
                share, seen = self.agreement(adjective, self._related[noun])
                if seen >= _EVIDENCE and share >= _SAME_THING:
                    return noun
        return lemma

    def spelling(self, name: str, forms: Sequence[str]) -> str:
        """Return a tag's name as people say it: the plural where the singular is rare."""
        most = max(forms, key=lambda form: self.counts[form])
        plural = most.endswith("s") and _singular(most) == name
        seen = self.counts[most]
        rare = seen >= _EVIDENCE and self.counts[name] < _RARE * seen
        return most if plural and rare else name
