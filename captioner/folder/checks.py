"""Checks before a folder run does any work: where it may write, and what would get in its way."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from captioner.data.example import coco_image_id
from captioner.folder.outputs import FORMS
from captioner.folder.report import is_report
from captioner.folder.sidecars import closed_folders, sidecar_path
from captioner.photos.workers import Found

__all__ = [
    "RunError",
    "check_folders",
    "check_image_ids",
    "check_not_read",
    "check_output",
    "check_report",
    "check_sidecars",
    "inode_of",
]

Inode = tuple[int, int]

_SHOWN = 5


class RunError(ValueError):
    """A run that cannot begin; the message says why, and what to do."""


def check_output(path: str, photographs: Iterable[Found], overwrite: bool) -> None:
    """Raise ``RunError`` where an output file cannot be written, or must not be."""
    _check_name("--output", path, FORMS)
    if os.path.lexists(path) and not overwrite:
        _check_existing(path, f"{path}.journal")
    if path.lower().endswith(".json"):
        check_image_ids(path for path, _ in photographs)


def check_report(path: str, overwrite: bool) -> None:
    """Raise ``RunError`` where a report cannot be written, or would replace something else."""
    _check_name("--report", path, (".html", ".htm"))
    if os.path.lexists(path) and not os.path.isfile(path):
        raise RunError(f"--report {path} is not a plain file")
    if os.path.lexists(path) and not overwrite and not is_report(path):
        raise RunError(f"--report {path} is something else; --overwrite replaces it")


def check_sidecars(photographs: Iterable[Found], kind: str, full_names: bool = False) -> None:
    """Raise ``RunError`` where two photographs would have the same sidecar."""
    advice = "; --full-names writes a.jpg.txt in place of a.txt, --exclude GLOB passes some over"
    images = (path for path, error in photographs if error is None)
    _check_different(images, lambda path: sidecar_path(path, kind, full_names), "sidecar", advice)


def check_folders(photographs: Iterable[Found], kinds: Iterable[str], alone: bool) -> str:
    """Return what to tell a person of folders that take no sidecars, if there are any.

    Raises ``RunError`` where records go nowhere but there (``alone``), and no folder takes any.
    """
    images = [path for path, error in photographs if error is None]
    closed = closed_folders(images)
    if not closed:
        return ""
    folders = _first([f"{folder} ({reason})" for folder, reason in closed.items()])
    text = f"--sidecar {', '.join(kinds)}: no file can be made in {folders}"
    if alone and closed.keys() >= {os.path.dirname(image) or "." for image in images}:
        raise RunError(f"{text}; --output FILE keeps records elsewhere")
    return text


def _check_name(option: str, path: str, endings: Sequence[str]) -> None:
    if not path.lower().endswith(tuple(endings)):
        raise RunError(f"{option} {path}: the name must end in {', '.join(endings)}")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise RunError(f"{option} {path}: there is no folder {folder}")


def _check_existing(output: str, journal: str) -> None:
    if not os.path.isfile(output):
        raise RunError(f"--output {output} is not a plain file")
    if not os.path.exists(journal):
        raise RunError(
            f"--output {output} exists, but not {journal}, without which it cannot be continued; "
            "--overwrite replaces it"
        )


def check_image_ids(images: Iterable[str]) -> None:
    """Raise ``RunError`` where a name has no COCO image id, or two have the same."""
    images = list(images)
    if without := [path for path in images if coco_image_id(path) is None]:
        raise RunError(f"{_first(without)}: a name ends in no number to be a COCO image id")
    _check_different(images, coco_image_id, "COCO image id")


def _check_different(
    images: Iterable[str], of: Callable[[str], object], what: str, advice: str = ""
) -> None:
    paths: dict[object, list[str]] = defaultdict(list)
    for path in images:
        paths[of(path)].append(path)
    same = [
        f"{' and '.join(group)} have the same {what}, {value}"
        for value, group in paths.items()
        if len(group) > 1
    ]
    if same:
        raise RunError(_first(same) + advice)


def _first(names: Sequence[str]) -> str:
    """Return a list for a person: five at most, and how many more there are."""
    more = [f"and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    return "; ".join([*names[:_SHOWN], *more])


def check_not_read(written: Iterable[str], photographs: set[Inode], model: set[Inode]) -> None:
    """Raise ``RunError`` where a file that would be written is one that is read.

    Args:
        written: paths, of which there may be nothing yet.
        photographs: the photographs to read, by device and inode: two names may be one file.
        model: the files of the model.
    """
    clashes = []
    for path in written:
        inode = inode_of(path)
        if inode in photographs or inode in model:
            of = "a photograph to read" if inode in photographs else "a file of the model"
            clashes.append(f"{path} is {of}")
    if clashes:
        raise RunError(f"the run would write over what it reads: {_first(clashes)}")


def inode_of(path: str | os.PathLike[str]) -> Inode | None:
    """Return the device and inode of a file, if it is there."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino
