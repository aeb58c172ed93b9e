"""The form of an annotation file: by its content, by its ending where that leaves it open."""

from __future__ import annotations

from pathlib import Path

from captioner.data.example import DataError
from captioner.data.readers.coco import read_coco
from captioner.data.readers.entries import Annotations, Text, parsed
from captioner.data.readers.flickr8k import is_token_line, read_flickr8k
from captioner.data.readers.karpathy import is_karpathy, read_karpathy
from captioner.data.readers.tabular import read_csv, read_jsonl, table_of
from captioner.files import from_json
from captioner.settings import shown

__all__ = ["COCO", "CSV", "JSONL", "KARPATHY", "TOKENS", "form_of", "read_form"]

COCO, CSV, JSONL = "COCO captions", "CSV", "JSONL"
KARPATHY, TOKENS = "Karpathy's JSON", "Flickr8k's token.txt"


def form_of(text: Text) -> str:
    """Return which form a text is of; JSON that is not JSONL is ``COCO`` or ``KARPATHY`` alike.

    Raises ``DataError`` for a text of no known form, with what was expected and what is there.
    """
    line, ending = text.first_line, text.path.suffix
    if is_token_line(line):
        return TOKENS
    if ending == ".csv" or table_of(line) is not None:
        return CSV
    if ending == ".jsonl" or line.startswith(("{", "[")):
        return JSONL if _is_json_lines(text) else COCO
    if ending == ".json":
        return COCO
    raise DataError(
        f"{text.path}:1: expected NAME#N<TAB>caption, a head with the columns image and caption, "
        f"or JSON; found {shown(line)}"
    )


def _is_json_lines(text: Text) -> bool:
    """Whether each line has a value of its own; ``False`` where one value goes over all lines."""
    by_ending = text.path.suffix == ".jsonl"
    first, _, rest = text.content.strip().partition("\n")
    try:
        # A long line alone is COCO's, and is not read twice.
        value = from_json(first) if rest.strip() or len(first) < 1_000_000 else None
    except ValueError:
        return by_ending
    if rest.strip():
        return True
    return (
        ("image" in value or (by_ending and "images" not in value))
        if isinstance(value, dict)
        else by_ending
    )


def read_form(text: Text, split: str, instances: Path | None) -> tuple[str, Annotations]:
    """Return the form of an annotation file, and its photographs: of Karpathy's, those of a split.

    Raises ``DataError`` as :func:`captioner.data.readers.read`.
    """
    form = form_of(text)
    data = parsed(text) if form == COCO else None
    if is_karpathy(data):
        if not split:
            raise DataError(f"{text.path}: is of Karpathy's form; say which split, such as 'train'")
        form, found = KARPATHY, read_karpathy(text.path, data, split.split("+"))
    elif form == COCO:
        found = read_coco(text.path, data, instances)
    elif form == CSV:
        found = read_csv(text)
    else:
        found = read_jsonl(text) if form == JSONL else read_flickr8k(text)
    if instances is not None and form != COCO:
        raise DataError(f"{instances}: instances go with COCO captions, not with {text.path}")
    return form, found
