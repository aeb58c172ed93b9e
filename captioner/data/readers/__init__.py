"""Annotation files to examples: COCO, Karpathy's splits, Flickr8k and Flickr30k, JSONL and CSV."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from captioner.data.example import DataError, Example
from captioner.data.names import MISSING, Resolved, resolve, resolve_in_folder, spelling_notes
from captioner.data.readers.entries import Annotations, Problems, load_text
from captioner.data.readers.forms import KARPATHY, read_form
from captioner.settings import shown

__all__ = ["Annotations", "Loaded", "load", "read"]


class Loaded(NamedTuple):
    """The captioned photographs of a data set that are there, and what became of the others."""

    examples: list[Example]
    missing: dict[str, str]
    """Why each captioned photograph was not found, by its path."""
    uncaptioned: dict[str, str]
    """Why each photograph has no caption, by its path."""
    notes: list[str]
    """Notes on oddities of the files, and the number of names that are spelled otherwise there."""

    @property
    def left_out(self) -> dict[str, str]:
        """Return why each photograph was left out, by its path."""
        return self.uncaptioned | self.missing


def read(captions: Path, split: str = "", instances: Path | None = None) -> Annotations:
    """Read an annotation file by its form, which its content shows.

    The examples have the names of their photographs as the file has them.

    Args:
        captions: COCO's or Karpathy's JSON, Flickr8k's ``token.txt``, JSONL or CSV.
        split: Split names joined by "+" for Karpathy's JSON; for the other forms a file that
            lists names of photographs, or nothing for all of them.
        instances: COCO's instances, for the tags; goes with COCO captions alone.

    Raises:
        DataError: A file, or what it holds, cannot be used.
    """
    text = load_text(captions)
    form, found = read_form(text, split, instances)
    if split and form != KARPATHY:
        found = _listed(captions, found, form, Path(split))
    if not any(example.captions for example in found.examples):
        of_split = f" of the split {split!r}" if split else ""
        raise DataError(f"{captions}: no photograph{of_split} has a caption")
    return Annotations(found.examples, text.notes + found.notes)


def _listed(captions: Path, found: Annotations, form: str, split: Path) -> Annotations:
    """Return the photographs whose names are on a list, in its order."""
    if not split.is_file():
        raise DataError(f"{split}: no such list of names; {captions} is {form}, without splits")
    by_name: dict[str, list[Example]] = defaultdict(list)
    for example in found.examples:
        by_name[str(example.image)].append(example)
    text, problems = load_text(split), Problems(split)
    names = [(number, str(Path(line.strip()))) for number, line in text.lines()]
    resolved = resolve([name for _, name in names], by_name.__contains__, by_name.keys)
    examples: list[Example] = []
    for number, name in names:
        if name in resolved.found:
            examples += by_name[resolved.found[name]]
        else:
            why = resolved.refused[name]
            missing = f"has no caption in {captions}"
            problems.add(
                number, f"{shown(name)} {missing if why == MISSING else f'is unclear: {why}'}"
            )
    problems.check()
    return Annotations(examples, text.notes + found.notes + _notes(split, resolved))


def _notes(path: Path, resolved: Resolved) -> list[str]:
    return [f"{path}: {note}" for note in spelling_notes(resolved)]


def load(captions: Path, images: Path, split: str = "", instances: Path | None = None) -> Loaded:
    """Read a data set as :func:`read` does, and find its photographs in a folder.

    A photograph whose name differs from its file's by slashes, Unicode normal form or case is
    found, and so is an absolute path of another machine; see
    :func:`captioner.data.names.resolve`.

    Args:
        captions: The annotation file.
        images: The folder of photographs.
        split: As in :func:`read`.
        instances: As in :func:`read`.

    Raises:
        DataError: As in :func:`read`, a captioned photograph has no name, or none is there.
    """
    if not images.is_dir():
        raise DataError(f"{images}: the image folder is not there")
    found = read(captions, split, instances)
    captioned = [example for example in found.examples if example.captions]
    _check_names(captions, captioned)
    resolved = resolve_in_folder([str(example.image) for example in captioned], images)
    examples, missing = [], {}
    for example in captioned:
        name = str(example.image)
        if name in resolved.found:
            examples.append(replace(example, image=images / resolved.found[name]))
        else:
            missing[str(images / name)] = resolved.refused[name]
    if not examples:
        first, why = next(iter(missing.items()))
        raise DataError(
            f"{captions}: none of its captioned photographs is in {images}; "
            f"the first would be {first}: {why}"
        )
    uncaptioned = {
        str(images / example.image): _why_uncaptioned(captions, example)
        for example in found.examples
        if not example.captions
    }
    return Loaded(examples, missing, uncaptioned, found.notes + _notes(captions, resolved))


def _check_names(captions: Path, examples: Sequence[Example]) -> None:
    problems = Problems(captions)
    for example in examples:
        if example.image == Path():
            problems.add("images", f"the image {example.image_id!r} has no 'file_name'")
    problems.check()


def _why_uncaptioned(captions: Path, example: Example) -> str:
    if example.junk:
        return f"{captions} marks all its captions as junk"
    return f"{captions} has no caption of it"
