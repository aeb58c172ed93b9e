"""What every model does for a caller, whatever computes it: images in, captions and tags out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from captioner.config import Preprocessing
from captioner.generation.description import Caption, Description, Tag
from captioner.generation.options import SearchOptions, TagOptions, with_options
from captioner.photos.given import Pixels, batches

__all__ = ["Describer"]

Image = TypeVar("Image")


class Describer(ABC, Generic[Image]):
    """A model that captions and tags images: a ``Captioner``, or an ``OnnxCaptioner``.

    Its ``encode`` takes pixels to "grids", whatever they are, which the ``…_of`` methods take.
    """

    precision: Any
    """The number type of its products."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How photographs become pixels."""

    @abstractmethod
    def digest(self) -> str:
        """Return the start of a hash of all that the answers depend on but the precision."""

    @abstractmethod
    def check(self, options: SearchOptions) -> None:
        """Raise ``ConfigError`` if captions cannot be searched so."""

    @abstractmethod
    def check_tags(self, options: TagOptions) -> None:
        """Raise ``ConfigError`` if the options have tags or a precision that the model has not."""

    @abstractmethod
    def check_confidence(self, least: float) -> None:
        """Raise ``ConfigError`` unless captions can be judged by the least confidence, 0 to 1."""

    @abstractmethod
    def pixels(self, image: Image) -> Pixels:
        """Return an image as the pixels ``(3, h, w)`` that the model takes.

        Raises ``UnreadableError`` for a file that cannot be read, ``TypeError`` or
        ``ValueError`` for what is no image.
        """

    @abstractmethod
    def encode(self, pixels: Sequence[Pixels]) -> Any:
        """Return the grids of prepared pixels."""

    @abstractmethod
    def scores_of(self, grids: Any) -> Any:
        """Return the scores of all tags of each image, as the other methods take them."""

    @abstractmethod
    def captions_of(
        self,
        grids: Any,
        options: SearchOptions | None = None,
        attention: bool = False,
        tag_scores: Any = None,
    ) -> list[list[Caption]]:
        """Return the captions of each image, best first."""

    @abstractmethod
    def tags_of(
        self, grids: Any, options: TagOptions | None = None, tag_scores: Any = None
    ) -> list[list[Tag]]:
        """Return the tags of each image, best first."""

    def caption(
        self, images: Iterable[Image], options: SearchOptions | None = None, **search: Any
    ) -> list[Caption]:
        """Return the best caption of each image.

        ``search`` names single options: ``caption(images, beam_size=5)``. Raises ``TypeError`` for
        one that does not exist, and ``ConfigError`` as :meth:`check` raises it.
        """
        options = with_options(options, search)
        grids = self._grids(images)
        return [captions[0] for grid in grids for captions in self.captions_of(grid, options)]

    def tags(
        self,
        images: Iterable[Image],
        threshold: float | None = None,
        max_tags: int | None = None,
        only: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> list[list[Tag]]:
        """Return the tags of each image, best first.

        Args:
            images: The images.
            threshold: The lowest score, 0…1, of a tag that is given. ``None`` takes the model's
                own, or, in a model of version 0.1, all tags that it writes. For a precision take
                ``threshold_for``.
            max_tags: The most tags of an image; ``None`` is all.
            only: Names of ``tag_names``, of which alone any are given.
            exclude: Names that are not given.

        Raises:
            ConfigError: A name is none of the model's, or a number is out of range.
        """
        options = TagOptions(
            threshold, max_tags=max_tags or 0, only=tuple(only or ()), exclude=tuple(exclude or ())
        )
        self.check_tags(options)
        return [tags for grids in self._grids(images) for tags in self.tags_of(grids, options)]

    def describe(
        self,
        images: Iterable[Image],
        options: SearchOptions | None = None,
        threshold: float | None = None,
        attention: bool = False,
        progress: Callable[[int], object] = lambda done: None,
        **search: Any,
    ) -> list[Description]:
        """Return captions and tags of each image from one pass of the encoder.

        Args:
            images: As for all methods.
            options: How captions are searched; the library's defaults if there are none.
            threshold: The lowest score of a tag, as in :meth:`tags`.
            attention: Whether captions have attention weights.
            progress: Told after each image how many are done; 32 go through the model at a time.
            search: Single options, as for :meth:`caption`.

        Raises:
            ConfigError: As :meth:`check` and :meth:`encode` raise it.
            ImageError: An image cannot be read.
            TypeError: There is no such option.
        """
        options = with_options(options, search)
        described: list[Description] = []
        for grids in self._grids(images):
            scores = self.scores_of(grids)
            written = self.captions_of(grids, options, attention, scores)
            named = self.tags_of(grids, TagOptions(threshold), scores)
            for captions, tags in zip(written, named, strict=True):
                described.append(Description(captions[0], captions, tags))
                progress(len(described))
        return described

    def _grids(self, images: Iterable[Image]) -> Iterator[Any]:
        """Yield the grids of images, of at most 32 at a time."""
        return map(self.encode, batches(images, self.pixels))
