"""What a run learns from: the sources that its config names, read and weighed. No torch here."""

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

__all__ = ["Data", "Part", "Source", "read_data", "read_sources"]

_NAMED = 20


class Part(NamedTuple):
    """Photographs that stand together in the data, and how often an epoch shows each."""

    photographs: int
    weight: float

    @property
    def shown(self) -> int:
        """How many an epoch shows, the same in every epoch: at least one."""
        return max(1, round(self.photographs * self.weight))


@dataclass(frozen=True)
class Source:
    """One source as it was read: its captioned photographs, junk captions included.

    ``missing`` and ``uncaptioned`` say why each of its other photographs is not among them, and
    ``notes`` what is odd about its files.
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
    """The two splits of a run, without junk captions in training and missing photographs.

    ``parts`` divides ``train`` by its sources, in order.
    """

    train: list[Example]
    val: list[Example]
    notes: list[str]
    parts: tuple[Part, ...]

    def digest(self) -> str:
        """Return a hash of every path, caption and tag."""
        everything = repr((self.train, self.val)).encode("utf-8", "surrogateescape")
        return hashlib.sha256(everything).hexdigest()


def read_data(config: Config) -> Data:
    """Read both splits of a config.

    ``notes`` says what was dropped. Raises ``DataError`` when a split cannot be used,
    ``ConfigError`` when the config does not say where it is.
    """
    sources, val = read_sources(config.data)
    notes = [note for source in (*sources, val) for note in _notes(source)]
    train: list[Example] = []
    parts: list[Part] = []
    dropped = 0
    for source in sources:
        kept, junk = drop_junk(source.examples)
        if not kept:
            raise DataError(f"{source.captions}: all {junk} captions are junk")
        train += kept
        parts.append(Part(len(kept), source.weight))
        dropped += junk
    notes.append(f"train: {dropped} junk captions dropped")
    if any(part.weight != 1.0 for part in parts):
        notes.append(f"train: {sum(part.shown for part in parts)} photographs an epoch")
    # Candidates are compared with what people wrote, all of it.
    return Data(train, val.examples, notes, tuple(parts))


def _notes(source: Source) -> Iterator[str]:
    yield from (f"{source.name}: {printable(note)}" for note in source.notes)
    left_out = source.uncaptioned | source.missing
    for path, why in islice(left_out.items(), _NAMED):
        yield f"{source.name}: left out {printable(path)}: {printable(why)}"
    without = f", {len(left_out)} left out" if left_out else ""
    yield f"{source.name}: {len(source.examples)} photographs{without}"


def read_sources(data: DataConfig) -> tuple[list[Source], Source]:
    """Read the sources to train on, and the one to validate on; raises as :func:`read_data`."""
    if data.sources:
        named = [(f"data.sources.{n}", source) for n, source in enumerate(data.sources)]
    else:
        named = [("data", DataSource(data.images, data.captions, data.instances, data.split))]
    for place, source in named:
        _check_set(source, f"{place}.")
    if not data.val_captions and not data.val_split:
        raise ConfigError("data.val_captions or data.val_split must say what to validate on")
    val = DataSource(
        data.val_images or data.images,
        data.val_captions or data.captions,
        data.val_instances or data.instances,
        data.val_split,
    )
    _check_set(val, "data.val_")
    several = len(named) > 1
    train = [_read(f"train, {place}" if several else "train", source) for place, source in named]
    return train, _read("val", val)


def _check_set(source: DataSource, place: str) -> None:
    for key in ("images", "captions"):
        if not getattr(source, key):
            raise ConfigError(f"{place}{key} is not set; say where with --set {place}{key}=…")


def _read(name: str, source: DataSource) -> Source:
    instances = Path(source.instances) if source.instances else None
    images, captions = Path(source.images), Path(source.captions)
    loaded = readers.load(captions, images, source.split, instances)
    return Source(name, source.captions, source.weight, *loaded)
