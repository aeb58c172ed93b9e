"""The audit of a data set before training: its problems and its cost. No torch here.

Two photographs are the same where the encoder gets the same pixels, whatever their names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from statistics import quantiles

from tqdm import tqdm

from captioner.config import Config, DataConfig, Preprocessing
from captioner.data.example import Example, is_junk
from captioner.data.names import MISSING
from captioner.data.sources import Source, read_sources
from captioner.data.tokenizer import tokenize
from captioner.data.vocabulary import Vocabulary
from captioner.files import printable
from captioner.photos.images import UnreadableError, read_pixels
from captioner.photos.workers import Found, read_ahead

__all__ = ["Audit", "Coverage", "SplitAudit", "audit", "summary"]

_SHOWN = 5
# So many photographs with one caption are worth a look; people rarely agree so often by chance.
_MANY = 10
_TIMEOUT = 30.0


@dataclass(frozen=True)
class SplitAudit:
    """The size of a split, and its problems."""

    name: str
    photographs: int
    """The number of photographs with captions and a file."""
    captions: int
    missing: dict[str, str]
    """Captioned photographs that are not there, and why."""
    uncaptioned: list[str]
    broken: dict[str, str]
    """Photographs that cannot be opened, and why."""
    duplicates: list[list[str]]
    """Groups of photographs that are the same; a photograph that stands twice is a group too."""
    junk: list[tuple[str, str]]
    """Photographs with a caption that says nothing, or that the data marks as useless."""
    shared: list[tuple[str, int]]
    """Other captions that many photographs share word for word, and the number of these."""
    notes: list[str]
    """Oddities of the annotation files, such as names that are not spelled as the files are."""
    lengths: dict[int, int]
    """The number of captions of each length in words; junk is not counted."""


@dataclass(frozen=True)
class Coverage:
    """The part of the validation captions that the vocabulary of the training captions covers."""

    words: int
    """The size of the vocabulary, special words included."""
    share_of_words: float
    share_of_captions: float
    """The share of the captions of which every word is in the vocabulary."""
    unknown: list[tuple[str, int]]
    """The most frequent words outside the vocabulary, and how often each stands."""


@dataclass(frozen=True)
class Audit:
    """The findings about both splits of a data set."""

    train: SplitAudit
    val: SplitAudit
    leaks: list[tuple[list[str], list[str]]]
    """Training photographs, and the validation photographs that are the same."""
    coverage: Coverage
    pixel_bytes: int
    """The bytes of one photograph at the size of the preprocessing."""
    feature_bytes: int
    """The bytes of one photograph in the feature cache."""

    @property
    def problems(self) -> int:
        """The number of photographs and captions that are useless or spoil the scores."""
        of_splits = sum(
            len(s.missing) + len(s.uncaptioned) + len(s.broken) + len(s.junk) + _extra(s.duplicates)
            for s in (self.train, self.val)
        )
        return of_splits + sum(len(val) for _, val in self.leaks)


def audit(config: Config, feature_bytes: int, workers: int) -> Audit:
    """Audit both splits of a config. Every photograph is opened.

    Args:
        config: The config of a training run.
        feature_bytes: The size of the encoder's features of one photograph.
        workers: The number of processes that open photographs.

    Raises:
        DataError: As :func:`captioner.data.sources.read_data`.
        ConfigError: As :func:`captioner.data.sources.read_data`.
        DecodingError: No process could be started.
    """
    train, val = read_sources(config.data)
    examples = [e for source in (*train, val) for e in source.examples]
    paths = list(dict.fromkeys(str(example.image) for example in examples))
    fingerprints, broken = _open_all(paths, config.preprocessing, workers)
    train_words, val_words = _words(train), _words([val])
    in_train, in_val = _by_content(train, fingerprints), _by_content([val], fingerprints)
    return Audit(
        _split("train", train, train_words, in_train, broken),
        _split("val", [val], val_words, in_val, broken),
        [(paths, in_val[content]) for content, paths in in_train.items() if content in in_val],
        _coverage(train_words, val_words, config.data),
        3 * config.preprocessing.size**2,
        feature_bytes,
    )


def _fingerprint(preprocessing: Preprocessing, path: str) -> bytes:
    return sha256(read_pixels(path, preprocessing).tobytes()).digest()


def _open_all(
    paths: Sequence[str], preprocessing: Preprocessing, workers: int
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return a hash of each photograph's pixels, and why the others cannot be opened."""
    fingerprints: dict[str, bytes] = {}
    broken: dict[str, str] = {}
    photographs = tqdm(map(Found, paths), "opening", len(paths), unit="photo", disable=None)
    read = partial(_fingerprint, preprocessing)
    for path, found in read_ahead(read, photographs, workers, 8 * workers, _TIMEOUT):
        if isinstance(found, UnreadableError):
            broken[path] = str(found)
        else:
            fingerprints[path] = found
    return fingerprints, broken


def _words(sources: Sequence[Source]) -> list[list[str]]:
    """Return the words of every caption that is not junk."""
    captions = (c for source in sources for e in source.examples for c in e.captions)
    return [tokenize(caption) for caption in captions if not is_junk(caption)]


def _by_content(
    sources: Sequence[Source], fingerprints: Mapping[str, bytes]
) -> dict[bytes, list[str]]:
    """Return the paths of the photographs with each content."""
    paths: dict[bytes, list[str]] = defaultdict(list)
    for source in sources:
        for path in (str(example.image) for example in source.examples):
            if path in fingerprints:
                paths[fingerprints[path]].append(path)
    return dict(paths)


def _split(
    name: str,
    sources: Sequence[Source],
    words: Sequence[Sequence[str]],
    by_content: Mapping[bytes, list[str]],
    broken: Mapping[str, str],
) -> SplitAudit:
    examples = [example for source in sources for example in source.examples]
    paths = dict.fromkeys(str(example.image) for example in examples)
    captions = [(str(e.image), c) for e in examples for c in e.captions]
    marked = [(str(e.image), c) for e in examples for c in e.junk]
    return SplitAudit(
        name,
        len(examples),
        len(captions),
        {path: why for source in sources for path, why in source.missing.items()},
        [path for source in sources for path in source.uncaptioned],
        {path: broken[path] for path in paths if path in broken},
        [same for same in by_content.values() if len(same) > 1],
        [(path, caption) for path, caption in captions if is_junk(caption)] + marked,
        _shared(examples),
        [note for source in sources for note in source.notes],
        dict(sorted(Counter(map(len, words)).items())),
    )


def _shared(examples: Sequence[Example]) -> list[tuple[str, int]]:
    """Return the captions of many photographs, whatever their case and punctuation."""
    photographs = Counter(
        caption
        for example in examples
        for caption in {" ".join(tokenize(c)) for c in example.captions if not is_junk(c)}
    )
    return [(caption, count) for caption, count in photographs.most_common() if count >= _MANY]


def _coverage(
    train: Sequence[Sequence[str]], val: Sequence[Sequence[str]], data: DataConfig
) -> Coverage:
    vocabulary = Vocabulary.build(train, data.vocabulary_size, data.min_count)
    unknown = Counter(word for caption in val for word in caption if word not in vocabulary)
    total = sum(map(len, val))
    whole = sum(all(word in vocabulary for word in caption) for caption in val)
    return Coverage(
        len(vocabulary),
        1.0 - unknown.total() / max(total, 1),
        whole / max(len(val), 1),
        unknown.most_common(_SHOWN),
    )


def _extra(duplicates: Sequence[Sequence[str]]) -> int:
    return sum(len(same) - 1 for same in duplicates)


def summary(found: Audit, data: DataConfig) -> Iterator[str]:
    """Yield the lines for a person: the number of problems of each kind, and the first few."""
    for split in (found.train, found.val):
        yield f"{split.name}: {split.photographs:,} photographs, {split.captions:,} captions"
        yield from (f"  {printable(note)}" for note in split.notes)
        yield from _photograph_lines(split)
        yield from _caption_lines(split, data.max_words)
        pixels, features = (
            f"{split.photographs * size / 1e9:.3g} GB of {what} ({size:,} bytes each)"
            for what, size in (("pixels", found.pixel_bytes), ("features", found.feature_bytes))
        )
        yield f"  memory: {pixels}, {features}"
    leaks = [f"{_same(train)} (train) = {_same(val)} (val)" for train, val in found.leaks]
    yield from _listed("leaks from val into train", len(leaks), leaks, "")
    yield from _coverage_lines(found.coverage, data)
    yield f"problems found: {found.problems:,}"


def _photograph_lines(split: SplitAudit) -> Iterator[str]:
    missing = [path if why == MISSING else f"{path}: {why}" for path, why in split.missing.items()]
    yield from _listed("missing photographs", len(missing), missing)
    yield from _listed("photographs without a caption", len(split.uncaptioned), split.uncaptioned)
    reasons = [f"{path}: {why}" for path, why in split.broken.items()]
    yield from _listed("broken photographs", len(reasons), reasons)
    yield from _listed(
        "duplicate photographs", _extra(split.duplicates), [_same(s) for s in split.duplicates]
    )


def _caption_lines(split: SplitAudit, max_words: int) -> Iterator[str]:
    junk = [f"{path}: {caption!r}" for path, caption in split.junk]
    yield from _listed("junk captions", len(junk), junk)
    shared = [f"{caption!r}: {count:,} photographs" for caption, count in split.shared]
    yield from _listed(f"captions that {_MANY} photographs or more share", len(shared), shared)
    lengths = list(Counter(split.lengths).elements())
    if len(lengths) > 1:
        cuts = quantiles(lengths, n=20, method="inclusive")
        cut = sum(length > max_words for length in lengths) / len(lengths)
        yield (
            f"  lengths of captions: {lengths[0]} to {lengths[-1]} words, median {cuts[9]:.0f}, "
            f"nine in ten {cuts[0]:.0f} to {cuts[18]:.0f}"
        )
        yield f"  longer than data.max_words ({max_words}): {100 * cut:.1f} % of captions"


def _coverage_lines(coverage: Coverage, data: DataConfig) -> Iterator[str]:
    yield (
        f"vocabulary: {coverage.words:,} words (data.min_count is {data.min_count}, "
        f"data.vocabulary_size {data.vocabulary_size:,})"
    )
    yield (
        f"  it has {100 * coverage.share_of_words:.1f} % of the words of val's captions, "
        f"and all words of {100 * coverage.share_of_captions:.1f} % of them"
    )
    if coverage.unknown:
        yield f"  most frequent others: {', '.join(f'{w} ({n})' for w, n in coverage.unknown)}"


def _listed(what: str, count: int, entries: Sequence[str], indent: str = "  ") -> Iterator[str]:
    yield f"{indent}{what}: {count:,}"
    yield from (f"{indent}    {printable(entry)}" for entry in entries[:_SHOWN])
    if len(entries) > _SHOWN:
        yield f"{indent}    and {len(entries) - _SHOWN:,} more"


def _same(paths: Sequence[str]) -> str:
    counts = Counter(paths)
    return " = ".join(path if n == 1 else f"{path} ({n} times)" for path, n in counts.items())
