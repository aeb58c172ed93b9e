"""Karpathy's splits: one JSON file, in which each photograph names its split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from captioner.data.example import DataError, Example
from captioner.data.readers.entries import (
    field,
    load_json,
    objects,
    photograph_path,
)

__all__ = ["read_karpathy"]


def read_karpathy(captions: Path, images: Path, splits: Sequence[str]) -> list[Example]:
    """Read the photographs of the named splits ("train", "restval", "val", "test").

    Source: Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments" (2015), ``dataset_*.json``.
    Raises ``DataError`` for a file of another form, or when no photograph is in those splits.
    """
    examples: list[Example] = []
    ids: set[int] = set()
    for index, image in enumerate(objects(load_json(captions), "images", captions)):
        where = f"{captions}: images[{index}]"
        if field(image, "split", str, where) not in splits:
            continue
        folder = field(image, "filepath", str, where) if "filepath" in image else ""
        name = f"{folder}/{field(image, 'filename', str, where)}".lstrip("/")
        sentences = objects(image, "sentences", where)
        texts = tuple(field(sentence, "raw", str, where) for sentence in sentences)
        path = photograph_path(images, name, where)
        key = next((key for key in ("cocoid", "imgid") if key in image), None)
        image_id = index + 1 if key is None else field(image, key, int, where)
        if image_id in ids:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        ids.add(image_id)
        examples.append(Example(path, texts, image_id=image_id))
    if not examples:
        raise DataError(f"{captions}: no photograph is in the split {'+'.join(splits)!r}")
    return examples
