"""Annotation files to examples: COCO, Karpathy's splits, Flickr8k, JSONL and CSV."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from captioner.csv_cells import csv_tags, csv_text

__all__ = [
    "DataError",
    "Example",
    "drop_junk",
    "drop_missing",
    "is_junk",
    "load",
    "pair_results",
    "read",
    "read_coco",
    "read_csv",
    "read_flickr8k",
    "read_jsonl",
    "read_karpathy",
    "read_results",
]

# What annotators wrote when the photograph did not load, or when they had nothing to say.
_JUNK_PHRASES = re.compile(
    r"\b(broken image|image not (?:found|available|loading)|no image (?:found|available|here)|"
    r"(?:photo|picture|image) (?:is )?(?:unavailable|missing)|does not load|did not load|"
    r"cannot see (?:the )?(?:image|picture|photo)|unable to see)\b",
    re.IGNORECASE,
)


class DataError(ValueError):
    """An annotation file that cannot be used; the message names the file and the entry."""


@dataclass(frozen=True)
class Example:
    """One photograph with its captions, as its annotation file has it.

    ``tags`` is ``None`` where the data names no objects; tags then come from the captions.
    ``image_id`` is the data's own, or the place in it from 1.
    """

    image: Path
    captions: tuple[str, ...]
    tags: tuple[str, ...] | None = None
    image_id: int | None = None


def is_junk(caption: str) -> bool:
    """Whether a caption says nothing: at most two words, or a phrase such as "broken image"."""
    words = [word for word in caption.split() if re.search(r"\w", word)]
    return len(words) <= 2 or _JUNK_PHRASES.search(caption) is not None


def drop_junk(examples: Iterable[Example]) -> tuple[list[Example], int]:
    """Return the examples without their junk captions, and how many captions were dropped.

    An example that has no caption left is dropped with them.
    """
    kept: list[Example] = []
    dropped = 0
    for example in examples:
        captions = tuple(c for c in example.captions if not is_junk(c))
        dropped += len(example.captions) - len(captions)
        if captions:
            kept.append(replace(example, captions=captions))
    return kept, dropped


def drop_missing(examples: Iterable[Example]) -> tuple[list[Example], list[Path]]:
    """Return the examples whose photograph is there, and the paths of those that are not."""
    kept: list[Example] = []
    missing: list[Path] = []
    for example in examples:
        if example.image.is_file():
            kept.append(example)
        else:
            missing.append(example.image)
    return kept, missing


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def _inside(folder: Path, name: object, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: expected the name of a photograph, found {name!r}")
    # A link inside the folder is its owner's doing, not the file's: it may lead anywhere.
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r} leaves the image folder")
    return folder / name


def _entries(data: Any, key: str, where: object) -> list[dict[str, Any]]:
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{where}: expected an object with a list {key!r} of objects")
    return entries


def _field(entry: Mapping[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} is {value!r}")
    return value


def read_coco(captions: Path, images: Path, instances: Path | None = None) -> list[Example]:
    """Read a COCO captions file and, for the tags, a COCO instances file of the same photographs.

    Tags are category names, the one that covers most of the photograph first. An image that no
    annotation is of has no captions.
    Source: Lin et al., "Microsoft COCO" (2014), https://cocodataset.org/#format-data.
    Raises ``DataError`` for a file that is not of that form, an annotation of an unknown image, or
    instances of none of the photographs.
    """
    data = _load_json(captions)
    if isinstance(data, dict) and "annotations" not in data and _is_karpathy(data.get("images")):
        raise DataError(f"{captions}: is of Karpathy's form; say which split, such as 'train'")
    paths: dict[int, Path] = {}
    for index, image in enumerate(_entries(data, "images", captions)):
        where = f"{captions}: images[{index}]"
        image_id = _field(image, "id", int, where)
        if image_id in paths:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        paths[image_id] = _inside(images, image.get("file_name"), where)
    texts: dict[int, list[str]] = defaultdict(list)
    for index, annotation in enumerate(_entries(data, "annotations", captions)):
        where = f"{captions}: annotations[{index}]"
        image_id = _field(annotation, "image_id", int, where)
        if image_id not in paths:
            raise DataError(f"{where}: no image has the id {image_id}")
        texts[image_id].append(_field(annotation, "caption", str, where))
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
    data = _load_json(path)
    names: dict[int, str] = {}
    for index, category in enumerate(_entries(data, "categories", path)):
        where = f"{path}: categories[{index}]"
        names[_field(category, "id", int, where)] = _field(category, "name", str, where)
    # Whoever writes instances alone may leave the images out.
    listed = _entries(data, "images", path) if "images" in data else None
    known = {_field(i, "id", int, f"{path}: images[{n}]") for n, i in enumerate(listed or ())}
    areas: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for index, annotation in enumerate(_entries(data, "annotations", path)):
        where = f"{path}: annotations[{index}]"
        category_id = _field(annotation, "category_id", int, where)
        if category_id not in names:
            raise DataError(f"{where}: no category has the id {category_id}")
        image_id = _field(annotation, "image_id", int, where)
        if listed is not None and image_id not in known:
            raise DataError(f"{where}: no image has the id {image_id}")
        area = _field(annotation, "area", (int, float), where) if "area" in annotation else 0.0
        areas[image_id][names[category_id]] += area
    return {
        image_id: tuple(sorted(counts, key=lambda name: (-counts[name], name)))
        for image_id, counts in areas.items()
    }


def read_results(path: Path) -> dict[int, str]:
    """Read a COCO results file, ``[{"image_id", "caption"}]``: the caption of each image id.

    Raises ``DataError`` for a file of another form, or an image id that stands twice.
    """
    entries = _load_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"{path}: expected a list of objects with 'image_id' and 'caption'")
    captions: dict[int, str] = {}
    for index, entry in enumerate(entries):
        where = f"{path}: [{index}]"
        image_id = _field(entry, "image_id", int, where)
        if image_id in captions:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        captions[image_id] = _field(entry, "caption", str, where)
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


def read_flickr8k(captions: Path, images: Path, split: Path | None = None) -> list[Example]:
    """Read Flickr8k's ``token.txt`` (``NAME.jpg#0<TAB>caption``) for the names on a split list.

    Source: Hodosh, Young and Hockenmaier, JAIR 47 (2013). Raises ``DataError`` for a line of
    another form, or a name on the split list that has no caption.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for number, line in _lines(captions):
        key, tab, caption = line.partition("\t")
        name, hash_sign, _ = key.rpartition("#")
        if not tab or not hash_sign:
            raise DataError(f"{captions}:{number}: expected NAME#N<TAB>caption, found {line!r}")
        texts[name].append(caption.strip())
    if split is None:
        names = [(str(captions), name) for name in texts]
    else:
        names = [(f"{split}:{number}", line.strip()) for number, line in _lines(split)]
    for where, name in names:
        if name not in texts:
            raise DataError(f"{where}: {name!r} has no caption in {captions}")
    return [
        Example(_inside(images, name, where), tuple(texts[name]), image_id=number)
        for number, (where, name) in enumerate(names, 1)
    ]


def read_karpathy(captions: Path, images: Path, splits: Sequence[str]) -> list[Example]:
    """Read the photographs of the named splits ("train", "restval", "val", "test").

    Source: Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments" (2015), ``dataset_*.json``.
    Raises ``DataError`` for a file of another form, or when no photograph is in those splits.
    """
    examples: list[Example] = []
    ids: set[int] = set()
    for index, image in enumerate(_entries(_load_json(captions), "images", captions)):
        where = f"{captions}: images[{index}]"
        if _field(image, "split", str, where) not in splits:
            continue
        folder = _field(image, "filepath", str, where) if "filepath" in image else ""
        name = f"{folder}/{_field(image, 'filename', str, where)}".lstrip("/")
        sentences = _entries(image, "sentences", where)
        texts = tuple(_field(sentence, "raw", str, where) for sentence in sentences)
        path = _inside(images, name, where)
        key = next((key for key in ("cocoid", "imgid") if key in image), None)
        image_id = index + 1 if key is None else _field(image, key, int, where)
        if image_id in ids:
            raise DataError(f"{where}: the image id {image_id} stands twice")
        ids.add(image_id)
        examples.append(Example(path, texts, image_id=image_id))
    if not examples:
        raise DataError(f"{captions}: no photograph is in the split {'+'.join(splits)!r}")
    return examples


def read_jsonl(captions: Path, images: Path) -> list[Example]:
    """Read one ``{"image": …, "captions": […], "tags": […]}`` a line; ``tags`` may be missing.

    Raises ``DataError`` that names the line that is not of that form.
    """
    examples: list[Example] = []
    for number, line in _lines(captions):
        where = f"{captions}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, found {line!r}")
        tags = entry.get("tags")
        examples.append(
            Example(
                _inside(images, entry.get("image"), where),
                _strings(entry.get("captions"), f"{where}: 'captions'"),
                None if tags is None else _strings(tags, f"{where}: 'tags'"),
                len(examples) + 1,
            )
        )
    return examples


def _strings(values: object, where: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: expected a list of strings, found {values!r}")
    return tuple(values)


def read_csv(captions: Path, images: Path) -> list[Example]:
    """Read columns ``image`` and ``caption``, one caption a row, and ``tags`` where there is one.

    Rows of one image are put together. What ``captioner caption --output FILE.csv`` writes is of
    this form: tags stand between commas, an apostrophe before a formula is taken off, and an error
    record is a photograph without a caption. A ``tags`` column that is empty in every row is none.
    Raises ``DataError`` that names the row which is not of that form.
    """
    texts: dict[Path, list[str]] = defaultdict(list)
    tags: dict[Path, list[str]] = defaultdict(list)
    for where, row in _csv_rows(captions):
        path = _inside(images, csv_text(row["image"]), where)
        texts[path] += filter(None, [csv_text(row["caption"]).strip()])
        tags[path] += csv_tags(row.get("tags", ""))
    tagged = any(tags.values())
    return [
        Example(path, tuple(lines), tuple(dict.fromkeys(tags[path])) if tagged else None, number)
        for number, (path, lines) in enumerate(texts.items(), 1)
    ]


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            head = next(reader, [])
            if not {"image", "caption"} <= {*head} or len({*head}) < len(head):
                raise DataError(f"{path}:1: expected the columns image and caption, found {head}")
            line = reader.line_num + 1
            for cells in reader:
                where, line = f"{path}:{line}", reader.line_num + 1
                if cells and len(cells) != len(head):
                    found = f"{len(cells)} cells where the head has {len(head)}"
                    raise DataError(f"{where}: {found}; a text with a comma stands in quotes")
                if cells:
                    yield where, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not CSV: {error}") from error
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from error


def read(
    captions: Path, images: Path, split: str = "", instances: Path | None = None
) -> list[Example]:
    """Read a data set by its form: Flickr8k's ``.txt``, JSONL, CSV, Karpathy's or COCO's JSON.

    ``split`` is a file of names for Flickr8k, split names joined by "+" for Karpathy's JSON, and
    empty for the others. Raises ``DataError`` when the file, or what it holds, cannot be used.
    """
    if not images.is_dir():
        raise DataError(f"{images}: the image folder is not there")
    if instances is not None and (captions.suffix != ".json" or split):
        raise DataError(f"{instances}: instances go with COCO captions, not with {captions}")
    if split and captions.suffix in (".jsonl", ".csv"):
        form = captions.suffix[1:].upper()
        raise DataError(f"{captions}: {form} has no splits, so not {split!r} either")
    if captions.suffix == ".txt":
        examples = read_flickr8k(captions, images, Path(split) if split else None)
    elif captions.suffix == ".jsonl":
        examples = read_jsonl(captions, images)
    elif captions.suffix == ".csv":
        examples = read_csv(captions, images)
    elif split:
        examples = read_karpathy(captions, images, split.split("+"))
    else:
        examples = read_coco(captions, images, instances)
    if not any(example.captions for example in examples):
        of_split = f" of the split {split!r}" if split else ""
        raise DataError(f"{captions}: no photograph{of_split} has a caption")
    return examples


def load(
    captions: Path, images: Path, split: str = "", instances: Path | None = None
) -> tuple[list[Example], dict[str, str]]:
    """Read a data set as :func:`read` does, without what has no caption or no photograph.

    Also returns each photograph that is left out, and why. Raises ``DataError`` also when none is
    left.
    """
    everything = read(captions, images, split, instances)
    left_out = {
        str(e.image): f"{captions} has no caption of it" for e in everything if not e.captions
    }
    examples, missing = drop_missing(e for e in everything if e.captions)
    if not examples:
        raise DataError(
            f"{captions}: none of its captioned photographs is in {images}; "
            f"the first would be {missing[0]}"
        )
    return examples, left_out | {str(path): "it is missing" for path in missing}
