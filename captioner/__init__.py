"""captioner: what is on photographs, in words and in tags.

>>> from captioner import Captioner
>>> captioner = Captioner.load()
>>> captioner.caption(["dog.jpg"])  # doctest: +SKIP
[Caption(text='a dog runs along the beach', log_prob=-6.81, finished=True)]

Shapes in docstrings use these letters: B images, K beams (or captions) an image, R = B·K rows,
N grid cells, D grid width, A attention width, E embedding, H hidden, L positions, V vocabulary,
T tags; pixels are ``(B, 3, h, w)``.

The public names are resolved when they are first used, so that importing the package does not
import torch; nothing here sets a global torch flag, seed, thread count or log handler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from captioner.version import __version__ as __version__

if TYPE_CHECKING:
    from captioner.generation.description import Caption, Description, Tag
    from captioner.generation.options import SearchOptions, TagOptions
    from captioner.inference import Captioner
    from captioner.photos.images import ImageError

__all__ = [
    "Caption",
    "Captioner",
    "Description",
    "ImageError",
    "SearchOptions",
    "Tag",
    "TagOptions",
]

_HOMES = {
    "Caption": "generation.description",
    "Captioner": "inference",
    "Description": "generation.description",
    "ImageError": "photos.images",
    "SearchOptions": "generation.options",
    "Tag": "generation.description",
    "TagOptions": "generation.options",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
