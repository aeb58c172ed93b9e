"""``Captioner``: the library's front door."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioner.checkpoint import Checkpoint, default_path, load_checkpoint
from captioner.config import SearchOptions
from captioner.generation import Caption, Tag, write_captions, write_tags
from captioner.images import ImageError, UnreadableError, open_rgb, prepare, to_rgb
from captioner.model import choose_device, choose_precision

__all__ = [
    "Captioner",
    "Description",
    "ImageLike",
]

ImageLike = str | os.PathLike[str] | Image.Image | Tensor
_BATCH = 32


class Description(NamedTuple):
    """What is on one photograph; ``captions`` has the best first, and it is ``caption``."""

    caption: Caption
    captions: list[Caption]
    tags: list[Tag]


class Captioner:
    """A model that captions and tags images.

    An image is a path, a ``PIL.Image.Image`` or a ``(3, h, w)`` uint8 tensor. Methods take a
    list of them and return a list, one entry an image, in order. They raise ``TypeError`` for a
    bare string or image, and ``ImageError`` (with ``index`` and ``path``) for an image that
    cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Put a loaded checkpoint to use; :meth:`load` is the usual way in."""
        self.checkpoint = checkpoint
        self.device = device or torch.device("cpu")
        self.precision = precision
        self._model = checkpoint.model.to(self.device, precision).eval()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
    ) -> Captioner:
        """Load a checkpoint, or the model inside the package.

        Raises ``CheckpointError`` for a file that is no checkpoint (nothing in it is executed),
        ``ConfigError`` for a device or precision that cannot be had.
        """
        chosen = choose_device(device)
        number_type = choose_precision(precision, chosen)
        file = default_path() if path is None else Path(path)
        return cls(load_checkpoint(file), chosen, number_type)

    def caption(
        self, images: Iterable[ImageLike], options: SearchOptions | None = None
    ) -> list[Caption]:
        """Return the best caption of each image."""
        grids = self._grids(images)
        return [captions[0] for grid in grids for captions in self.captions_of(grid, options)]

    def tags(self, images: Iterable[ImageLike], threshold: float | None = None) -> list[list[Tag]]:
        """Return the tags of each image, best first; ``threshold`` as in :meth:`tags_of`."""
        return [tags for grid in self._grids(images) for tags in self.tags_of(grid, threshold)]

    def describe(
        self,
        images: Iterable[ImageLike],
        options: SearchOptions | None = None,
        threshold: float | None = None,
    ) -> list[Description]:
        """Return captions and tags of each image from one pass of the encoder."""
        return [
            Description(captions[0], captions, tags)
            for grid in self._grids(images)
            for captions, tags in zip(
                self.captions_of(grid, options), self.tags_of(grid, threshold), strict=True
            )
        ]

    def pixels(self, image: ImageLike) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return an image as the pixels ``(3, h, w)`` that the encoder takes.

        Raises ``UnreadableError`` for a file that cannot be read, ``TypeError`` or
        ``ValueError`` for what is no image.
        """
        preprocessing = self.checkpoint.config.preprocessing
        return prepare(_open(image, preprocessing.size), preprocessing)

    @torch.inference_mode()
    def encode(self, pixels: Sequence[np.ndarray[Any, np.dtype[np.uint8]]]) -> Tensor:
        """Return the grid ``(B, N, D)`` of prepared pixels."""
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        return self._model.encode(batch)

    def captions_of(
        self, grid: Tensor, options: SearchOptions | None = None
    ) -> list[list[Caption]]:
        """Return ``options.num_captions`` captions of each image of a grid, best first."""
        return write_captions(
            self._model.caption_decoder,
            self.checkpoint.vocabulary,
            grid,
            options or SearchOptions(),
        )

    def tags_of(self, grid: Tensor, threshold: float | None = None) -> list[list[Tag]]:
        """Return the tags of each image of a grid, best first.

        ``threshold`` drops tags whose score, 0…1, is lower; ``None`` keeps all that were found.
        """
        checkpoint = self.checkpoint
        found = write_tags(self._model.tag_decoder, checkpoint.tags, checkpoint.calibration, grid)
        if threshold is None:
            return found
        return [[tag for tag in tags if tag.score >= threshold] for tags in found]

    def _grids(self, images: Iterable[ImageLike]) -> Iterator[Tensor]:
        if isinstance(images, str | bytes | os.PathLike | Image.Image | Tensor):
            shown = repr(images) if isinstance(images, str) else type(images).__name__
            raise TypeError(f"expected a list of images, not one; write [{shown}]")
        numbered = enumerate(images)
        while batch := [self._numbered(i, image) for i, image in islice(numbered, _BATCH)]:
            yield self.encode(batch)

    def _numbered(self, index: int, image: ImageLike) -> np.ndarray[Any, np.dtype[np.uint8]]:
        try:
            return self.pixels(image)
        except UnreadableError as error:
            path = os.fsdecode(image) if isinstance(image, str | os.PathLike) else None
            raise ImageError(str(error), index, path) from error


def _open(image: ImageLike, size: int) -> Image.Image:
    if isinstance(image, Image.Image):
        try:
            return to_rgb(image)
        except Exception as error:  # Pillow reads lazily, so any damage shows only here
            raise UnreadableError(str(error)) from error
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            shape = f"{tuple(image.shape)} {image.dtype}"
            raise ValueError(f"expected a tensor (3, h, w) of torch.uint8, not {shape}")
        return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    if isinstance(image, str | os.PathLike):
        return open_rgb(image, size)
    raise TypeError(f"expected a path, a PIL image or a tensor, not {type(image).__name__}")
