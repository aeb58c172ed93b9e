"""COCO's JSON: captions, and instances, whose categories are the tags."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from captioner.data.example import DataError, Example, ImageId
from captioner.data.readers.entries import (
    NULL_CAPTIONS,
    Annotations,
    Problems,
    as_number,
    load_text,
    objects,
    parsed,
)
from captioner.settings import shown

__all__ = ["read_coco"]

# VizWiz-Captions' marks: a stock phrase for a bad photograph, or a caption that reviewers refused.
_JUNK_MARKS = ("is_precanned", "is_rejected")
_ORPHANS = "annotations of images that are not listed, passed over"


def read_coco(captions: Path, data: Any, instances: Path | None = None) -> Annotations:
    """Read COCO captions and, for the tags, a COCO instances file of the same photographs.

    Tags are category names, the one that covers most of the photograph first. An image that no
    annotation is of has no captions. An annotation of an image that is not listed is passed over,
    and so is a caption that is null.
    Sources: Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data; Gurari et
    al., "Captioning Images Taken by People Who Are Blind" (2020), for the marks of junk.

    Args:
        captions: The captions file.
        data: What it holds.
        instances: The instances file.

    Raises:
        DataError: An entry cannot be used, no annotation is of a listed image, or the instances
            are of none of them.
    """
    problems = Problems(captions)
    names = _image_names(problems, objects(data, "images", captions))
    texts, junk = _captions(problems, objects(data, "annotations", captions), names)
    problems.check()
    tags = None if instances is None else _read_tags(instances)
    if tags is not None and not tags.keys() & names.keys():
        raise DataError(f"{instances}: no annotation is of an image of {captions}")
    examples = [
        Example(name, tuple(texts[i]), None if tags is None else tags.get(i, ()), i, tuple(junk[i]))
        for i, name in names.items()
    ]
    return Annotations(examples, problems.notes())


def _image_names(problems: Problems, images: list[dict[str, Any]]) -> dict[ImageId, Path]:
    """Return the name of each image by its id; ``Path()`` where it has none."""
    names: dict[ImageId, Path] = {}
    for index, image in enumerate(images):
        where = f"images[{index}]"
        image_id = problems.image_id(where, image, "id")
        # Captions are scored by ids alone, so that whoever needs a photograph asks for its name.
        named = image.get("file_name") is not None
        name = problems.name(where, image["file_name"]) if named else Path()
        if image_id in names:
            problems.add(where, f"the image id {shown(image_id)} stands twice")
        elif image_id is not None and name is not None:
            names[image_id] = name
    return names


def _captions(
    problems: Problems, annotations: list[dict[str, Any]], names: dict[ImageId, Path]
) -> tuple[dict[ImageId, list[str]], dict[ImageId, list[str]]]:
    """Return the captions of each image, and those that are marked as junk."""
    texts: dict[ImageId, list[str]] = defaultdict(list)
    junk: dict[ImageId, list[str]] = defaultdict(list)
    orphan = ""
    for index, annotation in enumerate(annotations):
        where = f"annotations[{index}]"
        image_id = problems.image_id(where, annotation, "image_id")
        if image_id is not None and image_id not in names:
            orphan = orphan or f"{where} is of {shown(annotation['image_id'])}"
            problems.count(where, _ORPHANS)
        elif annotation.get("caption", "") is None:
            problems.count(where, NULL_CAPTIONS)
        else:
            text = problems.text(where, annotation, "caption")
            if image_id is not None and text is not None:
                marked = any(annotation.get(mark) for mark in _JUNK_MARKS)
                (junk if marked else texts)[image_id].append(text)
    if orphan and not texts and not junk:
        first = shown(next(iter(names), None))
        problems.add("annotations", f"none is of a listed image: {orphan}, images[0] is {first}")
    return texts, junk


def _read_tags(path: Path) -> dict[ImageId, tuple[str, ...]]:
    """Return the names of the categories on each image, the one of the largest area first."""
    data, problems = parsed(load_text(path)), Problems(path)
    names: dict[ImageId, str] = {}
    for index, category in enumerate(objects(data, "categories", path)):
        category_id = problems.image_id(f"categories[{index}]", category, "id")
        name = problems.text(f"categories[{index}]", category, "name")
        if category_id is not None and name is not None:
            names[category_id] = name
    areas: dict[ImageId, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index, annotation in enumerate(objects(data, "annotations", path)):
        where = f"annotations[{index}]"
        image_id = problems.image_id(where, annotation, "image_id")
        category_id = problems.image_id(where, annotation, "category_id")
        # An object without an area comes last.
        area = 0.0 if annotation.get("area") is None else as_number(annotation["area"])
        if area is None:
            problems.wrong(where, "area", annotation, "a finite number")
        elif category_id is not None and category_id not in names:
            problems.add(where, f"no category has the id {shown(category_id)}")
        elif image_id is not None and category_id is not None:
            areas[image_id][names[category_id]] += area
    problems.check()
    return {
        image_id: tuple(sorted(counts, key=lambda name: (-counts[name], name)))
        for image_id, counts in areas.items()
    }
