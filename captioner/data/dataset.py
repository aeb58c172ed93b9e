"""Examples to batches."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captioner.config import Preprocessing
from captioner.data.example import Example
from captioner.data.sources import Part
from captioner.data.tags import TagSet
from captioner.data.tokenizer import tokenize
from captioner.data.vocabulary import BOS, PAD, Vocabulary
from captioner.photos.images import UnreadableError, augment, open_rgb, prepare, read_pixels

__all__ = ["Batch", "CaptionDataset", "Features", "PixelBatch", "batches", "pixel_batches"]

_MIRRORED = {"left": "right", "right": "left"}


class Batch(NamedTuple):
    """B photographs with K captions each; R = B·K, rows of one photograph together."""

    places: list[int]
    """Where each photograph stands in the data."""
    images: Tensor
    """Pixels ``(B, 3, h, w)``, uint8, or features ``(B, N, width)``."""
    words: Tensor
    """``(R, L)``: BOS, the words, EOS, then PAD; a photograph with fewer captions has PAD rows."""
    tags: Tensor
    """``(B, L)``: BOS, the tags, EOS, then PAD."""
    unreadable: dict[str, str]
    """Photographs that were left out, and why."""


class PixelBatch(NamedTuple):
    """Photographs alone: the places in the list of those that could be read, and of the rest."""

    places: list[int]
    pixels: Tensor
    """``(B, 3, h, w)``, uint8"""
    unreadable: dict[int, str]


class Features(NamedTuple):
    """An encoder's features of a list of photographs."""

    rows: np.ndarray
    """``(photographs, N, width)``, float16"""
    unreadable: dict[int, str]
    """Why a photograph has no features, by its place."""


class _Item(NamedTuple):
    place: int
    image: np.ndarray
    captions: list[list[int]]
    tags: list[int]


class CaptionDataset(Dataset["_Item | tuple[str, str]"]):
    """Examples with their captions and tags as ids.

    Images are pixels, or rows of ``features`` where those are set. ``augmentation`` is the seed
    of random views of the photographs, or ``None``. ``parts`` says how often an epoch shows which
    photographs; without it each is shown once.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        tags: TagSet,
        preprocessing: Preprocessing,
        max_words: int,
        parts: Sequence[Part] = (),
    ) -> None:
        """Split the captions, cut after ``max_words`` words, and look up their ids.

        Raises ``ValueError`` when the parts are not of as many photographs as there are examples.
        """
        self._parts = tuple(parts) or (Part(len(examples), 1.0),)
        if sum(part.photographs for part in self._parts) != len(examples):
            raise ValueError(f"{self._parts} are not of {len(examples)} photographs")
        self.paths = [str(example.image) for example in examples]
        # From the longest to the shortest: a decoder goes on with the first of them alone.
        words = [
            sorted((tokenize(caption) for caption in e.captions), key=len, reverse=True)
            for e in examples
        ]
        # A caption that is cut has no EOS, or the decoder would learn to end in the middle.
        limit = max_words + 1
        self._captions = [[vocabulary.encode(w)[:limit] for w in captions] for captions in words]
        self._mirrored = [
            [vocabulary.encode([_MIRRORED.get(v, v) for v in w])[:limit] for w in captions]
            for captions in words
        ]
        self._tags = [tags.vocabulary.encode(tags.of(example)) for example in examples]
        self._preprocessing = preprocessing
        self.features: Features | None = None
        self.augmentation: str | None = None

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    @property
    def epoch_size(self) -> int:
        """How many photographs an epoch shows; one that is shown twice counts twice."""
        return sum(part.shown for part in self._parts)

    def order(self, generator: torch.Generator) -> list[int]:
        """Return the ``epoch_size`` items of an epoch: the n-th showing of a photograph, from 0.

        It is item ``n * len(self)`` plus the photograph's place. What a part's weight leaves over
        is drawn from the generator, as is the order.
        """
        items: list[int] = []
        start = 0
        for part in self._parts:
            whole, rest = divmod(part.shown, part.photographs)
            for showing in range(whole):
                items += (showing * len(self) + start + i for i in range(part.photographs))
            if rest:
                drawn = torch.randperm(part.photographs, generator=generator)[:rest].tolist()
                items += (whole * len(self) + start + i for i in drawn)
            start += part.photographs
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    def __getitem__(self, item: int) -> _Item | tuple[str, str]:
        """Return one photograph's image and ids, or its path and why it cannot be read."""
        index = item % len(self)
        captions, tags = self._captions[index], self._tags[index]
        if self.features is not None:
            if index in self.features.unreadable:
                return self.paths[index], self.features.unreadable[index]
            return _Item(index, self.features.rows[index], captions, tags)
        try:
            image = open_rgb(self.paths[index], self._preprocessing.size)
        except UnreadableError as error:
            return self.paths[index], str(error)
        if self.augmentation is not None:
            # Seeded by place and showing, so that neither workers nor a resume change it.
            image, mirrored = augment(image, random.Random(f"{self.augmentation}/{item}"))
            captions = self._mirrored[index] if mirrored else captions
        return _Item(index, prepare(image, self._preprocessing), captions, tags)


class _Pixels(Dataset["tuple[int, np.ndarray | str]"]):
    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing) -> None:
        self._paths, self._preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str]:
        try:
            return index, read_pixels(self._paths[index], self._preprocessing)
        except UnreadableError as error:
            return index, str(error)


def pixel_batches(
    paths: Sequence[str], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[PixelBatch]:
    """Yield the photographs in order, ``batch_size`` at a time."""
    dataset = _Pixels(paths, preprocessing)
    return iter(
        DataLoader(
            dataset,
            batch_size,
            num_workers=workers,
            collate_fn=_collate_pixels,
            worker_init_fn=_serve_one,
            generator=torch.Generator(),  # or it would draw from the one that dropout uses
        )
    )


def _serve_one(_: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may reach all processes, to the one that is served.

    Only its own SIGTERM ends a worker. Where there is no telling whose it is, any does.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _collate_pixels(items: Sequence[tuple[int, np.ndarray | str]]) -> PixelBatch:
    read = [(place, image) for place, image in items if isinstance(image, np.ndarray)]
    unreadable = {place: image for place, image in items if isinstance(image, str)}
    pixels = np.stack([image for _, image in read]) if read else np.empty((0, 3, 1, 1), np.uint8)
    return PixelBatch([place for place, _ in read], torch.from_numpy(pixels), unreadable)


def batches(
    dataset: CaptionDataset,
    batch_size: int,
    seed: int,
    epoch: int,
    skip: int,
    workers: int,
    share: tuple[int, int, int] = (0, 1, 1),
) -> Iterator[Batch]:
    """Return the batches of one epoch after the first ``skip``.

    The order is a function of ``seed`` and ``epoch`` alone, so that a resumed run sees what an
    undisturbed one would. ``share`` is a process, the number of processes, and in how many parts
    the process reads its share of each batch; some may be empty.
    """
    rank, processes, parts = share
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = dataset.order(generator)
    steps = [order[i : i + batch_size][rank::processes] for i in range(0, len(order), batch_size)]
    shares = [step[part::parts] for step in steps[skip:] for part in range(parts)]
    return iter(
        DataLoader(
            dataset,
            batch_sampler=shares,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_serve_one,
            generator=generator,  # or it would draw from the one that dropout uses
        )
    )


def _collate(items: Sequence[_Item | tuple[str, str]]) -> Batch:
    kept = [item for item in items if isinstance(item, _Item)]
    unreadable = dict(item for item in items if not isinstance(item, _Item))
    most = max((len(item.captions) for item in kept), default=0)
    rows = [tokens for item in kept for tokens in _filled(item.captions, most)]
    images = np.stack([item.image for item in kept]) if kept else np.empty((0, 3, 1, 1), np.uint8)
    tags = [item.tags for item in kept]
    places = [item.place for item in kept]
    return Batch(places, torch.from_numpy(images), _padded(rows), _padded(tags), unreadable)


def _filled(captions: list[list[int]], most: int) -> list[list[int]]:
    return captions + [[]] * (most - len(captions))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    tokens = torch.full((len(rows), 1 + max(map(len, rows), default=0)), PAD)
    for row, ids in zip(tokens, rows, strict=True):
        row[0] = BOS
        row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens
