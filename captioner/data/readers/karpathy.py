"""Karpathy's splits: one JSON file, in which each photograph names its split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.data.example import DataError, Example, ImageId
from captioner.data.readers.entries import NULL_CAPTIONS, Annotations, Problems, objects
from captioner.settings import shown

__all__ = ["is_karpathy", "read_karpathy"]


def is_karpathy(data: Any) -> bool:
    """Whether the value of a JSON file is of this form: images that have sentences."""
    if not isinstance(data, dict) or "annotations" in data:
        return False
    images = data.get("images")
    return isinstance(images, list) and any("sentences" in i for i in images if isinstance(i, dict))


def read_karpathy(captions: Path, data: Any, splits: Sequence[str]) -> Annotations:
    """Read the photographs of the named splits ("train", "restval", "val", "test").

    Source: Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments" (2015), ``dataset_*.json``.
    Raises ``DataError`` for entries of another form, or when no photograph is in those splits.
    """
    problems = Problems(captions)
    examples: list[Example] = []
    ids: set[ImageId | None] = set()
    for index, image in enumerate(objects(data, "images", captions)):
        where = f"images[{index}]"
        split = problems.text(where, image, "split")
        if split not in splits:
            continue
        example = _example(captions, problems, where, image)
        if example.image_id is not None and example.image_id in ids:
            problems.add(where, f"the image id {shown(example.image_id)} stands twice")
        ids.add(example.image_id)
        examples.append(example)
    problems.check()
    if not examples:
        raise DataError(f"{captions}: no photograph is in the split {'+'.join(splits)!r}")
    return Annotations(examples, problems.notes())


def _example(captions: Path, problems: Problems, where: str, image: dict[str, Any]) -> Example:
    folder = image.get("filepath")
    if folder is not None and not isinstance(folder, str):
        problems.wrong(where, "filepath", image, "a text")
    name = f"{folder or ''}/{problems.text(where, image, 'filename') or ''}".lstrip("/")
    path = problems.name(where, name) if isinstance(image.get("filename"), str) else None
    key = next((key for key in ("cocoid", "imgid") if image.get(key) is not None), None)
    image_id = None if key is None else problems.image_id(where, image, key)
    texts: list[str] = []
    for number, sentence in enumerate(objects(image, "sentences", f"{captions}: {where}")):
        inner = f"{where}: sentences[{number}]"
        if sentence.get("raw", "") is None:
            problems.count(inner, NULL_CAPTIONS)
        elif (text := problems.text(inner, sentence, "raw")) is not None:
            texts.append(text)
    return Example(path or Path(), tuple(texts), image_id=image_id)
