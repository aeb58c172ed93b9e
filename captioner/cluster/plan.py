"""The plan of a run on a cluster: its photographs, cut into shards once and for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from captioner.cluster.listing import Listed
from captioner.cluster.parts import FORMS, Part, content_of, named
from captioner.cluster.storage import Place, located, reachable
from captioner.files import as_json, from_json
from captioner.folder.checks import RunError
from captioner.folder.journal import differences

__all__ = ["Plan"]

_FORMAT = "captioner cluster run 1"
_FOLDER, _SETTINGS, _SUCCESS = "_run", "run.json", "_SUCCESS"

# Shards of one file of the plan.
_TOGETHER = 1024


class Plan:
    """An output: a folder of parts, and in ``_run`` the settings and photographs of its run.

    The photographs are cut into shards of the same size, in order. The records of a shard are one
    file, written at once by one process, so a shard is done or not, and never twice. That is what
    a run is continued by. Readers of data pass over names that begin with ``_``.

    Attributes:
        total: how many photographs there are, once the plan is there.
    """

    def __init__(self, output: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
        """Say where the output lies, and what its records depend on.

        Raises ``RunError`` where it cannot be an output.
        """
        self._name, self._settings = os.fspath(output).rstrip("/"), dict(settings)
        self.place = located(self._name)
        self._form = os.path.splitext(self.place.path)[1]
        if self._form not in FORMS:
            raise RunError(f"output {self._name}: the name must end in {' or '.join(FORMS)}")
        self._folder = self.place.of(_FOLDER)
        self.total = 0

    @property
    def shard_size(self) -> int:
        """How many photographs a shard has; the last has fewer."""
        return int(self._settings["shard_size"])

    def take_up(self, overwrite: bool) -> bool:
        """Return whether there is a plan to continue; with ``overwrite`` there never is.

        Raises ``RunError`` where the folder is something else than an output, or that of a run
        with other settings.
        """
        with reachable(self._name):
            if not self.place.exists():
                return False
            self._check_ours()
            if overwrite or not self._folder.of(_SETTINGS).exists():
                return False  # without settings: killed before anything else was written
            before = from_json(self._folder.of(_SETTINGS).read())
        self.total = before.pop("total")
        if different := differences(before, self._header()):
            raise RunError(f"{self._name}: {different}")
        return True

    def write(self, photographs: Sequence[Listed]) -> None:
        """Write the plan in place of what was there.

        The settings come last and say that the rest is whole.
        """
        size = _TOGETHER * self.shard_size
        with reachable(self._name):
            if self.place.exists():
                self.place.filesystem.delete_dir(self.place.path)
            self.place.filesystem.create_dir(self._folder.path, recursive=True)
            for start in range(0, len(photographs), size):
                self._file(start // size).write(_as_parquet(photographs[start : start + size]))
            self.total = len(photographs)
            content = as_json({**self._header(), "total": self.total})
            self._folder.of(_SETTINGS).write(content + b"\n")

    def done(self) -> dict[int, Part]:
        """Return the parts that are there, by shard."""
        return named(self.place.files())

    def size(self, shard: int) -> int:
        """Return how many photographs a shard has."""
        return min(self.shard_size, self.total - shard * self.shard_size)

    def missing(self, least: int) -> Iterator[list[tuple[int, list[Listed]]]]:
        """Yield the shards that have no part yet, and their photographs.

        They come in lists of ``least`` or more, as far as there are, and not all at once: the
        photographs of a large run would fill the memory.
        """
        done, size = self.done(), self.shard_size
        shards = -(-self.total // size)
        found: list[tuple[int, list[Listed]]] = []
        for first in range(0, shards, _TOGETHER):
            numbers = range(first, min(first + _TOGETHER, shards))
            if any(number not in done for number in numbers):
                rows = _from_parquet(self._file(first // _TOGETHER).read())
                cut = (rows[start : start + size] for start in range(0, len(rows), size))
                found += [pair for pair in zip(numbers, cut, strict=True) if pair[0] not in done]
            if len(found) >= least:
                yield found
                found = []
        if found:
            yield found

    def keep(self, part: Part, lines: bytes) -> None:
        """Write the records of a shard."""
        self.place.of(part.name(self._form)).write(content_of(lines, self._form))

    def finish(self, counts: Mapping[str, int]) -> None:
        """Say that all parts are there."""
        self.place.of(_SUCCESS).write(as_json(dict(counts)) + b"\n")

    def _check_ours(self) -> None:
        names = {os.path.basename(info.path) for info in _inside(self.place)}
        if names and _FOLDER not in names:
            raise RunError(
                f"{self._name} is there already, and no output of a run on a cluster; take "
                "another name, or move it away"
            )

    def _file(self, number: int) -> Place:
        return self._folder.of(f"plan-{number:05}.parquet")

    def _header(self) -> dict[str, Any]:
        return {"format": _FORMAT, **self._settings}


def _inside(place: Place) -> list[Any]:
    """Return what a folder has; for a file, the file."""
    info = place.info()
    if info.is_file:
        return [info]
    return list(place.filesystem.get_file_info(pa.fs.FileSelector(place.path)))


def _as_parquet(photographs: Sequence[Listed]) -> bytes:
    # Names as bytes: those of a disk need not be UTF-8.
    table = pa.table({
        "image": pa.array([os.fsencode(one.image) for one in photographs], pa.binary()),
        "path": pa.array([os.fsencode(one.path) for one in photographs], pa.binary()),
        "error": pa.array([one.error for one in photographs], pa.string()),
    })  # fmt: skip
    file = BytesIO()
    parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def _from_parquet(content: bytes) -> list[Listed]:
    columns = parquet.read_table(BytesIO(content)).to_pydict()
    rows = zip(columns["image"], columns["path"], columns["error"], strict=True)
    return [Listed(os.fsdecode(image), os.fsdecode(path), error) for image, path, error in rows]
