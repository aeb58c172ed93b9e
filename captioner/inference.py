"""``Captioner``: the library's front door."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captioner.config import Preprocessing
from captioner.data.vocabulary import SPECIAL
from captioner.files import as_json
from captioner.generation.captions import token_rules, write_captions
from captioner.generation.confidence import with_confidence
from captioner.generation.describer import Describer
from captioner.generation.description import Caption, NotFiniteError, Tag
from captioner.generation.options import SearchOptions, TagOptions
from captioner.generation.tags import Tagger
from captioner.memory import freed_memory_is_kept
from captioner.model.checkpoint import Checkpoint, default_path, load_checkpoint
from captioner.model.device import choose_device, choose_precision, own_settings
from captioner.model.encoder import Encoder
from captioner.photos.given import Pixels, batches, pixels_of
from captioner.settings import ConfigError

__all__ = ["Captioner", "ImageLike", "calibrate"]

# Four photographs of 224 x 224. What glibc is given back it keeps only up to 32 MB, and a larger
# tensor is mapped anew, page by page: with 32 photographs at once the encoder takes 1.4 times as
# long, with two threads 1.7 times. A program may keep all (``keep_freed_memory``), a library not.
_PIXELS_AT_ONCE = 4 * 224 * 224

ImageLike = str | os.PathLike[str] | Image.Image | Tensor | Pixels | bytes | BinaryIO


class Captioner(Describer[ImageLike]):
    """A model that captions and tags images.

    An image is a path, a ``PIL.Image.Image``, a ``(3, h, w)`` uint8 tensor, an ``(h, w, 3)`` uint8
    array in RGB, the bytes of a file, or a file that is open in binary. Methods take a list of
    them, or a batch as one tensor or array, and return a list, one entry an image, in order. They
    raise ``TypeError`` for a bare string or image, and ``ImageError`` (with ``index`` and ``path``)
    for an image that cannot be read. A URL is such an image: nothing is downloaded.

    A model computes under its own default dtype, default device and autocast, whatever the caller's
    are. In a process that was forked after a model had been loaded, torch computes in one thread. A
    server whose processes need more threads each starts them without a fork ("spawn").
    """

    @own_settings()
    def __init__(
        self,
        checkpoint: Checkpoint | Sequence[Checkpoint],
        device: torch.device | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        """Put loaded checkpoints to use; :meth:`load` is the usual way in.

        ``precision`` is that of the products: ``torch.int8`` for the encoder's convolutions in 8
        bits. Raises ``ConfigError`` for an ensemble whose members do not fit each other, and for
        int8 with a checkpoint that was not calibrated for it.
        """
        self.checkpoints = [checkpoint] if isinstance(checkpoint, Checkpoint) else list(checkpoint)
        _check_ensemble(self.checkpoints)
        self.device = device or torch.device("cpu")
        self.precision = precision
        self._process = os.getpid()
        # In int8 all but the encoder's convolutions is computed in float32.
        rounded = torch.float32 if precision == torch.int8 else precision
        # Before the weights are rounded to the precision. What the file holds stays in the model.
        ready = [_for_inference(checkpoint, precision) for checkpoint in self.checkpoints]
        self.encoders = [encoder.to(self.device, rounded) for encoder in ready]
        self._models = [c.model.to(self.device, rounded).eval() for c in self.checkpoints]
        self.decoders = [model.caption_decoder.packed() for model in self._models]
        self._tagger = Tagger(self.checkpoints)

    def __repr__(self) -> str:
        """Return what tells one model from another, and where it computes."""
        first, count = self.checkpoint, len(self.checkpoints)
        words, tags = len(first.vocabulary) - len(SPECIAL), len(self.tag_names)
        models = "" if count == 1 else f"{count} models, "
        precision = str(self.precision).removeprefix("torch.")
        return (
            f"<Captioner: {models}{first.config.encoder.name}, {words:,} words, {tags:,} tags, "
            f"{precision} on {self.device}>"
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The only checkpoint, or the first of an ensemble."""
        return self.checkpoints[0]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
    ) -> Captioner:
        """Load a checkpoint, or the model inside the package, or several as an ensemble.

        The members of an ensemble must have the same vocabularies and preprocessing; their
        log-probabilities are averaged. Raises ``CheckpointError`` for a file that is no
        checkpoint (nothing in it is executed), ``ConfigError`` for a device or precision that
        cannot be had and for members that do not fit each other.
        """
        chosen = choose_device(device)
        if path is None:
            path = default_path()
        paths = [path] if isinstance(path, str | os.PathLike) else path
        checkpoints = [load_checkpoint(Path(file)) for file in paths]
        calibrated = all(checkpoint.ranges is not None for checkpoint in checkpoints)
        return cls(checkpoints, chosen, choose_precision(precision, chosen, calibrated))

    @property
    def tag_names(self) -> tuple[str, ...]:
        """The names of all T tags that the model knows."""
        return self.checkpoint.tags.names

    def tag_scores(self, images: Iterable[ImageLike]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the probability of each of :attr:`tag_names` for each image: ``(B, T)``.

        A model of version 0.1 has scores for the tags that it writes, and 0 for the others.
        """
        rows = [self.scores_of(grids).float().cpu().numpy() for grids in self._grids(images)]
        return np.concatenate([np.zeros((0, len(self.tag_names)), np.float32), *rows])

    def threshold_for(self, precision: float) -> float:
        """Return the lowest score whose tags had a precision, 0…1, on the validation photographs.

        Raises ``ConfigError`` where the model never reached it.
        """
        return self._tagger.threshold(TagOptions(min_precision=precision))

    def pixels(self, image: ImageLike) -> Pixels:
        """Return an image as the pixels ``(3, h, w)`` that the encoder takes.

        Raises ``UnreadableError`` for a file that cannot be read, ``TypeError`` or
        ``ValueError`` for what is no image.
        """
        return pixels_of(_plain(image), self.preprocessing)

    @property
    def preprocessing(self) -> Preprocessing:
        """How photographs become pixels."""
        return self.checkpoint.config.preprocessing

    def digest(self) -> str:
        """Return the start of a hash of all that the answers depend on but the precision."""
        digest = hashlib.sha256()
        for checkpoint in self.checkpoints:
            words, tags = checkpoint.vocabulary.words, checkpoint.tags.names
            scale = checkpoint.calibration.slope, checkpoint.calibration.offset
            scoring = checkpoint.scoring and asdict(checkpoint.scoring)
            sure = checkpoint.confidence and checkpoint.confidence.weights
            shares = checkpoint.tags.frequencies
            head: list[object] = [
                asdict(checkpoint.config),
                scale,
                scoring,
                sure,
                words,
                tags,
                shares,
            ]
            head += [] if checkpoint.ranges is None else [checkpoint.ranges]
            digest.update(as_json(head))
            for name, tensor in sorted(checkpoint.model.state_dict().items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                # Rounded, so that the digest is the same in either precision.
                digest.update(tensor.detach().cpu().bfloat16().float().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, options: SearchOptions) -> None:
        """Raise ``ConfigError`` if the options have words that the model does not know."""
        token_rules(options, self.checkpoint.vocabulary)

    @own_settings()
    @torch.inference_mode()
    def encode(self, pixels: Sequence[Pixels]) -> tuple[Tensor, ...]:
        """Return the grid ``(B, N, D)`` of prepared pixels, one for each checkpoint.

        Raises ``NotFiniteError`` where the weights are damaged, and ``RuntimeError`` in a process
        that was forked after the model had been loaded onto another device than the CPU.
        """
        if self._process != os.getpid() and self.device.type != "cpu":
            raise RuntimeError(
                f"this Captioner was loaded onto {self.device} before the process was forked, and "
                "cannot be used in it: load it in each process"
            )
        batch = torch.from_numpy(np.stack(pixels)).to(self.device)
        grids = tuple(
            model.project(torch.cat([encoder(part) for part in self._parts(batch)]))
            for model, encoder in zip(self._models, self.encoders, strict=True)
        )
        if not all(bool(grid.isfinite().all()) for grid in grids):
            raise NotFiniteError
        return grids

    def _parts(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Return a batch in as many parts as the encoder takes it in."""
        if self.device.type != "cpu" or freed_memory_is_kept():
            return (batch,)
        return torch.split(batch, max(1, _PIXELS_AT_ONCE // batch[0, 0].numel()))

    @own_settings()
    def captions_of(
        self,
        grids: Sequence[Tensor],
        options: SearchOptions | None = None,
        attention: bool = False,
        tag_scores: Tensor | None = None,
    ) -> list[list[Caption]]:
        """Return the captions of each image of the grids, best first.

        Args:
            grids: From :meth:`encode`.
            options: How captions are searched; there are ``options.num_captions`` of an image,
                unless fewer satisfy the options.
            attention: Whether captions have attention weights.
            tag_scores: From :meth:`scores_of`, where they are known already: a caption's
                confidence also comes from the tags.

        Raises:
            NotFiniteError: The weights are damaged.
        """
        written = write_captions(
            self.decoders,
            self.checkpoint.vocabulary,
            grids,
            options or SearchOptions(),
            attention,
        )
        confidences = [checkpoint.confidence for checkpoint in self.checkpoints]
        if None in confidences:
            return written
        rows = (self.scores_of(grids) if tag_scores is None else tag_scores).float().cpu().numpy()
        return [
            with_confidence(of_one, confidences, self.checkpoint.tags, row)
            for of_one, row in zip(written, rows, strict=True)
        ]

    def check_confidence(self, least: float) -> None:
        """Raise ``ConfigError`` unless captions can be judged by the least confidence, 0 to 1."""
        if not 0.0 <= least <= 1.0:
            raise ConfigError(f"min_confidence is {least}; it takes 0 to 1")
        if least > 0.0 and None in [checkpoint.confidence for checkpoint in self.checkpoints]:
            raise ConfigError(
                f"min_confidence is {least}, but the model gives captions no confidence: take "
                "another checkpoint, or train its tags anew (configs/tags.toml), which fits it"
            )

    def check_tags(self, options: TagOptions) -> None:
        """Raise ``ConfigError`` if the options have tags or a precision that the model has not."""
        self._tagger.check(options)

    @own_settings()
    @torch.inference_mode()
    def scores_of(self, grids: Sequence[Tensor]) -> Tensor:
        """Return the scores ``(B, T)`` of all tags of each image of the grids."""
        return self._tagger.scores(grids)

    @own_settings()
    @torch.inference_mode()
    def tags_of(
        self,
        grids: Sequence[Tensor],
        options: TagOptions | None = None,
        tag_scores: Tensor | None = None,
    ) -> list[list[Tag]]:
        """Return the tags of each image of the grids, best first.

        ``tag_scores`` are those of :meth:`scores_of`, where they are known already.
        """
        scores = self.scores_of(grids) if tag_scores is None else tag_scores
        return self._tagger.choose(scores, options or TagOptions())

    def _grids(self, images: Iterable[ImageLike]) -> Iterator[tuple[Tensor, ...]]:
        if isinstance(images, Tensor) and images.ndim == 4:
            images = list(images)
        return map(self.encode, batches(images, self.pixels, Tensor))


def _for_inference(checkpoint: Checkpoint, precision: torch.dtype) -> Encoder:
    """Return a checkpoint's encoder as it is quickest: folded and, if it is asked for, in int8."""
    encoder = checkpoint.model.encoder
    if precision != torch.int8:
        return encoder.folded()
    if checkpoint.ranges is None:
        raise ConfigError("the checkpoint was not calibrated for int8 (export.py --calibration)")
    return encoder.in_int8(checkpoint.ranges)


@own_settings()
def calibrate(checkpoint: Checkpoint, images: Iterable[ImageLike]) -> None:
    """Give a checkpoint the ranges of activations that int8 takes, from a few hundred images.

    Raises ``ConfigError`` for another encoder than an EfficientNet-Lite, or without an image, and
    ``ImageError`` for an image that cannot be read.
    """
    preprocessing, encoder = checkpoint.config.preprocessing, checkpoint.model.encoder
    read = batches(images, lambda image: pixels_of(_plain(image), preprocessing), Tensor)
    prepared = [torch.from_numpy(np.stack(batch)) for batch in read]
    if not prepared:
        raise ConfigError("a calibration takes a photograph, or better a few hundred")
    checkpoint.ranges = encoder.observed(prepared)


def _check_ensemble(checkpoints: Sequence[Checkpoint]) -> None:
    if not checkpoints:
        raise ConfigError("an ensemble takes at least one checkpoint")
    first = checkpoints[0]
    for number, other in enumerate(checkpoints[1:], start=2):
        for what, ours, theirs in (
            ("words", first.vocabulary.words, other.vocabulary.words),
            ("tags", first.tags.vocabulary.words, other.tags.vocabulary.words),
            ("preprocessing", first.config.preprocessing, other.config.preprocessing),
        ):
            if ours != theirs:
                raise ConfigError(f"checkpoint {number} of the ensemble has other {what}")


def _plain(image: ImageLike) -> ImageLike:
    """Return a tensor as a picture, and everything else as it is."""
    if not isinstance(image, Tensor):
        return image
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        shape = f"{tuple(image.shape)} {image.dtype}"
        raise ValueError(f"expected a tensor (3, h, w) of torch.uint8, not {shape}")
    return Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
