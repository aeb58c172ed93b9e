"""Names of photographs as a file spells them, found among the names that there are.

Annotations travel between machines: a name may have backslashes, another Unicode normal form,
other upper and lower case, or the folders of the machine where it was written.
"""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from captioner.settings import shown

__all__ = ["MISSING", "Resolved", "resolve", "resolve_in_folder", "spelling_notes", "wrong_name"]

MISSING = "it is missing"
"""Why a name is refused that no known name fits."""

_SHOWN = 3


class Resolved(NamedTuple):
    """The matches of wanted names with known names."""

    found: dict[str, str]
    """The known name of each wanted name that has one."""
    refused: dict[str, str]
    """Why each other wanted name has none."""
    spellings: dict[str, str]
    """How each name differs that was found under another spelling."""


class _Spelling(NamedTuple):
    """A name, split at slashes and backslashes, without drive and root."""

    parts: tuple[str, ...]
    absolute: bool

    def key(self, start: int = 0) -> str:
        """Return the parts from ``start`` on as they are compared."""
        return _fold("/".join(self.parts[start:]))


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _fold(text: str) -> str:
    # Case folding may undo a normal form, so that it stands between two of them.
    return _composed(_composed(text).casefold())


def _split(name: str) -> _Spelling:
    path = PureWindowsPath(name)  # it knows both kinds of slashes
    return _Spelling(path.parts[bool(path.anchor) :], bool(path.root))


def wrong_name(name: object) -> str:
    """Return what is wrong with the name of a photograph, or "" where nothing is.

    A name that leads out of its folder by ``..`` is wrong. An absolute path is not, because only
    its end is looked for in the folder.
    """
    if not isinstance(name, str) or not name:
        return f"expected the name of a photograph, found {shown(name)}"
    if ".." in _split(name).parts:
        return f"{shown(name)} leaves the image folder"
    return ""


def resolve(
    wanted: Iterable[str],
    exists: Callable[[str], bool],
    known: Callable[[], Iterable[str]],
    tails: bool = False,
) -> Resolved:
    """Return the known name that each wanted name stands for.

    A name that exists as it is spelled stands for itself. Another one stands for the only known
    name that differs from it by slashes, normal form or case, where no other wanted name stands
    for that one too. Of an absolute path, a known name may be the end.

    Args:
        wanted: The names, as a file spells them.
        exists: Whether a name is known as it is spelled.
        known: All known names; asked for only when a wanted name is not among them.
        tails: Whether names agree by their ends; the known name of the longest one is found.
    """
    found: dict[str, str] = {}
    others: list[str] = []
    for name in dict.fromkeys(wanted):
        if exists(name):
            found[name] = name
        else:
            others.append(name)
    index = _Index(known(), tails) if others else None
    fits = {name: index.fits(name) for name in others} if index else {}
    wanting: dict[str, list[str]] = defaultdict(list)
    for name in (*found, *(name for name, fit in fits.items() if len(fit) == 1)):
        wanting[found[name] if name in found else fits[name][0]].append(name)
    refused, spellings = {}, {}
    for name, fit in fits.items():
        if len(fit) == 1 and wanting[fit[0]] == [name]:
            found[name], spellings[name] = fit[0], _difference(name, fit[0])
        else:
            refused[name] = _why(name, fit, wanting)
    return Resolved(found, refused, spellings)


class _Index:
    """Known names by the form in which they are compared, with ``tails`` also of their ends."""

    def __init__(self, known: Iterable[str], tails: bool) -> None:
        self._tails = tails
        self._names: dict[str, list[str]] = defaultdict(list)
        for name in known:
            spelling = _split(name)
            for start in range(len(spelling.parts) if tails else 1):
                self._names[spelling.key(start)].append(name)

    def fits(self, name: str) -> list[str]:
        """Return the known names that a wanted one may stand for."""
        spelling = _split(name)
        starts = range(len(spelling.parts)) if spelling.absolute or self._tails else range(1)
        found = [self._names.get(spelling.key(start), []) for start in starts]
        if self._tails:  # the longest end that they have in common
            fits = next(filter(None, found), [])
        else:
            fits = [fit for names in found for fit in names]
        if len(fits) > 1:  # one that differs by slashes or normal form alone is nearer
            near = [fit for fit in fits if _difference(name, fit) != _CASE]
            fits = near if len(near) == 1 else fits
        return fits


_CASE = "upper and lower case"


def _difference(name: str, known: str) -> str:
    """Return how a wanted name differs from the known one that it stands for."""
    ours, theirs = _split(name), _split(known)
    pairs = list(zip(reversed(ours.parts), reversed(theirs.parts), strict=False))
    same = [pair for pair in pairs if _fold(pair[0]) == _fold(pair[1])]
    if any(_composed(our) != _composed(their) for our, their in same):
        return _CASE
    if any(our != their for our, their in same):
        return "Unicode normal form"
    whole = len(same) == len(ours.parts) == len(theirs.parts) and not ours.absolute
    return "backslashes" if whole else "the folders before it"


def _why(name: str, fit: list[str], wanting: dict[str, list[str]]) -> str:
    if len(fit) > 1:
        more = f" and {len(fit) - 2:,} more" if len(fit) > 2 else ""
        return f"{shown(fit[0])} and {shown(fit[1])}{more} fit its name"
    if fit:
        other = next(other for other in wanting[fit[0]] if other != name)
        return f"only {shown(fit[0])} fits its name, and it is also that of {shown(other)}"
    return MISSING


def resolve_in_folder(wanted: Iterable[str], folder: Path) -> Resolved:
    """Return which files in a folder, or below it, the wanted names stand for; see :func:`resolve`.

    The found names are paths below the folder. An absolute path that leads into it is as good as
    the rest of that path.
    """
    root = os.path.join(os.path.abspath(folder), "")
    below = {name: name.removeprefix(root) for name in wanted}

    def exists(name: str) -> bool:
        # What lies elsewhere on this machine is none of the folder's photographs.
        return not os.path.isabs(name) and os.path.isfile(os.path.join(folder, name))

    resolved = resolve(below.values(), exists, lambda: _files(folder))
    return Resolved(*({n: part[b] for n, b in below.items() if b in part} for part in resolved))


def _files(folder: Path) -> Iterator[str]:
    """Yield the files in a folder and below it, as paths from there; no folder is read twice."""
    seen: set[tuple[int, int]] = set()
    folders = [""]
    while folders:
        inner = folders.pop()
        try:
            status = os.stat(folder / inner)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted((entry.name, entry.is_dir()) for entry in os.scandir(folder / inner))
        except OSError:
            continue  # its photographs are missing, each with its own reason
        folders += [os.path.join(inner, name) for name, is_folder in entries if is_folder]
        yield from (os.path.join(inner, name) for name, is_folder in entries if not is_folder)


def spelling_notes(resolved: Resolved) -> Iterator[str]:
    """Yield how many names were found under another spelling, and the first few of each kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name, kind in resolved.spellings.items():
        kinds[kind].append(name)
    for kind, names in kinds.items():
        pairs = (f"{shown(name)} is {shown(resolved.found[name])}" for name in names[:_SHOWN])
        more = f", and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
        count = f"{len(names):,} photograph{'s' if len(names) > 1 else ''}"
        yield f"{count} found under a name that differs by {kind}: {', '.join(pairs)}{more}"
