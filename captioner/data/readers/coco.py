"""COCO's JSON: captions, instances (whose categories are the tags), and results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captioner.data.example import DataError, Example
from captioner.data.readers.entries import (
    field,
    load_json,
    objects,
    photograph_path,
)

__all__ = ["pair_results", "read_coco", "read_results"]


def read_coco(captions: Path, images: Path, instances: Path | None = None) -> list[Example]:
    """Read a COCO captions file and, for the tags, a COCO instances file of the same photographs.

    Tags are category names, the one that covers most of the photograph first. An image that no
    annotation is of has no captions.
    Source: Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data.
    Raises ``DataError`` for a file that is not of that form, an annotation of an unknown image, or
    instances of none of the photographs.
    """
    data = load_json(captions)
    if isinstance(data, dict) and "annotations" not in data and _is_karpathy(data.get("images")):
        raise DataError(f"{captions}: is of Karpathy's form; say which split, such as 'train'")
    paths: dict[int, Path] = {}
    for index, image in enumerate(objects(data, "images", captions)):
        where = f"{captions}: images[{index}]"
        image_id = field(image, "id", int, where)
        if image_id in paths:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        paths[image_id] = photograph_path(images, image.get("file_name"), where)
    texts: dict[int, list[str]] = defaultdict(list)
    for index, annotation in enumerate(objects(data, "annotations", captions)):
        where = f"{captions}: annotations[{index}]"
        image_id = field(annotation, "image_id", int, where)
        if image_id not in paths:
            raise DataError(f"{where}: no image has the id {image_id}")
        texts[image_id].append(field(annotation, "caption", str, where))
    tags = None if instances is None else _coco_tags(instances)
    if instances is not None and tags is not None and not tags.keys() & paths.keys():
        raise DataError(f"{instances}: no annotation is of an image of {captions}")
    return [
        Example(path, tuple(texts[i]), None if tags is None else tags.get(i, ()), i)
        for i, path in paths.items()
    ]


def _is_karpathy(images: Any) -> bool:
    return isinstance(images, list) and any("sentences" in i for i in images if isinstance(i, dict))


def _coco_tags(path: Path) -> dict[int, tuple[str, ...]]:
    data = load_json(path)
    names: dict[int, str] = {}
    for index, category in enumerate(objects(data, "categories", path)):
        where = f"{path}: categories[{index}]"
        names[field(category, "id", int, where)] = field(category, "name", str, where)
    # Whoever writes instances alone may leave the images out.
    listed = objects(data, "images", path) if "images" in data else None
    known = {field(i, "id", int, f"{path}: images[{n}]") for n, i in enumerate(listed or ())}
    areas: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index, annotation in enumerate(objects(data, "annotations", path)):
        where = f"{path}: annotations[{index}]"
        category_id = field(annotation, "category_id", int, where)
        if category_id not in names:
            raise DataError(f"{where}: no category has the id {category_id}")
        image_id = field(annotation, "image_id", int, where)
        if listed is not None and image_id not in known:
            raise DataError(f"{where}: no image has the id {image_id}")
        area = field(annotation, "area", (int, float), where) if "area" in annotation else 0.0
        areas[image_id][names[category_id]] += area
    return {
        image_id: tuple(sorted(counts, key=lambda name: (-counts[name], name)))
        for image_id, counts in areas.items()
    }


def read_results(path: Path) -> dict[int, str]:
    """Read a COCO results file, ``[{"image_id", "caption"}]``: the caption of each image id.

    Raises ``DataError`` for a file of another form, or an image id that stands twice.
    """
    entries = load_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected a list of objects with 'image_id' and 'caption'")
    captions: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: [{index}]"
        image_id = field(entry, "image_id", int, where)
        if image_id in captions:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        captions[image_id] = field(entry, "caption", str, where)
    return captions


def pair_results(
    results: Path, captions: Path, subset: bool = False
) -> tuple[list[Example], list[str]]:
    """Return the photographs of a COCO captions file, and their captions in a results file.

    With ``subset`` only those that the results file has. Raises ``DataError`` for an image id of
    either file that the other does not have.
    """
    written = read_results(results)
    examples = [example for example in read_coco(captions, Path()) if example.captions]
    unknown = sorted(written.keys() - {example.image_id for example in examples})
    if unknown:
        raise DataError(f"{results}: {captions} has no caption of {_listed(unknown)}")
    missing = [e.image_id for e in examples if e.image_id not in written and e.image_id is not None]
    if missing and not subset:
        raise DataError(
            f"{captions}: {results} has no caption for {_listed(missing)}; "
            "with --subset only the images of the results are scored"
        )
    paired = [e for e in examples if e.image_id in written]
    if not paired:
        raise DataError(f"{results}: holds no caption of an image of {captions}")
    return paired, [written[e.image_id] for e in paired if e.image_id is not None]


def _listed(image_ids: Sequence[int]) -> str:
    others = f" and {len(image_ids) - 1} more" if len(image_ids) > 1 else ""
    return f"the image id {image_ids[0]}{others}"
