"""The two stages on the nodes of a cluster: photographs are read in one, described in the next.

A row of the dataset is a shard. Ray's own readers end the whole job over one file that cannot be
read (``read_binary_files``), or say nothing of the reason (``download``), and both take a file into
memory whatever its size. So the first stage reads the files of a shard itself, from any pyarrow
file system, and in the processes of a folder run: a decoder that crashes costs one photograph.

Where both stages ask for the same resources, Ray runs them as one, in the same process, and no
pixels are copied. Workers on GPUs get theirs from reading tasks on any node.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from pyarrow import ArrowException
from pyarrow.fs import FileSystem
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from captioner.cluster.listing import Listed
from captioner.cluster.storage import why
from captioner.cluster.workers import Workers, cause_of
from captioner.config import Preprocessing
from captioner.files import Record, as_json
from captioner.folder.describe import describe_read, read_photograph
from captioner.generation.options import SearchOptions, TagOptions
from captioner.photos.images import UnreadableError
from captioner.photos.workers import DecodingError, Found, ReadingProcesses

__all__ = [
    "MOST_BYTES",
    "ClusterError",
    "Describe",
    "Reading",
    "Row",
    "Stages",
    "Wanted",
    "read",
    "shard_row",
]

Row = dict[str, Any]

MOST_BYTES = 1_000_000_000
"""A file with more bytes is no photograph to read: it could fill the disk of a node."""

_CHUNK = 1 << 20
# Of an object store, most of the time of a small file is waiting for it.
_FETCHED_TOGETHER = 16


class ClusterError(RuntimeError):
    """A run that stopped on the way; the message says why, and the same run can be continued."""


@dataclass(frozen=True)
class Reading:
    """How the photographs of a shard become pixels.

    Attributes:
        preprocessing: that of the model.
        filesystem: where the photographs lie; ``None`` is the disk of each node.
        workers: how many processes of a node decode for one task.
        timeout: the longest time to decode one photograph, in seconds.
    """

    preprocessing: Preprocessing
    filesystem: FileSystem | None
    workers: int
    timeout: float


@dataclass(frozen=True)
class Wanted:
    """What is described and how; each field is as for ``describe_dataset``."""

    options: SearchOptions | None
    tag_options: TagOptions | None
    captions: bool
    tags: bool
    min_confidence: float
    batch_size: int


def shard_row(shard: int, photographs: Sequence[Listed]) -> Row:
    """Return a row of the dataset that the stages map.

    Lists are pickled: as columns of Arrow, names would have to be UTF-8, and bytes of one length
    would lose zeros at their ends.
    """
    return {"shard": shard, "photographs": pickle.dumps(list(photographs))}


def read(row: Row, reading: Reading) -> Row:
    """Return a shard with the pixels of its photographs, or why there are none."""
    photographs: list[Listed] = pickle.loads(row["photographs"])
    images: list[bytes | str] = []
    failure = ""
    try:
        processes = _processes(reading)
        with (
            TemporaryDirectory(prefix="captioner-") as folder,
            ThreadPoolExecutor(_FETCHED_TOGETHER) as threads,
        ):
            one = partial(_read_one, processes, reading.filesystem, Path(folder))
            found = threads.map(one, range(len(photographs)), photographs)
            # An error travels as its text.
            images = [
                str(image) if isinstance(image, UnreadableError) else image for image in found
            ]
    except (DecodingError, OSError) as error:  # no process, or a disk that is full
        failure = f"reading failed on node {_node()}: {why(error)}"
    names = [photograph.image for photograph in photographs]
    return {"shard": row["shard"], "images": pickle.dumps((names, images)), "failure": failure}


def _read_one(
    processes: ReadingProcesses,
    filesystem: FileSystem | None,
    folder: Path,
    index: int,
    photograph: Listed,
) -> bytes | UnreadableError:
    path, copy = photograph.path, folder / str(index)
    image: bytes | UnreadableError
    try:
        if photograph.error is None and filesystem is not None:
            path = str(copy)
            _fetch(filesystem, photograph.path, path)
        elif photograph.error is None:
            _check_bytes(_size(path))
        image = processes.submit(Found(path, photograph.error)).result()
    except UnreadableError as error:
        image = error
    finally:
        copy.unlink(missing_ok=True)
    if isinstance(image, UnreadableError):
        # Where a copy lies says nothing to a person.
        return UnreadableError(str(image).replace(path, photograph.image))
    return image


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return 0  # whoever opens it says why it cannot be read


def _fetch(filesystem: FileSystem, path: str, target: str) -> None:
    """Copy a file to this node's disk, never all of it in memory.

    Raises ``UnreadableError`` for what cannot be read, and ``OSError`` where the disk is full.
    """
    with open(target, "wb") as file:
        for chunk in _chunks(filesystem, path):
            _check_bytes(file.tell() + len(chunk))
            file.write(chunk)


def _chunks(filesystem: FileSystem, path: str) -> Iterator[bytes]:
    try:
        with filesystem.open_input_stream(path) as source:
            while chunk := source.read(_CHUNK):
                yield chunk
    except FileNotFoundError:
        raise UnreadableError("no such file") from None
    except (OSError, ArrowException) as error:
        raise UnreadableError(f"cannot be fetched: {why(error)}") from None


def _check_bytes(count: int) -> None:
    if count > MOST_BYTES:
        raise UnreadableError(f"too large to read: more than {MOST_BYTES:,} bytes")


def _processes(reading: Reading) -> ReadingProcesses:
    """Return the processes that decode for this one, which serves many shards.

    They end with this process: then nobody asks them any more.
    """
    with _starting:
        return _started(reading.preprocessing, reading.workers, reading.timeout)


_starting = threading.Lock()


@cache
def _started(preprocessing: Preprocessing, workers: int, timeout: float) -> ReadingProcesses:
    return ReadingProcesses(partial(read_photograph, preprocessing), workers, timeout)


class Describe:
    """The second stage: a process that holds a model, and describes one shard at a time."""

    def __init__(
        self,
        model: Sequence[ray.ObjectRef],
        wanted: Wanted,
        digest: str,
        device: str,
        precision: str,
        threads: int,
    ) -> None:
        """Load the model.

        Args:
            model: The bytes of its checkpoint, or of those of an ensemble, in Ray's object store:
                its file need not be on the nodes.
            wanted: What is described.
            digest: That of the model where it was checked.
            device: As for ``Captioner.load``.
            precision: As for ``Captioner.load``.
            threads: How many the model may use.
        """
        self._wanted = wanted
        self._lock = threading.Lock()
        self._failure = ""
        # Ray would start the process again and again over an error here, and show its traceback.
        try:
            self._captioner = _loaded(model, device, precision, threads)
            if self._captioner.digest() != digest:
                raise RuntimeError("it has another version of captioner, or of what runs it")
        except Exception as error:
            self._failure = f"the model cannot be used on node {_node()}: {why(error)}"

    def __call__(self, row: Row) -> Row:
        """Return a shard's records as JSON lines, and how many are errors; or what failed."""
        lines: list[bytes] = []
        errors, failure = 0, row["failure"] or self._failure
        if not failure:
            try:
                records = self._records(*pickle.loads(row["images"]))
                lines = [as_json(record) + b"\n" for record in records]
                errors = sum("error" in record for record in records)
            except Exception as error:
                failure = f"describing failed on node {_node()}: {why(error)}"
        return {
            "shard": row["shard"], "lines": b"".join(lines), "errors": errors, "failure": failure,
        }  # fmt: skip

    def _records(self, names: Sequence[str], read: Sequence[bytes | str]) -> list[Record]:
        images = [UnreadableError(image) if isinstance(image, str) else image for image in read]
        wanted, size = self._wanted, self._wanted.batch_size
        records: list[Record] = []
        # While one shard is described the next is read, in another thread of this process.
        with self._lock:
            for start in range(0, len(images), size):
                records += describe_read(
                    self._captioner,
                    images[start : start + size],
                    wanted.options,
                    captions=wanted.captions,
                    tags=wanted.tags,
                    tag_options=wanted.tag_options,
                    min_confidence=wanted.min_confidence,
                )
        return [{"image": name} | record for name, record in zip(names, records, strict=True)]


def _loaded(model: Sequence[ray.ObjectRef], device: str, precision: str, threads: int) -> Any:
    import torch

    from captioner.inference import Captioner
    from captioner.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    with TemporaryDirectory(prefix="captioner-") as folder:
        files = [Path(folder, f"{index}.safetensors") for index in range(len(model))]
        for file, content in zip(files, ray.get(list(model)), strict=True):
            file.write_bytes(content)
        return Captioner.load(files, device=device, precision=precision)


def _node() -> str:
    return str(ray.util.get_node_ip_address())


@dataclass(frozen=True)
class Stages:
    """The stages as they run on a cluster.

    Attributes:
        reading: how photographs are read.
        wanted: what is described.
        workers: the processes that describe.
        files: the checkpoints of the model, on this machine.
        digest: the model's.
    """

    reading: Reading
    wanted: Wanted
    workers: Workers
    files: Sequence[Path]
    digest: str

    def run(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Yield the shards of some rows as they get done, each once, in any order.

        Ray does again what was lost with a node or a process. Raises ``ClusterError`` for what
        doing it again would not mend.
        """
        workers = self.workers
        model = [ray.put(file.read_bytes()) for file in self.files]
        resources = {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus or None}
        with _quiet():
            # A block a shard: what is lost, done again and waits for the next stage.
            dataset = (
                ray.data.from_items(list(rows), override_num_blocks=len(rows))
                .map(read, fn_kwargs={"reading": self.reading}, num_cpus=workers.num_cpus)
                .map(
                    Describe,
                    fn_constructor_args=(
                        model,
                        self.wanted,
                        self.digest,
                        workers.device,
                        workers.precision,
                        workers.num_cpus,
                    ),
                    compute=_pool(workers.concurrency),
                    **resources,
                )
            )
            try:
                for row in dataset.iter_rows():
                    if row["failure"]:
                        raise ClusterError(row["failure"])
                    yield row
            except RayError as error:
                raise ClusterError(f"Ray stopped: {cause_of(error)}") from error


def _pool(concurrency: int) -> ActorPoolStrategy:
    """Return a pool that begins at its full size, and may shrink to what is left of a cluster.

    Two shards are in a process at a time: one is described while the next is read.
    """
    return ActorPoolStrategy(
        min_size=1,
        max_size=concurrency,
        initial_size=concurrency,
        max_concurrent_calls_per_actor=2,
        enable_true_multi_threading=True,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the bars and plans that Ray Data shows: a run has its own progress."""
    context, log = DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        log.setLevel(level)
