"""The tag vocabulary: which words are tags, which tags a photograph has, how sure a score is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import numpy as np

from captioner.data.example import Example
from captioner.data.tokenizer import stem, tokenize
from captioner.data.vocabulary import SPECIAL, Vocabulary

__all__ = ["Calibration", "TagSet", "content_words", "fit_calibration"]

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
    return [w for w in tokenize(caption) if w not in _NOT_TAGS and w[0].isalpha() and len(w) > 1]


class TagSet:
    """The tags a model knows, and how they are read off an example.

    A tag taken from captions stands for all words of one stem and is shown as the shortest of
    them that is not rare: "run" for "runs" and "running".
    """

    def __init__(
        self,
        names: Sequence[str],
        frequencies: Sequence[float] | None = None,
        min_captions: int = 2,
    ) -> None:
        """Take tag names, and the share of photographs that have each.

        ``min_captions`` is as in :meth:`of`. Raises ``ValueError`` for a share outside 0…1.
        """
        self.vocabulary = Vocabulary(names)
        self.frequencies = tuple(frequencies or [1.0] * len(names))
        self._min_captions = min_captions
        if len(self.frequencies) != len(names):
            raise ValueError(f"{len(self.frequencies)} frequencies for {len(names)} tags")
        for name, share in zip(names, self.frequencies, strict=True):
            if not 0.0 < share <= 1.0:
                raise ValueError(f"the frequency of the tag {name!r} is {share}")

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        # Only learning needs stems; whoever tags a photograph need not wait for them.
        return {stem(name): name for name in reversed(self.vocabulary.words[len(SPECIAL) :])}

    @cached_property
    def _rarity(self) -> dict[str, tuple[float, int]]:
        names = self.vocabulary.words[len(SPECIAL) :]
        shares = zip(names, self.frequencies, strict=True)
        return {name: (share, -place) for place, (name, share) in enumerate(shares)}

    def most_frequent(self, count: int) -> list[str]:
        """Return the tags that most photographs have."""
        rarity = self._rarity
        return sorted(rarity, key=rarity.__getitem__, reverse=True)[:count]

    @classmethod
    def build(cls, examples: Iterable[Example], size: int, min_count: int) -> TagSet:
        """Collect the tags that at least ``min_count`` photographs have, at most ``size``.

        Named objects are taken as they are; otherwise tags come from the captions' words.
        """
        photographs: Counter[str] = Counter()
        spellings: dict[str, Counter[str]] = defaultdict(Counter)
        examples = list(examples)
        for example in examples:
            found: dict[str, list[str]] = defaultdict(list)
            for key, word in _candidates(example):
                found[key].append(word)
            for key, words in found.items():
                photographs[key] += 1
                spellings[key].update(words)
        ranked = sorted(photographs.items(), key=lambda item: (-item[1], item[0]))
        shares: dict[str, float] = {}
        for key, count in ranked:
            if count >= min_count and len(shares) < size:
                shares.setdefault(_spelling(spellings[key]), count / len(examples))
        return cls(list(shares), list(shares.values()))

    def of(self, example: Example) -> list[str]:
        """Return the tags of an example in the order the decoder learns to write them.

        From captions: the words that at least ``min_captions`` of them use (or all, if there are
        fewer), the ones most captions agree on first, and of these the rarer first, since it
        says more. Named objects keep their order.
        """
        if example.tags is not None:
            return [name for name in dict.fromkeys(example.tags) if name in self.vocabulary]
        votes: Counter[str] = Counter()
        for caption in example.captions:
            votes.update({self._by_stem.get(stem(word), "") for word in content_words(caption)})
        del votes[""]
        needed = min(self._min_captions, len(example.captions))
        agreed = [name for name, count in votes.items() if count >= needed]
        return sorted(agreed, key=lambda name: (-votes[name], *self._rarity[name]))


def _candidates(example: Example) -> Iterator[tuple[str, str]]:
    if example.tags is not None:
        yield from ((name, name) for name in example.tags)
    else:
        words = (word for caption in example.captions for word in content_words(caption))
        yield from ((stem(word), word) for word in words)


def _spelling(counts: Counter[str]) -> str:
    common = [word for word, count in counts.items() if count >= 0.05 * counts.total()]
    return min(common, key=lambda word: (len(word), -counts[word], word))


class Calibration:
    """Platt scaling: the probability that a tag is right, from the decoder's probability.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines" (1999).
    """

    def __init__(self, slope: float = 1.0, offset: float = 0.0) -> None:
        """``score = sigmoid(slope * logit(p) + offset)``; the default leaves p as it is.

        Raises ``ValueError`` for numbers that are not finite, or so large that no fit gives them.
        """
        if not (abs(slope) <= 1e4 and abs(offset) <= 1e4):
            raise ValueError(f"the calibration {slope}, {offset} is out of range")
        self.slope, self.offset = slope, offset

    def __call__(self, log_prob: float) -> float:
        """Return the score in 0…1 of a tag that the decoder gave this log-probability."""
        return 1.0 / (1.0 + math.exp(-max(self.slope * _logit(log_prob) + self.offset, -700.0)))


def _logit(log_prob: float) -> float:
    p = min(max(math.exp(log_prob), 1e-6), 1.0 - 1e-6)
    return math.log(p / (1.0 - p))


def fit_calibration(log_probs: Sequence[float], right: Sequence[bool]) -> Calibration:
    """Fit Platt scaling to log-probabilities of tags and whether each was right.

    Newton's method, with steps halved until they help, on the log-likelihood with a weak pull
    towards the identity, so that it ends for any data; without data the identity comes back.
    """
    features = np.stack([[_logit(lp) for lp in log_probs], np.ones(len(log_probs))], axis=-1)
    labels = np.asarray(right, dtype=np.float64)
    identity = weights = np.array([1.0, 0.0])

    def loss(at: np.ndarray) -> float:
        z = features @ at
        return float(np.sum(np.logaddexp(0.0, z) - labels * z) + 0.5 * np.sum((at - identity) ** 2))

    for _ in range(30):
        p = 0.5 * (1.0 + np.tanh(0.5 * (features @ weights)))
        gradient = features.T @ (p - labels) + (weights - identity)
        hessian = features.T @ (features * (p * (1.0 - p))[:, None]) + np.eye(2)
        move = np.linalg.solve(hessian, gradient)
        while loss(weights - move) > loss(weights) and np.abs(move).max() > 1e-9:
            move /= 2.0
        weights = weights - move
    return Calibration(float(weights[0]), float(weights[1]))
