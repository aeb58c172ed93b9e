"""The parts of an output: the records of one shard each, as JSON lines or Parquet."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import BytesIO
from typing import NamedTuple

import pyarrow as pa
from pyarrow import parquet

from captioner.files import from_json

__all__ = ["FORMS", "Part", "content_of", "named"]

FORMS = (".jsonl", ".parquet")
"""The endings of outputs, and of the files in them."""

# A column of a record is null in each row whose photograph has no such field.
_CAPTION = pa.struct([
    ("text", pa.string()),
    ("log_prob", pa.float64()),
    ("confidence", pa.float64()),
    ("finished", pa.bool_()),
])  # fmt: skip
_SCHEMA = pa.schema([
    ("image", pa.string()),
    ("caption", pa.string()),
    ("log_prob", pa.float64()),
    ("confidence", pa.float64()),
    ("captions", pa.list_(_CAPTION)),
    ("tags", pa.list_(pa.struct([("name", pa.string()), ("score", pa.float64())]))),
    ("truncated", pa.bool_()),
    ("error", pa.string()),
])  # fmt: skip

_NAME = re.compile(r"part-(\d+)(?:-(\d+)-errors)?\.(?:jsonl|parquet)")


class Part(NamedTuple):
    """A file of an output: the number of its shard, and how many of its records are errors.

    The name has both, so that a listing of the folder says what is done and what failed.
    """

    shard: int
    errors: int

    def name(self, form: str) -> str:
        """Return the name of the file."""
        errors = f"-{self.errors}-errors" if self.errors else ""
        return f"part-{self.shard:07}{errors}{form}"


def named(names: Iterable[str]) -> dict[int, Part]:
    """Return the parts that there are, by shard."""
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    return {int(match[1]): Part(int(match[1]), int(match[2] or 0)) for match in found}


def content_of(lines: bytes, form: str) -> bytes:
    """Return the content of a part, from its records as JSON lines."""
    if form == ".jsonl":
        return lines
    rows = [from_json(line) for line in lines.splitlines()]
    for row in rows:
        # Parquet's strings are UTF-8. A name that is not keeps its bytes as escapes.
        row["image"] = (
            row["image"].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        )
    file = BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, _SCHEMA), file, compression="zstd")
    return file.getvalue()
