"""``describe_dataset``: a folder run spread over a Ray cluster, and continued where it ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from pyarrow import ArrowException
from pyarrow.fs import FileSystem, LocalFileSystem
from ray.data import Dataset

from captioner.cluster.listing import Given, Listed, home, listed
from captioner.cluster.parts import Part
from captioner.cluster.plan import Plan
from captioner.cluster.stages import ClusterError, Reading, Stages, Wanted, shard_row
from captioner.cluster.storage import Place, located, reachable, why
from captioner.cluster.workers import Workers, check_nodes, check_room, connected
from captioner.files import locked
from captioner.folder.checks import RunError
from captioner.folder.describe import record_settings
from captioner.folder.find import PassedOver
from captioner.folder.journal import lock_path
from captioner.folder.run import RunResult, WriteError
from captioner.generation.options import SearchOptions, TagOptions
from captioner.inference import Captioner
from captioner.model.checkpoint import default_path

__all__ = ["ClusterError", "describe_dataset"]

_NAMED = 100  # paths

# Shards of a worker in one dataset of Ray's. At its end workers are idle, and start anew after it.
_SHARDS_EACH = 64

PathLike = str | os.PathLike[str]


def describe_dataset(
    dataset_or_paths: Given,
    output: PathLike,
    *,
    model: PathLike | Sequence[PathLike] | None = None,
    filesystem: FileSystem | None = None,
    options: SearchOptions | None = None,
    tag_options: TagOptions | None = None,
    captions: bool = True,
    tags: bool = True,
    min_confidence: float = 0.0,
    address: str | None = None,
    concurrency: int = 1,
    num_cpus: int = 1,
    num_gpus: float = 0.0,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 32,
    shard_size: int = 256,
    decode_timeout: float = 30.0,
    overwrite: bool = False,
    progress: Callable[[RunResult], object] = lambda result: None,
    note: Callable[[str], object] = lambda text: None,
) -> RunResult:
    """Describe photographs on a Ray cluster, and return the counts.

    >>> from captioner.cluster import describe_dataset
    >>> describe_dataset(["s3://archive/photos"], "s3://archive/captions.parquet",
    ...                  concurrency=64, num_cpus=2)  # doctest: +SKIP
    RunResult(total=10482113, done=10482113, skipped=0, described=10481870, errors=243, ...)

    The records are those of a folder run. The output is a folder, with a file for each
    ``shard_size`` photographs in order. The same call continues a run, whatever ended it, with the
    photographs that it was begun with. What cannot be read gets an error record.

    Args:
        dataset_or_paths: Photographs and folders, or a dataset of Ray's whose column ``path`` has
            the photographs. Bytes that a dataset has are not used.
        output: A folder whose name ends in ``.jsonl`` or ``.parquet``, local or a URI.
        model: A checkpoint, or several as an ensemble, as for ``Captioner.load``.
        filesystem: Where the paths lie; without it, paths are local or URIs.
        options: How captions are searched for.
        tag_options: Which tags are given.
        captions: Whether captions are written.
        tags: Whether tags are.
        min_confidence: The least probability that a caption is right; others are left out.
        address: The cluster, if this process is not connected to one: ``HOST:PORT``, ``auto`` for
            the one on this machine, or ``local`` for a new one; by default ``RAY_ADDRESS``, or
            a new one.
        concurrency: How many workers hold a model each.
        num_cpus: The CPUs of each.
        num_gpus: The GPUs of each.
        device: Where the model computes, as for ``Captioner.load``.
        precision: The number type of its products, as for ``Captioner.load``.
        batch_size: How many photographs go through the model at a time.
        shard_size: The photographs of one file of the output.
        decode_timeout: The longest time to decode one photograph, in seconds.
        overwrite: Begin anew, in place of an output that is there.
        progress: Told the counts so far, at the beginning and after each file.
        note: Told what a person should know.

    Raises:
        RunError: The run cannot begin; nothing was written.
        CheckpointError: The model is none.
        ConfigError: The model cannot do what the options say.
        ClusterError: The run stopped on the way.
        WriteError: A file cannot be written any further.
    """
    if isinstance(dataset_or_paths, str | os.PathLike):
        raise TypeError(f"expected a list of paths, not one; write [{str(dataset_or_paths)!r}]")
    workers = Workers(
        concurrency=concurrency,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        device=device,
        precision=precision,
    )
    wanted = Wanted(options, tag_options, captions, tags, min_confidence, batch_size)
    files = _files(model)
    captioner = _checked(files, wanted)
    settings = {
        **record_settings(
            captioner,
            options,
            tag_options,
            captions=captions,
            tags=tags,
            min_confidence=min_confidence,
        ),
        "precision": precision,
        "photographs": _shown(dataset_or_paths),
        "shard_size": shard_size,
    }
    plan = Plan(output, settings)
    with _alone(plan.place), connected(address):
        check_room(workers)
        root = home(dataset_or_paths, filesystem)
        check_nodes(_on_disks(dataset_or_paths, root))
        if not plan.take_up(overwrite):
            plan.write(_photographs(dataset_or_paths, filesystem, note))
        reading = Reading(
            captioner.preprocessing,
            None if isinstance(root, LocalFileSystem) else root,
            num_cpus,
            decode_timeout,
        )
        stages = Stages(reading, wanted, workers, files, captioner.digest())
        return _carried_out(plan, stages, progress)


def _files(model: PathLike | Sequence[PathLike] | None) -> list[Path]:
    if model is None:
        return [default_path()]
    return [Path(file) for file in ([model] if isinstance(model, str | os.PathLike) else model)]


def _checked(files: Sequence[Path], wanted: Wanted) -> Captioner:
    """Return the model, loaded here; raises what it raises for a model or options of no use."""
    captioner = Captioner.load(files, device="cpu", precision="float32")
    if wanted.captions:
        captioner.check(wanted.options or SearchOptions())
        captioner.check_confidence(wanted.min_confidence)
    if wanted.tags:
        captioner.check_tags(wanted.tag_options or TagOptions())
    return captioner


def _shown(given: Given) -> str | list[str]:
    """Return how a plan calls its photographs: a long list by its digest."""
    if isinstance(given, Dataset):
        return "a dataset"
    paths = [os.fspath(path) for path in given]
    if len(paths) <= _NAMED:
        return paths
    digest = sha256(b"\0".join(map(os.fsencode, paths))).hexdigest()[:16]
    return f"{len(paths)} paths of SHA-256 {digest}"


def _on_disks(given: Given, root: FileSystem) -> list[str]:
    """Return the paths that all nodes must have."""
    if isinstance(given, Dataset) or not isinstance(root, LocalFileSystem):
        return []
    paths = (located(path).path for path in list(given)[:_NAMED])
    return [path for path in paths if os.path.lexists(path)]


@contextmanager
def _alone(place: Place) -> Iterator[None]:
    """Keep other runs out of an output, where it lies on a disk."""
    if not place.is_local:
        yield
        return
    folder = os.path.dirname(place.path)
    if not os.path.isdir(folder):
        raise RunError(f"output {place.path}: there is no folder {folder}")

    def refuse() -> None:
        raise RunError(f"{place.path}: another run is writing it")

    with reachable(place.path), locked(lock_path(place.path), refuse):
        yield


def _photographs(
    given: Given, filesystem: FileSystem | None, note: Callable[[str], object]
) -> list[Listed]:
    passed_over = PassedOver()
    photographs = listed(given, filesystem, passed_over)
    for text in passed_over.notes():
        note(text)
    if not photographs:
        shown = _shown(given)
        where = shown if isinstance(shown, str) else ", ".join(shown)
        raise RunError(f"no photographs in {where or 'an empty list'}")
    return photographs


def _carried_out(plan: Plan, stages: Stages, progress: Callable[[RunResult], object]) -> RunResult:
    """Describe the shards that have no part yet."""
    before = plan.done()
    result = RunResult(plan.total, errors=sum(part.errors for part in before.values()))
    result.skipped = result.done = sum(map(plan.size, before))
    progress(result)
    for shards in plan.missing(_SHARDS_EACH * stages.workers.concurrency):
        for row in stages.run([shard_row(*shard) for shard in shards]):
            part = Part(row["shard"], row["errors"])
            with _writing(plan.place):
                plan.keep(part, row["lines"])
            result.done += plan.size(part.shard)
            result.errors += part.errors
            result.described += plan.size(part.shard) - part.errors
            progress(result)
    with _writing(plan.place):
        plan.finish({"total": result.total, "errors": result.errors})
    return result


@contextmanager
def _writing(place: Place) -> Iterator[None]:
    """Turn an error of what writes into a ``WriteError``."""
    try:
        yield
    except (OSError, ArrowException) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise WriteError(number, why(error), place.path) from error
