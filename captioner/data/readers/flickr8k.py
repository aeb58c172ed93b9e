"""Flickr8k's ``token.txt`` and its split lists."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from captioner.data.example import DataError, Example
from captioner.data.readers.entries import (
    numbered_lines,
    photograph_path,
)

__all__ = ["read_flickr8k"]


def read_flickr8k(captions: Path, images: Path, split: Path | None = None) -> list[Example]:
    """Read Flickr8k's ``token.txt`` (``NAME.jpg#0<TAB>caption``) for the names on a split list.

    Source: Hodosh, Young and Hockenmaier, JAIR 47 (2013). Raises ``DataError`` for a line of
    another form, or a name on the split list that has no caption.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for number, line in numbered_lines(captions):
        key, tab, caption = line.partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            raise DataError(f"{captions}:{number}: expected NAME#N<TAB>caption, found {line!r}")
        texts[name].append(caption.strip())
    if split is None:
        names = [(str(captions), name) for name in texts]
    else:
        names = [(f"{split}:{number}", line.strip()) for number, line in numbered_lines(split)]
    for where, name in names:
        if name not in texts:
            raise DataError(f"{where}: {name!r} has no caption in {captions}")
    return [
        Example(photograph_path(images, name, where), tuple(texts[name]), image_id=number)
        for number, (where, name) in enumerate(names, 1)
    ]
