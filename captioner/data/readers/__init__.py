"""Annotation files to examples: COCO, Karpathy's splits, Flickr8k, JSONL and CSV."""

from __future__ import annotations

from pathlib import Path

from captioner.data.example import DataError, Example, drop_missing
from captioner.data.readers.coco import read_coco
from captioner.data.readers.flickr8k import read_flickr8k
from captioner.data.readers.karpathy import read_karpathy
from captioner.data.readers.tabular import read_csv, read_jsonl

__all__ = ["load", "read"]


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
