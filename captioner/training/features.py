"""The feature cache: the features of each photograph, computed once by a frozen encoder.

One folder for each encoder, in it one for each list of photographs, in it one file: a record of
fixed size for each photograph, which has its own checksum. While records are missing the file is
called ``rows.part``, afterwards ``rows``.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from io import FileIO
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from captioner.data.dataset import Features, PixelBatch, pixel_batches
from captioner.files import as_json, locked
from captioner.model.device import autocast
from captioner.model.encoder import Encoder
from captioner.photos.images import image_endings
from captioner.training.digests import Digests
from captioner.version import __version__

__all__ = ["encode_features"]

Say = Callable[[str], None]
_FORMAT = "captioner features 2"
_BATCH = 32
_REASON_BYTES = 252


def encode_features(
    encoder: Encoder,
    paths: Sequence[str],
    folder: Path,
    dtype: torch.dtype,
    workers: int,
    say: Say,
    shared: bool = False,
) -> Features:
    """Return the features of photographs, from the cache as far as it has them.

    The key of the cache is the content of the photographs (wherever these lie), the encoder's
    weights, the preprocessing, the number type and the versions of the libraries. A pass that was
    cut off goes on where it was. Records without their checksum are computed again. Of two
    processes that want the same features one waits.

    Args:
        encoder: The encoder.
        paths: The photographs.
        folder: The folder of the cache.
        dtype: The number type of the encoder's products.
        workers: The number of processes that read photographs.
        say: Called with each line for a person.
        shared: Whether several runs use the folder; otherwise features of other encoders are
            removed from it.

    Raises:
        OSError: The disk lacks the room, or a photograph changes meanwhile.
    """
    if not paths:
        return Features(np.empty((0, 0, encoder.width), np.float16), {})
    encoder.eval()
    folder.mkdir(parents=True, exist_ok=True)
    photographs = _Photographs(paths, Digests(folder / "digests.json"))
    ours = folder / _encoder_key(encoder, dtype)
    if not shared:
        _remove_others(folder, ours)
    table = _Table(ours / photographs.key, len(paths), _cells(encoder, dtype))
    with table.locked(say):
        if not table.is_whole():
            starts = table.open(say)
            wanted = [path for start in starts for path in paths[start : start + _BATCH]]
            batches = pixel_batches(wanted, encoder.preprocessing, _BATCH, workers)
            table.fill(starts, _encoded(encoder, batches, dtype, len(wanted)), photographs)
        if not table.is_whole():
            raise OSError(f"{table.path}: what was written there does not read back the same")
        return table.features()


def _encoder_key(encoder: Encoder, dtype: torch.dtype) -> str:
    versions = [__version__, PIL.__version__, torch.__version__, torchvision.__version__]
    # The endings tell which of Pillow's plugins are there.
    read_by = [_FORMAT, *versions, *sorted(image_endings())]
    digest = hashlib.sha256(f"{read_by} {encoder.preprocessing} {dtype}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return f"{encoder.name}-{digest.hexdigest()[:24]}"


def _remove_others(folder: Path, ours: Path) -> None:
    # The names of rows show that a folder is a cache's, also an earlier version's.
    for encoder in {rows.parents[1] for rows in folder.glob("*/*/rows*")} - {ours}:
        shutil.rmtree(encoder, ignore_errors=True)


def _cells(encoder: Encoder, dtype: torch.dtype) -> tuple[int, ...]:
    """Return the shape of a photograph's features, ``(N, width)``."""
    size = encoder.preprocessing.size
    blank = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return _encode(encoder, blank, dtype).shape[1:]


@torch.inference_mode()
def _encode(encoder: Encoder, pixels: Tensor, dtype: torch.dtype) -> np.ndarray:
    device = next(encoder.parameters()).device
    with autocast(device, dtype):
        features: np.ndarray = encoder(pixels.to(device)).half().cpu().numpy()
    return features


def _encoded(
    encoder: Encoder, batches: Iterator[PixelBatch], dtype: torch.dtype, photographs: int
) -> Iterator[dict[int, np.ndarray | str]]:
    """Yield what each batch gives: features, or why there are none, by the index in the batch."""
    with tqdm(total=photographs, desc="encoding", unit="photo", disable=None) as progress:
        for batch in batches:
            given: dict[int, np.ndarray | str] = dict(batch.unreadable)
            if batch.indices:
                given |= zip(batch.indices, _encode(encoder, batch.pixels, dtype), strict=True)
            yield {index % _BATCH: value for index, value in given.items()}
            progress.update(len(given))


class _Photographs:
    """Files, and the digests of their content at the beginning."""

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


class _Table:
    """The features of a list of photographs on the disk; to be used under its lock alone.

    A record is believed if its checksum is right, so nothing depends on the order in which a
    system writes its pages to the disk.
    """

    def __init__(self, folder: Path, photographs: int, cells: tuple[int, ...]) -> None:
        self.path, self._part = folder / "rows", folder / "rows.part"
        self._count = photographs
        fields = [("rows", "<f2", cells), ("reason", f"S{_REASON_BYTES}"), ("checksum", "<u4")]
        self._dtype = np.dtype(fields)

    @contextmanager
    def locked(self, say: Say) -> Iterator[None]:
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        waiting = f"another process has the features in {folder}; waiting for it"
        with locked(str(folder / "lock"), lambda: say(waiting)):
            yield

    def is_whole(self) -> bool:
        """Return whether every record is there and right."""
        if not self.path.exists():
            return False
        status = self.path.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        return _is_whole(self.path, self._dtype, self._count, stamp)

    def features(self) -> Features:
        """Return the features of a whole table, mapped from the disk."""
        records = np.memmap(self.path, self._dtype, "r", shape=(self._count,))
        reasons = {int(i): bytes(records["reason"][i]) for i in records["reason"].nonzero()[0]}
        unreadable = {i: reason.decode(errors="ignore") for i, reason in reasons.items()}
        return Features(records["rows"], unreadable)

    def open(self, say: Say) -> list[int]:
        """Make ready to write; return where the batches begin that are not there yet.

        Whole batches, so that a photograph's neighbours, on which the last bits of its features
        depend, are always the same. Says how much is to be written. Raises ``OSError`` if there is
        no room for it.
        """
        if self.path.exists():
            say(f"{self.path} is damaged; its damaged part is made anew")
            # Whoever has it mapped will find the right features there.
            os.replace(self.path, self._part)
        self._part.touch()
        right = _right(self._part, self._dtype, self._count)
        starts = [i for i in range(0, self._count, _BATCH) if not right[i : i + _BATCH].all()]
        missing = sum(min(_BATCH, self._count - start) for start in starts)
        needed, free = missing * self._dtype.itemsize, shutil.disk_usage(self.path.parent).free
        done = f", {self._count - missing:,} of them there already" if missing < self._count else ""
        size = f"{needed / 1e6:,.1f} MB to write in {self.path.parent}"
        say(f"features of {self._count:,} photographs{done}: {size}")
        if needed > free:
            raise OSError(
                f"{self.path.parent}: the features need {needed:,} bytes, and {free:,} are free; "
                "make room, or lay the run (or training.features) on another disk"
            )
        return starts

    def fill(
        self,
        starts: Sequence[int],
        encoded: Iterator[dict[int, np.ndarray | str]],
        photographs: _Photographs,
    ) -> None:
        """Write the batches that begin at ``starts``, and give the whole file its name."""
        with FileIO(self._part, "r+") as file:
            for start, values in zip(starts, encoded, strict=True):
                photographs.check(start, start + len(values))
                self._write(file, start, self._records(start, values))
            file.truncate(self._count * self._dtype.itemsize)
            os.fsync(file.fileno())
        os.replace(self._part, self.path)

    def _write(self, file: FileIO, start: int, records: np.ndarray) -> None:
        file.seek(start * self._dtype.itemsize)
        rest = memoryview(records.tobytes())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:  # its message has no name
            raise OSError(error.errno, error.strerror, str(self._part)) from None

    def _records(self, start: int, values: dict[int, np.ndarray | str]) -> np.ndarray:
        records = np.zeros(len(values), self._dtype)
        for index, value in values.items():
            if isinstance(value, str):
                records[index]["reason"] = value.encode()[:_REASON_BYTES]
            else:
                records[index]["rows"] = value
        records["checksum"] = [_checksum(i, record) for i, record in enumerate(records, start)]
        return records


@cache
def _is_whole(path: Path, dtype: np.dtype, photographs: int, stamp: object) -> bool:
    """Return whether all is there and right; read to the end but once while ``stamp`` lasts."""
    size = photographs * dtype.itemsize
    return path.stat().st_size == size and bool(_right(path, dtype, photographs).all())


def _right(path: Path, dtype: np.dtype, photographs: int) -> np.ndarray:
    """Return for each photograph whether its record is in a file, and is right."""
    right = np.zeros(photographs, bool)
    if there := min(path.stat().st_size // dtype.itemsize, photographs):
        records = np.memmap(path, dtype, "r", shape=(there,))
        right[:there] = [_checksum(i, r) == r["checksum"] for i, r in enumerate(records)]
    return right


def _checksum(index: int, record: np.void) -> int:
    """Return the checksum of a record at its index; of the record without its own checksum."""
    content = memoryview(record.tobytes())[: -np.dtype("<u4").itemsize]
    return zlib.crc32(content, zlib.crc32(f"{_FORMAT} {record.dtype} {index}".encode()))
