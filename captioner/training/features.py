"""The feature cache: what a frozen encoder says of each photograph, computed once and kept.

One folder for each encoder, in it one for each list of photographs, with ``rows.float16`` and
``log.jsonl``; until all rows are there, they are called ``rows.part``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import FileIO
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from captioner.data.dataset import Features, pixel_batches
from captioner.files import append, as_json, from_json, locked, replacing
from captioner.model.encoder import Encoder
from captioner.photos.images import image_endings
from captioner.training.digests import Digests
from captioner.version import __version__

__all__ = ["encode_features"]

Say = Callable[[str], None]
Shape = tuple[int, int, int]
Encoded = tuple[np.ndarray, dict[int, str]]
_FORMAT = "captioner features 1"
_LOG = "log.jsonl"
_CHUNK = 32
_SYNC_SECONDS = 10.0


def encode_features(
    encoder: Encoder,
    paths: Sequence[str],
    folder: Path,
    precision: torch.dtype,
    workers: int,
    say: Say,
    shared: bool = False,
) -> Features:
    """Return the features of the photographs, from ``folder`` if they are there already.

    They are found by what is in the photographs (wherever these lie), the encoder's weights, the
    preprocessing, the precision and the versions of the libraries. A pass that was cut off goes on
    where it was; of two processes that want the same features one waits. Unless the folder is
    ``shared`` between runs, what another encoder said is removed from it.

    Raises ``OSError`` if the disk lacks the room, or a photograph changes meanwhile.
    """
    if not paths:
        return Features(np.empty((0, 0, encoder.width), np.float16), {})
    encoder.eval()
    folder.mkdir(parents=True, exist_ok=True)
    photographs = _Photographs(paths, Digests(folder / "digests.json"))
    ours = folder / _encoder_key(encoder, precision)
    if not shared:
        _remove_others(folder, ours)
    matrix = _Matrix(ours / photographs.key)
    with matrix.locked(say):
        features = matrix.read()
        if features is None:
            log = matrix.begin((len(paths), *_cell_shape(encoder, precision)), say)
            encoded = _encoded(encoder, paths, log, precision, workers)
            matrix.write(log, photographs, encoded)
            features = matrix.read()
    if features is None:
        raise OSError(f"{matrix.folder}: what was written there does not read back the same")
    return features


def _encoder_key(encoder: Encoder, precision: torch.dtype) -> str:
    versions = [__version__, PIL.__version__, torch.__version__, torchvision.__version__]
    # The endings tell which of Pillow's plugins are there.
    read_by = [_FORMAT, *versions, *sorted(image_endings())]
    digest = hashlib.sha256(f"{read_by} {encoder.preprocessing} {precision}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"{encoder.name}-{digest.hexdigest()[:24]}"


def _remove_others(folder: Path, ours: Path) -> None:
    for log in list(folder.glob(f"*/*/{_LOG}")):
        if log.parents[1] != ours:
            shutil.rmtree(log.parents[1], ignore_errors=True)


def _cell_shape(encoder: Encoder, precision: torch.dtype) -> tuple[int, int]:
    size = encoder.preprocessing.size
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    _, cells, width = _encode(encoder, blank, precision).shape
    return cells, width


@torch.inference_mode()
def _encode(encoder: Encoder, pixels: Tensor, precision: torch.dtype) -> np.ndarray:
    device = next(encoder.parameters()).device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        features: np.ndarray = encoder(pixels.to(device)).half().cpu().numpy()
    return features


def _encoded(
    encoder: Encoder, paths: Sequence[str], log: _Log, precision: torch.dtype, workers: int
) -> Iterator[Encoded]:
    """Yield the chunks that a log does not have: rows, and why some photographs have none."""
    start, (total, *cell) = log.rows, log.shape
    with tqdm(total=total, initial=start, desc="encoding", unit="photo", disable=None) as progress:
        # From a multiple of _CHUNK on, so that a photograph's neighbours are always the same.
        for batch in pixel_batches(paths[start:], encoder.preprocessing, _CHUNK, workers):
            rows = np.zeros((len(batch.places) + len(batch.unreadable), *cell), np.float16)
            if batch.places:
                within = [place % _CHUNK for place in batch.places]
                rows[within] = _encode(encoder, batch.pixels, precision)
            yield rows, {start + place: why for place, why in batch.unreadable.items()}
            progress.update(len(rows))


class _Photographs:
    """Files, and what was in them at the beginning."""

    def __init__(self, paths: Sequence[str], digests: Digests) -> None:
        self._paths, self._digests = paths, digests
        self._contents = digests.of(paths)
        digests.save()
        listed = hashlib.sha256(as_json(self._contents)).hexdigest()
        self.key = f"{len(paths)}-{listed[:24]}"

    def check(self, start: int, stop: int) -> None:
        """Raise ``OSError`` if one is another now: its features may be of either."""
        paths, contents = self._paths[start:stop], self._contents[start:stop]
        now = self._digests.of(paths)
        for path, was, is_now in zip(paths, contents, now, strict=True):
            if was != is_now:
                raise OSError(f"{path} changed while its features were computed; begin again")


class _Chunk(NamedTuple):
    """What is kept about ``_CHUNK`` rows: which are none, and a checksum of it all."""

    unreadable: dict[int, str]
    checksum: int


class _Log(NamedTuple):
    """What is known of a matrix: its shape, and its chunks so far."""

    shape: Shape
    chunks: list[_Chunk]

    @property
    def rows(self) -> int:
        return min(len(self.chunks) * _CHUNK, self.shape[0])

    @property
    def row_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * np.dtype(np.float16).itemsize

    def lines(self, start: int) -> bytes:
        """Return the chunks from ``start`` on, one a line."""
        return b"".join(as_json(chunk._asdict()) + b"\n" for chunk in self.chunks[start:])


class _Matrix:
    """The features of a list of photographs on the disk; to be used under its lock alone.

    A chunk of rows gets its line in the log once it has reached the disk, so the log is only ever
    behind. Rows are believed where they have the checksum that is in the log.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows, self._part = folder / "rows.float16", folder / "rows.part"
        self._log = folder / _LOG

    @contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        waiting = f"another process has the features in {self.folder}; waiting for it"
        with locked(str(self.folder / "lock"), lambda: say(waiting)):
            yield

    def read(self) -> Features | None:
        """Return the features, mapped from the disk, if all of them are there and right."""
        if not self._rows.exists() or not self._log.exists():
            return None
        stamps = tuple(
            (status.st_ino, status.st_size, status.st_mtime_ns)
            for status in (self._rows.stat(), self._log.stat())
        )
        log = _read_log(self._log)
        if log is None or not _is_whole(self._rows, self._log, stamps):
            return None
        unreadable = {place: why for chunk in log.chunks for place, why in chunk.unreadable.items()}
        return Features(np.memmap(self._rows, np.float16, "r", shape=log.shape), unreadable)

    def begin(self, shape: Shape, say: Say) -> _Log:
        """Make ready to write; return what there is already of a pass that was cut off.

        Says how much is to be written. Raises ``OSError`` if there is no room for it.
        """
        if self._rows.exists():
            say(f"{self._rows} is damaged; it is made anew")
            self._rows.unlink()  # not shortened, for another process may have it mapped
        before = _read_log(self._log)
        log = _Log(shape, before.chunks if before is not None and before.shape == shape else [])
        with FileIO(self._part, "a+") as part:
            log = _Log(shape, log.chunks[: _right(self._part, log)])
            part.truncate(log.rows * log.row_bytes)
        with replacing(str(self._log)) as file:
            file.write(as_json({"shape": shape}) + b"\n" + log.lines(0))
        self._check_room(log, say)
        return log

    def _check_room(self, log: _Log, say: Say) -> None:
        photographs, free = log.shape[0], shutil.disk_usage(self.folder).free
        needed = (photographs - log.rows) * log.row_bytes
        done = f", {log.rows:,} of them there already" if log.rows else ""
        size = f"{needed / 1e6:,.1f} MB to write in {self.folder}"
        say(f"features of {photographs:,} photographs{done}: {size}")
        if needed > free:
            raise OSError(
                f"{self.folder}: the features need {needed:,} bytes, and {free:,} are free; "
                "make room, or lay the run (or training.features) on another disk"
            )

    def write(self, log: _Log, photographs: _Photographs, encoded: Iterator[Encoded]) -> None:
        """Write the chunks that are not there yet, and give the rows their name."""
        with FileIO(self._part, "a+") as part, FileIO(self._log, "a+") as file:
            written, synced = len(log.chunks), monotonic()

            def sync() -> None:
                photographs.check(written * _CHUNK, log.rows)
                os.fsync(part.fileno())
                append(file, log.lines(written))
                os.fsync(file.fileno())

            for rows, unreadable in encoded:
                content = rows.tobytes()
                append(part, content)
                log.chunks.append(_Chunk(unreadable, _checksum(log.shape, unreadable, content)))
                if monotonic() - synced > _SYNC_SECONDS:
                    sync()
                    written, synced = len(log.chunks), monotonic()
            sync()
        os.replace(self._part, self._rows)
        _sync_folder(self.folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_log(path: Path) -> _Log | None:
    """Return what a log says up to its first damaged line; ``None`` if that is the first."""
    log = None
    lines = path.read_bytes().splitlines() if path.exists() else []
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        for line in lines:
            entry = from_json(line)
            if log is None:
                photographs, cells, width = map(int, entry["shape"])
                log = _Log((photographs, cells, width), [])
            else:
                unreadable = {int(place): why for place, why in entry["unreadable"].items()}
                log.chunks.append(_Chunk(unreadable, int(entry["checksum"])))
    return log


@cache
def _is_whole(rows: Path, log_path: Path, stamps: object) -> bool:
    """Return whether all is there and right; read to the end but once while ``stamps`` last."""
    log = _read_log(log_path)
    if log is None or log.rows != log.shape[0]:
        return False
    return rows.stat().st_size == log.rows * log.row_bytes and _right(rows, log) == len(log.chunks)


def _right(path: Path, log: _Log) -> int:
    """Return how many of the log's chunks, from the first, are in a file as they were written."""
    with path.open("rb") as file:
        for number, (unreadable, checksum) in enumerate(log.chunks):
            rows = min(_CHUNK, log.shape[0] - number * _CHUNK)
            content = file.read(rows * log.row_bytes)
            if _checksum(log.shape, unreadable, content) != checksum:
                return number
    return len(log.chunks)


def _checksum(shape: Shape, unreadable: dict[int, str], content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(as_json([_FORMAT, shape, unreadable])))
