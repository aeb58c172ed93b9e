"""Examples to batches of pixels, or features, and token ids."""

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
from captioner.data.sources import Subset
from captioner.data.tags import TagSet, label_matrix
from captioner.data.tokenizer import tokenize
from captioner.data.vocabulary import BOS, EOS, PAD, SPECIAL, Vocabulary
from captioner.photos.augmentation import augment
from captioner.photos.colour import to_srgb
from captioner.photos.images import UnreadableError, open_photograph, prepare, read_pixels

__all__ = ["Batch", "CaptionDataset", "Features", "PixelBatch", "batches", "pixel_batches"]

_MIRRORED = {"left": "right", "right": "left"}


class Batch(NamedTuple):
    """B photographs with K captions each; R = B·K rows, those of one photograph together."""

    indices: list[int]
    """The index of each photograph in the data set."""
    images: Tensor
    """Pixels ``(B, 3, h, w)``, uint8, or features ``(B, N, width)``."""
    words: Tensor
    """``(R, L)``: BOS, the words, EOS, then PAD. Rows beyond a photograph's captions are PAD."""
    tags: Tensor
    """``(B, V)`` of int8, V of the tag vocabulary: 1 for a tag that a photograph has, 0 for one
    that it has not, and -1 where nobody knows, as for the special words but EOS."""
    unreadable: dict[str, str]
    """Why each photograph that was left out could not be read, by its path."""


class PixelBatch(NamedTuple):
    """The pixels of photographs from a list."""

    indices: list[int]
    """The index in the list of each photograph that could be read."""
    pixels: Tensor
    """``(B, 3, h, w)``, uint8"""
    unreadable: dict[int, str]
    """Why each other photograph of the batch could not be read, by its index."""


class Features(NamedTuple):
    """An encoder's features of a list of photographs."""

    rows: np.ndarray
    """``(photographs, N, width)``, float16"""
    unreadable: dict[int, str]
    """Why a photograph has no features, by its index."""


class _Item(NamedTuple):
    photo_index: int
    image: np.ndarray
    captions: list[list[int]]
    tags: np.ndarray


class CaptionDataset(Dataset["_Item | tuple[str, str]"]):
    """Examples with their captions and tags as token ids.

    Images are pixels, or rows of ``features`` where these are set. ``augmentation`` is the seed of
    random augmentations of the photographs, or ``None``.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        vocabulary: Vocabulary,
        tags: TagSet,
        preprocessing: Preprocessing,
        max_words: int,
        subsets: Sequence[Subset] = (),
    ) -> None:
        """Tokenize the captions and look up the ids of their words.

        Args:
            examples: The photographs with their captions.
            vocabulary: The words of captions.
            tags: The tags.
            preprocessing: How photographs become pixels.
            max_words: The most words of a caption; the others are cut off.
            subsets: How often an epoch shows which of the examples; by default each once.

        Raises:
            ValueError: The subsets have more or fewer photographs than there are examples.
        """
        self._subsets = tuple(subsets) or (Subset(len(examples), 1.0),)
        if sum(subset.size for subset in self._subsets) != len(examples):
            raise ValueError(f"{self._subsets} are not of {len(examples)} photographs")
        self.paths = [str(example.image) for example in examples]
        # The longest caption first: the decoder drops rows from the end as captions end.
        words = [
            sorted((tokenize(caption) for caption in e.captions), key=len, reverse=True)
            for e in examples
        ]
        # A caption that is cut off has no EOS, or the decoder would learn to end in the middle.
        limit = max_words + 1
        self._captions = [[vocabulary.encode(w)[:limit] for w in captions] for captions in words]
        self._mirrored = [
            [vocabulary.encode([_MIRRORED.get(v, v) for v in w])[:limit] for w in captions]
            for captions in words
        ]
        self._tags = np.full((len(examples), len(tags.vocabulary)), -1, np.int8)
        self._tags[:, EOS] = 0
        start = 0
        for subset in self._subsets:
            source = slice(start, start + subset.size)
            self._tags[source, len(SPECIAL) :] = label_matrix(tags, examples[source])
            start += subset.size
        self._preprocessing = preprocessing
        self.features: Features | None = None
        self.augmentation: str | None = None

    def __len__(self) -> int:
        """Return the number of photographs."""
        return len(self.paths)

    @property
    def epoch_size(self) -> int:
        """Return how many photographs an epoch shows; one that is shown twice counts twice."""
        return sum(subset.shown_per_epoch for subset in self._subsets)

    def order(self, generator: torch.Generator) -> list[int]:
        """Return the ``epoch_size`` items of an epoch in random order.

        Item ``n * len(self) + index`` is the n-th time, from 0, that the photograph at ``index`` is
        shown. Where a weight is no whole number, the photographs that are shown once more are drawn
        from the generator.
        """
        items: list[int] = []
        start = 0
        for subset in self._subsets:
            whole, rest = divmod(subset.shown_per_epoch, subset.size)
            for repeat in range(whole):
                items += (repeat * len(self) + start + i for i in range(subset.size))
            if rest:
                drawn = torch.randperm(subset.size, generator=generator)[:rest].tolist()
                items += (whole * len(self) + start + i for i in drawn)
            start += subset.size
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    def __getitem__(self, item: int) -> _Item | tuple[str, str]:
        """Return the image and the ids of a photograph, or its path and why it cannot be read."""
        index = item % len(self)
        captions, tags = self._captions[index], self._tags[index]
        if self.features is not None:
            if index in self.features.unreadable:
                return self.paths[index], self.features.unreadable[index]
            return _Item(index, self.features.rows[index], captions, tags)
        try:
            image = open_photograph(self.paths[index], self._preprocessing.size).image
        except UnreadableError as error:
            return self.paths[index], str(error)
        if self.augmentation is not None:
            # Seeded by the item, so that neither workers nor a resumed run change the view.
            image, mirrored = augment(to_srgb(image), random.Random(f"{self.augmentation}/{item}"))
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
            generator=torch.Generator(),  # the default one is the generator of dropout
        )
    )


def _serve_one(_: int) -> None:
    """Let a worker ignore Ctrl-C and SIGTERM, which may reach all processes of a run.

    The process that the worker serves answers them. Only a SIGTERM from that process ends the
    worker. Where the sender of a signal cannot be told, every SIGTERM does.
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
    read = [(index, image) for index, image in items if isinstance(image, np.ndarray)]
    unreadable = {index: image for index, image in items if isinstance(image, str)}
    pixels = np.stack([image for _, image in read]) if read else np.empty((0, 3, 1, 1), np.uint8)
    return PixelBatch([index for index, _ in read], torch.from_numpy(pixels), unreadable)


def batches(
    dataset: CaptionDataset,
    batch_size: int,
    seed: int,
    epoch: int,
    skip: int,
    workers: int,
    share: tuple[int, int, int] = (0, 1, 1),
) -> Iterator[Batch]:
    """Return the micro-batches of a process in one epoch.

    Their order is a function of ``seed`` and ``epoch`` alone, so that a resumed run sees the same
    batches as an undisturbed one.

    Args:
        dataset: The photographs.
        batch_size: The photographs of a step over all processes.
        seed: The seed of the run.
        epoch: The number of the epoch.
        skip: How many steps are left out at the beginning of the epoch.
        workers: The number of worker processes that read photographs.
        share: The rank of the process, the number of processes, and the number of micro-batches
            that each process makes of its share of a step. Some of them may be empty.
    """
    rank, processes, micro_batches = share
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = dataset.order(generator)
    steps = [order[i : i + batch_size][rank::processes] for i in range(0, len(order), batch_size)]
    shares = [step[i::micro_batches] for step in steps[skip:] for i in range(micro_batches)]
    return iter(
        DataLoader(
            dataset,
            batch_sampler=shares,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_serve_one,
            generator=generator,  # the default one is the generator of dropout
        )
    )


def _collate(items: Sequence[_Item | tuple[str, str]]) -> Batch:
    read = [item for item in items if isinstance(item, _Item)]
    unreadable = dict(item for item in items if not isinstance(item, _Item))
    most = max((len(item.captions) for item in read), default=0)
    rows = [tokens for item in read for tokens in _filled(item.captions, most)]
    images = np.stack([item.image for item in read]) if read else np.empty((0, 3, 1, 1), np.uint8)
    tags = np.stack([item.tags for item in read]) if read else np.empty((0, 0), np.int8)
    indices = [item.photo_index for item in read]
    return Batch(
        indices, torch.from_numpy(images), _padded(rows), torch.from_numpy(tags), unreadable
    )


def _filled(captions: list[list[int]], most: int) -> list[list[int]]:
    return captions + [[]] * (most - len(captions))


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    tokens = torch.full((len(rows), 1 + max(map(len, rows), default=0)), PAD)
    for row, ids in zip(tokens, rows, strict=True):
        row[0] = BOS
        row[1 : 1 + len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens
