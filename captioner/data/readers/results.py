"""Captions that a model wrote, of any form, and the references that they are scored against."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captioner.data.example import DataError, Example, ImageId, coco_image_id
from captioner.data.names import MISSING, resolve, spelling_notes
from captioner.data.readers.entries import Annotations, Problems, Text, load_text, parsed
from captioner.data.readers.forms import CSV, JSONL, form_of
from captioner.data.readers.tabular import csv_rows, json_lines, table_of_text
from captioner.settings import shown

__all__ = ["ENDINGS", "Paired", "Results", "pair_results", "read_results"]

ENDINGS = (".json", ".jsonl", ".csv")
"""The endings of results files."""


class Results(NamedTuple):
    """The captions of a results file, by image id or by the name of the photograph."""

    captions: dict[ImageId, str]
    by_name: bool
    notes: list[str]


class Paired(NamedTuple):
    """Photographs with their references, and the caption that was written of each, in order."""

    examples: list[Example]
    captions: list[str]
    notes: list[str]


def read_results(path: Path) -> Results:
    """Read a results file: COCO's ``[{"image_id", "caption"}]``, or captioner's JSONL or CSV.

    A record of an error has no caption and is counted. Raises ``DataError`` for entries of another
    form, or a photograph that stands twice.
    """
    text = load_text(path)
    problems = Problems(path)
    captions: dict[ImageId, str] = {}
    keys: set[str] = set()
    for where, entry in _records(text, problems):
        key = "image_id" if "image_id" in entry else "image"
        keys.add(key)
        if entry.get("error") and not entry.get("caption"):
            problems.count(where, "records of errors, which have no caption")
            continue
        # A name that is a number stays a text.
        of_entry = problems.text if key == "image" else problems.image_id
        image, caption = of_entry(where, entry, key), problems.text(where, entry, "caption")
        if image in captions:
            problems.add(where, f"the {_CALLED[key]} {shown(image)} stands twice")
        elif image is not None and caption is not None:
            captions[image] = caption
    if len(keys) > 1:
        problems.add("entries", "some have an 'image_id' and others an 'image'")
    problems.check()
    return Results(captions, "image" in keys, text.notes + problems.notes())


_CALLED = {"image": "photograph", "image_id": "image id"}


def _records(text: Text, problems: Problems) -> Iterator[tuple[str | int, Mapping[str, Any]]]:
    form = form_of(text)
    if form == CSV:
        table = table_of_text(text)
        for number, row in csv_rows(text, table, problems):
            yield number, row | {"image": row[table.image], "caption": row[table.caption]}
    elif form == JSONL:
        yield from json_lines(text, problems)
    else:
        data = parsed(text)
        if not isinstance(data, list):
            raise DataError(
                f"{text.path}: expected a list of objects with 'image_id' and 'caption', "
                f"found {shown(data)}"
            )
        for index, entry in enumerate(data):
            if isinstance(entry, dict):
                yield f"[{index}]", entry
            else:
                problems.add(f"[{index}]", f"expected an object, found {shown(entry)}")


def pair_results(
    results: Path, references: Annotations, source: Path, subset: bool = False
) -> Paired:
    """Return the photographs of the references and what a results file says of each.

    They are paired by image id where both files have ids. Otherwise they are paired by the names
    of photographs, of which either may have more folders before it; an image id that is an integer
    then stands for the number that ends a name, as in the COCO results that captioner writes.

    Args:
        results: A file that :func:`read_results` reads.
        references: What :func:`captioner.data.readers.read` returned.
        source: The file of the references, for messages.
        subset: Whether photographs that only one of the files has are left out.

    Raises:
        DataError: A photograph is in one file only, or cannot be told from another by its id or
            name.
    """
    written = read_results(results)
    examples = [example for example in references.examples if example.captions]
    found, notes = _find(written, examples, results, source)
    captions = {found[image]: text for image, text in written.captions.items() if image in found}
    unknown = [image for image in written.captions if image not in found]
    unsaid = [_called(e) for index, e in enumerate(examples) if index not in captions]
    if unknown and not subset:
        raise DataError(f"{results}: {source} has no caption of {_listed(map(shown, unknown))}")
    if unsaid and not subset:
        raise DataError(f"{source}: {results} has no caption for {_listed(unsaid)}")
    if not captions:
        raise DataError(f"{results}: holds no caption of an image of {source}")
    if unknown:
        notes.append(f"{len(unknown):,} captions are of images without references, left out")
    if unsaid:
        notes.append(f"{len(unsaid):,} images with references have no caption, left out")
    indices = sorted(captions)
    return Paired(
        [examples[index] for index in indices],
        [captions[index] for index in indices],
        [*references.notes, *written.notes, *(f"{results}: {note}" for note in notes)],
    )


def _called(example: Example) -> str:
    return shown(str(example.image) if example.image_id is None else example.image_id)


def _listed(images: Iterable[str]) -> str:
    first, *others = images
    more = f" and {len(others):,} more" if others else ""
    return f"{first}{more}; with --subset the images that both have are scored"


def _find(
    written: Results, examples: Sequence[Example], results: Path, source: Path
) -> tuple[dict[ImageId, int], list[str]]:
    """Return the index of the example of each image of the results, and notes on their names."""
    ids = {e.image_id: index for index, e in enumerate(examples) if e.image_id is not None}
    texts = [image for image in written.captions if isinstance(image, str)]
    are_names = len(texts) == len(written.captions) and not ids.keys() & written.captions.keys()
    if written.by_name or are_names:
        return _by_name(texts, examples, source)
    if not ids:
        numbers = [(coco_image_id(str(e.image)), index) for index, e in enumerate(examples)]
        ids = {number: index for number, index in numbers if number is not None}
        if len(ids) < len(examples):
            raise DataError(
                f"{results}: has image ids, but {source} has none, and its names do not each end "
                "in a number of their own; score a results file that names the photographs"
            )
    return {image: ids[image] for image in written.captions if image in ids}, []


def _by_name(
    names: Sequence[str], examples: Sequence[Example], source: Path
) -> tuple[dict[ImageId, int], list[str]]:
    indices: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        indices[str(example.image)].append(index)
    resolved = resolve(names, indices.__contains__, indices.keys, tails=True)
    problems = Problems(source)
    for name, why in resolved.refused.items():
        if why != MISSING:
            problems.add(shown(name), why)
    for name, known in resolved.found.items():
        if len(indices[known]) > 1:
            problems.add(shown(name), f"{len(indices[known])} images have this name")
    problems.check()
    found: dict[ImageId, int] = {name: indices[known][0] for name, known in resolved.found.items()}
    return found, list(spelling_notes(resolved))
