"""The sources that a config names: read, weighed and put together. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from captioner.config import Config, DataConfig, DataSource
from captioner.data import readers
from captioner.data.example import DataError, Example, drop_junk
from captioner.files import printable
from captioner.settings import ConfigError

__all__ = ["Data", "Source", "Subset", "read_data", "read_sources"]

_LISTED = 20  # photographs that are named in notes


class Subset(NamedTuple):
    """A run of consecutive examples that have one weight.

    An epoch shows each of the ``size`` photographs ``weight`` times, on average.
    """

    size: int
    weight: float

    @property
    def shown_per_epoch(self) -> int:
        """Return how many photographs an epoch shows: the same number in each, and at least one."""
        return max(1, round(self.size * self.weight))


@dataclass(frozen=True)
class Source:
    """One source as it was read: its captioned photographs, junk captions included.

    ``missing`` and ``uncaptioned`` say why each other photograph of the source was left out.
    ``notes`` holds the oddities of its files.
    """

    name: str
    captions: str
    weight: float
    examples: list[Example]
    missing: dict[str, str]
    uncaptioned: dict[str, str]
    notes: list[str]


@dataclass(frozen=True)
class Data:
    """The two splits of a run.

    Neither has missing photographs, and ``train`` has no junk captions. ``subsets`` divides
    ``train`` by its sources, in order.
    """

    train: list[Example]
    val: list[Example]
    notes: list[str]
    subsets: tuple[Subset, ...]

    def digest(self) -> str:
        """Return a hash of every path, caption and tag."""
        everything = repr((self.train, self.val)).encode("utf-8", "surrogateescape")
        return hashlib.sha256(everything).hexdigest()


def read_data(config: Config) -> Data:
    """Read both splits of a config.

    The notes of the result say what was dropped. Raises ``DataError`` when a split cannot be used,
    and ``ConfigError`` when the config does not say where the split is.
    """
    sources, val = read_sources(config.data)
    notes = [note for source in (*sources, val) for note in _notes(source)]
    train: list[Example] = []
    subsets: list[Subset] = []
    dropped = 0
    for source in sources:
        useful, junk = drop_junk(source.examples)
        if not useful:
            raise DataError(f"{source.captions}: all {junk} captions are junk")
        train += useful
        subsets.append(Subset(len(useful), source.weight))
        dropped += junk
    notes.append(f"train: {dropped} junk captions dropped")
    if any(subset.weight != 1.0 for subset in subsets):
        shown = sum(subset.shown_per_epoch for subset in subsets)
        notes.append(f"train: {shown} photographs an epoch")
    # Candidates are compared with all references that people wrote, junk included.
    return Data(train, val.examples, notes, tuple(subsets))


def _notes(source: Source) -> Iterator[str]:
    yield from (f"{source.name}: {printable(note)}" for note in source.notes)
    left_out = source.uncaptioned | source.missing
    for path, why in islice(left_out.items(), _LISTED):
        yield f"{source.name}: left out {printable(path)}: {printable(why)}"
    without = f", {len(left_out)} left out" if left_out else ""
    yield f"{source.name}: {len(source.examples)} photographs{without}"


def read_sources(data: DataConfig) -> tuple[list[Source], Source]:
    """Read the training sources and the validation source; raises as :func:`read_data`."""
    if data.sources:
        keyed = [(f"data.sources.{n}", source) for n, source in enumerate(data.sources)]
    else:
        keyed = [("data", DataSource(data.images, data.captions, data.instances, data.split))]
    for key, source in keyed:
        _check_set(source, f"{key}.")
    if not data.val_captions and not data.val_split:
        raise ConfigError("data.val_captions or data.val_split must say what to validate on")
    val = DataSource(
        data.val_images or data.images,
        data.val_captions or data.captions,
        data.val_instances or data.instances,
        data.val_split,
    )
    _check_set(val, "data.val_")
    several = len(keyed) > 1
    train = [_read(f"train, {key}" if several else "train", source) for key, source in keyed]
    return train, _read("val", val)


def _check_set(source: DataSource, prefix: str) -> None:
    for name in ("images", "captions"):
        if not getattr(source, name):
            key = f"{prefix}{name}"
            raise ConfigError(f"{key} is not set; say where with --set {key}=…")


def _read(name: str, source: DataSource) -> Source:
    instances = Path(source.instances) if source.instances else None
    images, captions = Path(source.images), Path(source.captions)
    loaded = readers.load(captions, images, source.split, instances)
    return Source(name, source.captions, source.weight, *loaded)
