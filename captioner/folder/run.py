"""A run over many photographs that is continued: what is left to do of it, and its records."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

from captioner.files import Record
from captioner.folder.journal import Journal
from captioner.folder.outputs import Output
from captioner.folder.sidecars import Sidecars
from captioner.photos.workers import Found

__all__ = ["Part", "catch_up", "keep", "plan"]


class Part(NamedTuple):
    """What one call of ``describe_folder`` is to do: ``photographs`` but those in ``done``."""

    photographs: Iterable[Found]
    done: Container[str]


def plan(photographs: Sequence[Found], journal: Journal, retry_errors: bool = False) -> list[Part]:
    """Return what is left to do of a run, in the order and the batches it was begun with.

    Photographs that are new come at the end, and then, with ``retry_errors``, those that have
    an error record. Those of earlier runs that were not asked for this time are passed over.
    """
    asked = {found.path: found.error for found in photographs}
    failed = [Found(path, asked[path]) for path in asked if path in journal.errors]
    journal.add(asked)
    everything = journal.photographs
    skipped = {path for path in everything if path not in asked}
    parts = [Part((Found(p, asked.get(p)) for p in everything), journal.done | skipped)]
    if retry_errors:
        parts.append(Part(failed, frozenset()))
    return parts


def keep(
    records: Iterable[Record],
    output: Output,
    journal: Journal | None = None,
    sidecars: Sidecars | None = None,
) -> Iterator[Record]:
    """Write each record wherever it goes, then yield it; raises ``OSError`` when that fails."""
    for record in records:
        if sidecars is not None:
            record = sidecars.write(record)
        if journal is not None:
            journal.write(record)
        output.write(record)
        yield record


def catch_up(journal: Journal, sidecars: Sidecars) -> None:
    """Write the sidecars of what was done before there were to be any."""
    for record in journal.records():
        written = sidecars.write(record)
        if written is not record:
            journal.write(written)
