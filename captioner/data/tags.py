"""The tag vocabulary: which words are tags, and which tags a photograph has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captioner.data.example import DataError, Example
from captioner.data.lemmas import joined, learn_forms, singular
from captioner.data.tokenizer import stem, tokenize
from captioner.data.vocabulary import SPECIAL, Vocabulary
from captioner.files import replacing

__all__ = ["Labels", "TagSet", "content_words", "label_matrix"]

_HEAD = """# On each line a tag: its name, how many photographs have it, and the words of captions
# that say it, with tabs between them. Edit it freely: leave tags out, merge them, move words.
# Training takes this file as data.tags, and counts anew.
"""

# Words that name no thing, action, colour or place. Not a general stop list: it also leaves out
# numbers, sizes, positions within the picture, and the verbs that captions use as copulas.
_NOT_TAGS_TEXT = """
    a an the this that these those some any each every all both another other others many several
    few more most much no none either neither such same different various own
    i me my we us our you your he him his himself she her hers herself it its itself they them
    their theirs themselves one ones someone somebody something anything nothing everyone everybody
    who whom whose which what where when why how there here
    and or but nor so yet if as than then while whilst because although though until unless whether
    of in on at by to from with without within into onto upon over under above below beneath
    underneath beside besides between among amongst amidst amid behind before after against along
    alongside across around about through throughout during near nearby next toward towards off
    out outside inside up down away back forth past beyond atop like for per via plus except despite
    is are was were be been being am do does did doing done has have had having can could will
    would shall should may might must not n't 's 're 've 'll 'd 'm
    get gets getting got go goes going gone went come comes coming came make makes making made take
    takes taking took taken put puts putting let lets seem seems seeming appear appears appearing
    use uses using used try tries trying tried begin begins beginning start starts starting keep
    keeps keeping wear wears wearing worn dressed contain contains containing include includes
    including show shows showing shown look looks looking
    zero two three four five six seven eight nine ten first second third last once twice half pair
    very too just only also even still again almost already quite rather well together apart ahead
    forward forwards backward backwards sideways really partially slightly closely
    front side sides top bottom middle center centre edge end left right background foreground
    distance direction way part piece kind type sort bunch lot lots group set number couple
    area thing things view scene picture photo photograph image camera
    big small large little tiny huge long short tall high low old new young full empty
"""
_NOT_TAGS = frozenset(_NOT_TAGS_TEXT.split())


def content_words(caption: str) -> list[str]:
    """Return the words of a caption that may be tags: things, actions, colours, places."""
    return [word for word in tokenize(caption) if _may_be_tag(word)]


def _may_be_tag(word: str) -> bool:
    return word not in _NOT_TAGS and word[0].isalpha() and len(word) > 1


class Labels(NamedTuple):
    """What is known of the tags of one photograph; it has none of all others."""

    present: list[str]
    """The tags that it has, those first on which most captions agree."""
    unclear: set[str]
    """Tags that somebody says, but too few: neither there nor absent."""


class TagSet:
    """The tags a model knows, and how they are read off an example."""

    def __init__(
        self,
        names: Sequence[str],
        frequencies: Sequence[float] | None = None,
        forms: Mapping[str, Sequence[str]] | None = None,
        min_captions: int = 2,
    ) -> None:
        """Take the tags.

        Args:
            names: Their names.
            frequencies: The share of photographs that have each; 1 by default.
            forms: The words, and the runs of words with spaces between them, that say each tag;
                one form may say several. Without it all words of the name's stem do.
            min_captions: How many captions must agree on a tag, or all if there are fewer.

        Raises:
            ValueError: A name stands twice, or a frequency is not in 0…1.
        """
        self.vocabulary = Vocabulary(names)
        self.frequencies = tuple(frequencies or [1.0] * len(names))
        self.forms = None if forms is None else {name: tuple(forms[name]) for name in names}
        self._min_captions = min_captions
        if len(self.frequencies) != len(names):
            raise ValueError(f"{len(self.frequencies)} frequencies for {len(names)} tags")
        for name, share in zip(names, self.frequencies, strict=True):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"the frequency of the tag {name!r} is {share}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all T tags, in the order of their ids."""
        return self.vocabulary.words[len(SPECIAL) :]

    @cached_property
    def _by_form(self) -> dict[str, tuple[str, ...]]:
        """The names that each form says."""
        return _inverse(self.forms or {})

    @cached_property
    def _longest(self) -> int:
        return max((len(form.split()) for form in self._by_form), default=1)

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        # Only learning needs stems; whoever tags a photograph need not wait for them.
        return {stem(name): name for name in reversed(self.names)}

    @cached_property
    def _rarity(self) -> dict[str, tuple[float, int]]:
        shares = zip(self.names, self.frequencies, strict=True)
        return {name: (share, -place) for place, (name, share) in enumerate(shares)}

    def most_frequent(self, count: int) -> list[str]:
        """Return the tags that most photographs have."""
        rarity = self._rarity
        return sorted(rarity, key=rarity.__getitem__, reverse=True)[:count]

    @classmethod
    def build(cls, examples: Iterable[Example], size: int, min_count: int) -> TagSet:
        """Collect the tags that at least ``min_count`` photographs have, at most ``size``.

        Sources that name a photograph's tags and sources whose captions say them give one set.
        """
        examples = list(examples)
        labels = Counter(label for e in examples for label in e.tags or ())
        captions = [[_in_place(caption) for caption in e.captions] for e in examples]
        frequent = [label for label, count in labels.items() if count >= min_count]
        learnt = learn_forms(captions, frequent, min_count)
        forms = {name: words for name, words in learnt.items() if name not in _NOT_TAGS}
        forms = _with_labels(forms, labels)
        found = cls(list(forms), forms=forms).counted(examples)
        ranked = sorted(found._rarity.items(), key=lambda item: (-item[1][0], item[0]))
        kept = [(n, share) for n, (share, _) in ranked if share * len(examples) > min_count - 0.5]
        # Counted again: a compound that is left out gives its words back.
        return cls([name for name, _ in kept[:size]], forms=found.forms).counted(examples)

    def counted(self, examples: Sequence[Example]) -> TagSet:
        """Return those of the tags that the examples have, with their frequencies among them."""
        counts = Counter(name for e in examples for name in self.labels(e).present)
        names = [name for name in self.names if counts[name]]
        shares = [counts[name] / len(examples) for name in names]
        return TagSet(names, shares, self.forms, self._min_captions)

    @classmethod
    def read(cls, path: Path) -> TagSet:
        """Read a list that :meth:`write` wrote and a person may have edited.

        Raises ``DataError``, with the number of the line, for what is no such list.
        """
        forms: dict[str, list[str]] = {}
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as a list of tags: {error}") from error
        for number, line in enumerate(lines, 1):
            name, *rest = (field.strip() for field in line.split("\t"))
            if name.startswith("#") or not line.strip():
                continue
            if not name or name in forms or name in SPECIAL:
                why = "stands twice" if name in forms else "is no name of a tag"
                raise DataError(f"{path}, line {number}: {name!r} {why}")
            forms[name] = [form.lower() for form in rest[1:] if form] or [name.lower()]
        if not forms:
            raise DataError(f"{path}: a list of tags has a tag on each line; there is none")
        return cls(list(forms), forms=forms)

    def write(self, path: Path, photographs: int) -> None:
        """Write the list of tags: on each line name, number of photographs, forms; tabs between.

        ``photographs`` is the number that the frequencies are shares of.
        """
        forms = self.forms or {name: (name,) for name in self.names}
        with replacing(str(path)) as file:
            file.write(_HEAD.encode())
            for name, share in zip(self.names, self.frequencies, strict=True):
                fields = [name, str(round(share * photographs)), *forms[name]]
                file.write("\t".join(fields).encode() + b"\n")

    def said(self, caption: str) -> set[str]:
        """Return the tags that a caption says."""
        if self.forms is None:
            words = content_words(caption)
            return {name for word in words if (name := self._by_stem.get(stem(word))) is not None}
        words = joined(_in_place(caption), self._by_form, self._longest)
        return {name for word in words for name in self._by_form.get(word, ())}

    def labels(self, example: Example) -> Labels:
        """Return what is known of an example's tags.

        It has the tags that its source names. Where the source names none, it has those that at
        least ``min_captions`` of its captions say (or all, if there are fewer).
        """
        votes = Counter(name for caption in example.captions for name in self.said(caption))
        if example.tags is not None:
            present = list(dict.fromkeys(n for label in example.tags for n in self._named(label)))
        else:
            needed = min(self._min_captions, len(example.captions))
            agreed = [name for name, count in votes.items() if count >= needed]
            present = sorted(agreed, key=lambda name: (-votes[name], *self._rarity[name]))
        return Labels(present, votes.keys() - set(present))

    def _named(self, label: str) -> tuple[str, ...]:
        """Return the tag that a source calls ``label``, if there is one."""
        if label in self.vocabulary:
            return (label,)
        return self._by_form.get(" ".join(label.lower().split()), ())[:1]


def label_matrix(tags: TagSet, examples: Sequence[Example]) -> np.ndarray[Any, np.dtype[np.int8]]:
    """Return what one source says of all tags: ``(photographs, T)``.

    1 stands for a tag that a photograph has, 0 for one that it has not, -1 where that is not
    known: a tag is unclear, or the source names tags, but this one for no photograph.
    """
    column = {name: place for place, name in enumerate(tags.names)}
    labels = [tags.labels(example) for example in examples]
    named = {
        n
        for e, of_one in zip(examples, labels, strict=True)
        if e.tags is not None
        for n in of_one.present
    }
    unnamed = [column[name] for name in tags.names if name not in named]
    matrix = np.zeros((len(examples), len(column)), np.int8)
    for row, example, of_one in zip(matrix, examples, labels, strict=True):
        if example.tags is not None:
            row[unnamed] = -1
        row[[column[name] for name in of_one.unclear]] = -1
        row[[column[name] for name in of_one.present]] = 1
    return matrix


def _in_place(caption: str) -> list[str]:
    return [word if _may_be_tag(word) else "" for word in tokenize(caption)]


def _inverse(forms: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    names: dict[str, list[str]] = defaultdict(list)
    for name, words in forms.items():
        for word in words:
            names[word].append(name)
    return {word: tuple(said) for word, said in names.items()}


def _with_labels(
    forms: Mapping[str, Sequence[str]], labels: Mapping[str, int]
) -> dict[str, list[str]]:
    """Return the forms with the names that sources give to tags among them.

    A tag that no caption says is called as most photographs have it.
    """
    by_form, found = _inverse(forms), {name: list(words) for name, words in forms.items()}
    strange: dict[str, dict[str, int]] = defaultdict(dict)
    for label, count in labels.items():
        text = " ".join(label.lower().split())
        if text not in by_form:
            known = by_form.get(singular(text))
            if known:
                found[known[0]].append(text)
            else:
                strange[singular(text)][label] = count
    for spellings in strange.values():
        name = min(spellings, key=lambda label: (-spellings[label], label))
        found[name] = list({" ".join(label.lower().split()) for label in spellings})
    return found
