"""``FolderRun``: many photographs described into files, and continued where a run ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from captioner.files import Record, check_replaceable, remove_leftovers
from captioner.folder.checks import (
    RunError,
    check_folders,
    check_image_ids,
    check_not_read,
    check_output,
    check_report,
    check_sidecars,
    inode_of,
)
from captioner.folder.describe import describe_folder, found_of, record_settings
from captioner.folder.find import PassedOver
from captioner.folder.identity import Photograph, changed, distinct, gone, named, stamp_of
from captioner.folder.journal import Journal, JournalError, Stamp, lock_path
from captioner.folder.outputs import CocoFile, ErrorStream, Output, output_file
from captioner.folder.report import write_report
from captioner.folder.sidecars import Sidecars, sidecar_path
from captioner.generation.describer import Describer
from captioner.generation.options import SearchOptions, TagOptions
from captioner.photos.workers import DecodingError, Found

__all__ = ["FolderRun", "RunError", "RunResult", "WriteError"]


class WriteError(OSError):
    """A file of a run that could not be written any further; the same run can be continued."""


@dataclass
class RunResult:
    """The counts of a run, of the photographs that it was asked for.

    Attributes:
        total: the photographs, each counted once.
        done: those that have a record, or are passed over as they have their sidecar.
        skipped: those that an earlier run had done.
        described: those that this run described.
        errors: those that have an error record, of this run or of an earlier one.
        left_alone: the sidecars that held something else and were not written.
        sidecar_errors: those that could not be written; their records have ``sidecar_error``.
        report_error: why the report could not be written, if that is so.
        changed: the photographs that are others than when they were described.
        gone: the records of photographs that are gone.
        pruned: the records that were dropped as their photographs are gone.
        torn: whether the last line of the journal was cut off, and done again.
    """

    total: int
    done: int = 0
    skipped: int = 0
    described: int = 0
    errors: int = 0
    left_alone: int = 0
    sidecar_errors: int = 0
    report_error: str | None = None
    changed: int = 0
    gone: int = 0
    pruned: int = 0
    torn: bool = False


@dataclass(frozen=True, kw_only=True)
class FolderRun:
    """A run over many photographs that can be killed at any moment and continued.

    >>> from captioner import Captioner
    >>> from captioner.folder import FolderRun
    >>> run = FolderRun(output="captions.jsonl", sidecar="xmp", report="captions.html")
    >>> run.run(Captioner.load(), ["photos"])  # doctest: +SKIP
    RunResult(total=1204, done=1204, skipped=0, described=1201, errors=3, ...)

    The same run does only what is left: new photographs come at the end of the output, and what
    is there already stays as it is. ``FILE.journal`` beside the output (or the report) holds
    what was done; without either, a photograph is done once it has its sidecar. A photograph is
    known by its absolute path, size and time; records have it as it was spelled first.

    Attributes:
        output: a file, ``.jsonl``, ``.csv``, ``.json`` (COCO results) or ``.sqlite``, or an
            ``Output``, to which the records go as they are made. Records that go to an ``Output``
            alone are not kept.
        sidecar: a kind in ``SIDECARS``, or several: a file of each is written beside each
            photograph.
        report: an HTML file, a page to look through the results.
        full_names: name sidecars ``dog.jpg.txt``, not ``dog.txt``; XMP is always named so.
        exclude: globs of files and folders to pass over, as in :func:`find_photographs`.
        overwrite: begin anew, and replace files that exist; of sidecars, those of earlier runs.
        retry_errors: try again what could not be read before.
        retry_changed: describe again what has another size or time than when it was described.
        prune: drop the records of photographs that are no longer there. A folder in which no
            photograph at all is found may be an absent disk: its records stay.
        protect: files that the run must not write to, such as the model's.
        captions: whether captions are written.
        tags: whether tags are.
        min_confidence: the least probability that a caption is right; other captions are left out.
        batch_size: how many photographs go through the model at a time.
        workers: how many processes read photographs.
        decode_timeout: the longest time to read one photograph, in seconds.
        progress: told the counts so far, at the beginning and after each photograph.
        note: told what a person should know: what was passed over, and what could not be written.
    """

    output: str | os.PathLike[str] | Output | None = None
    sidecar: str | Sequence[str] | None = None
    report: str | os.PathLike[str] | None = None
    full_names: bool = False
    exclude: Sequence[str] = ()
    overwrite: bool = False
    retry_errors: bool = False
    retry_changed: bool = False
    prune: bool = False
    protect: Sequence[str | os.PathLike[str]] = ()
    captions: bool = True
    tags: bool = True
    min_confidence: float = 0.0
    batch_size: int = 32
    workers: int = 2
    decode_timeout: float = 30.0
    progress: Callable[[RunResult], object] = lambda result: None
    note: Callable[[str], object] = lambda text: None

    def run(
        self,
        captioner: Describer[Any] | Callable[[], Describer[Any]],
        paths: Iterable[str | os.PathLike[str] | Found],
        options: SearchOptions | None = None,
        tag_options: TagOptions | None = None,
    ) -> RunResult:
        """Describe what is left of the photographs, and return the counts.

        Args:
            captioner: the model, or a function that loads it; it is called once everything else
                has been checked, and only if there are photographs.
            paths: photographs and folders, as :func:`find_photographs` takes them.
            options: how captions are searched for.
            tag_options: which tags are given.

        Raises:
            RunError: the run cannot begin; nothing was written.
            WriteError: a file cannot be written any further.
            ConfigError: the model cannot do what the options say.
            DecodingError: there is no process to read photographs with.

        """
        asked = list(paths)
        passed_over = PassedOver()
        photographs, inodes = distinct(found_of(asked, self.exclude, passed_over))
        for text in passed_over.notes():
            self.note(text)
        self._check([photograph.found for photograph in photographs], inodes)
        if not photographs:
            return RunResult(0)
        loaded = captioner() if callable(captioner) else captioner
        if self.captions and options is not None:
            loaded.check(options)
        if self.captions:
            loaded.check_confidence(self.min_confidence)
        if self.tags and tag_options is not None:
            loaded.check_tags(tag_options)
        with self._journal(loaded, options, tag_options) as journal:
            folders = [_spelled(path) for path in asked if not isinstance(path, Found)]
            work = _Work(self, loaded, options, tag_options, photographs, folders, journal)
            work.describe()
            if self.report is not None and journal is not None:
                work.write_report(", ".join(_spelled(path) for path in asked))
            work.tell()
            return work.result

    @property
    def journal_path(self) -> str | None:
        """Where the journal lies, if the run has one."""
        output = self.output if isinstance(self.output, str | os.PathLike) else self.report
        return None if output is None else f"{os.fspath(output)}.journal"

    def _check(self, found: Sequence[Found], inodes: set[tuple[int, int]]) -> None:
        """Raise ``RunError`` for what would keep the run from its end; write nothing."""
        for option in ("retry_errors", "retry_changed", "prune"):
            if getattr(self, option) and self.journal_path is None:
                flag = f"--{option.replace('_', '-')}"
                raise RunError(f"{flag} needs --output FILE, beside which earlier runs are kept")
        if isinstance(self.output, str | os.PathLike):
            check_output(os.fspath(self.output), found, self.overwrite)
        if self.report is not None:
            check_report(os.fspath(self.report), self.overwrite)
        for kind in self.kinds:
            check_sidecars(found, kind, self.full_names)
        model = {inode for path in self.protect if (inode := inode_of(path)) is not None}
        check_not_read(self._written(found), inodes, model)
        if self.kinds and (closed := check_folders(found, self.kinds, self.sidecars_alone)):
            self.note(closed)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sidecars, each once."""
        kinds = (self.sidecar,) if isinstance(self.sidecar, str) else self.sidecar or ()
        return tuple(dict.fromkeys(kinds))

    @property
    def sidecars_alone(self) -> bool:
        """Whether records go nowhere but into sidecars."""
        elsewhere = self.output is not None and not isinstance(self.output, ErrorStream)
        return bool(self.kinds) and self.report is None and not elsewhere

    def _written(self, found: Iterable[Found]) -> Iterator[str]:
        """Yield what the run writes to, apart from new files beside these."""
        for path in (self.output, self.report):
            if isinstance(path, str | os.PathLike):
                yield os.fspath(path)
        if self.journal_path is not None:
            yield from (self.journal_path, lock_path(self.journal_path))
        for path, _ in found if self.kinds else ():
            yield from (sidecar_path(path, kind, self.full_names) for kind in self.kinds)

    @contextmanager
    def _journal(
        self,
        captioner: Describer[Any],
        options: SearchOptions | None,
        tag_options: TagOptions | None,
    ) -> Iterator[Journal | None]:
        path = self.journal_path
        if path is None:
            yield None
            return
        settings = record_settings(
            captioner,
            options,
            tag_options,
            captions=self.captions,
            tags=self.tags,
            min_confidence=self.min_confidence,
        )
        try:
            with _beginning():
                journal = Journal(path, settings, self.overwrite)
        except JournalError as error:
            raise RunError(str(error)) from error
        with journal:
            yield journal


class _Work:
    """The work of a run between its checks and its end."""

    def __init__(
        self,
        run: FolderRun,
        captioner: Describer[Any],
        options: SearchOptions | None,
        tag_options: TagOptions | None,
        photographs: Sequence[Photograph],
        folders: Sequence[str],
        journal: Journal | None,
    ) -> None:
        self._run, self._captioner, self._options = run, captioner, options
        self._tag_options, self._folders = tag_options, folders
        self._journal = journal
        self._photographs = {p.found.path: p for p in photographs}
        if journal is not None:
            self._photographs = named(photographs, journal)
        self._images = {p.found.path: image for image, p in self._photographs.items()}
        self._stamps: dict[str, Stamp | None] = {}
        self._sidecars = _sidecars(run)
        self._output = _output(run)
        self._failed: set[str] = set()
        self.result = RunResult(len(photographs))
        self._begin()

    def _begin(self) -> None:
        """Take out what is gone, write anew what is there, and find out what can be written."""
        run, journal, result = self._run, self._journal, self.result
        with _beginning():
            if journal is not None:
                no_more = gone(self._photographs, journal, self._folders)
                without = len(journal.done & set(no_more))
                if run.prune:
                    journal.drop(no_more)
                result.gone, result.pruned = (0, without) if run.prune else (without, 0)
                result.torn = journal.torn > 0
                if isinstance(self._output, CocoFile):
                    check_image_ids({**journal.photographs, **self._photographs})
                for path in (run.output, run.report):
                    if journal.alone and isinstance(path, str | os.PathLike):
                        remove_leftovers(os.fspath(path))
            if run.report is not None:
                check_replaceable(os.fspath(run.report))
            self._output.start(self._records())

    def describe(self) -> None:
        """Describe what is left, and write each record wherever it goes."""
        try:
            parts = self._parts()
            self.result.errors = len(self._failed)
            self.result.done = self.result.skipped
            self._run.progress(self.result)
            for part in parts:
                for record in self._described(part):
                    with _writing():
                        self._keep(record)
                    self._run.progress(self.result)
        finally:
            self._finish()

    def write_report(self, title: str) -> None:
        """Write the page of all records in the journal; that failing costs nothing else."""
        run, journal = self._run, self._journal
        assert run.report is not None
        assert journal is not None
        paths = journal.photographs
        try:
            write_report(
                os.fspath(run.report),
                ({**record, "path": paths[record["image"]]} for record in journal.records()),
                len(journal.done),
                len(journal.errors),
                title=title or "captioner",
                fit=self._captioner.preprocessing.fit,
                workers=run.workers,
                decode_timeout=run.decode_timeout,
            )
        except (OSError, DecodingError) as error:
            self.result.report_error = getattr(error, "strerror", None) or str(error)

    def tell(self) -> None:
        """Tell what could not be written."""
        for text in self._sidecars.notes() if self._sidecars else ():
            self._run.note(text)
        if why := self.result.report_error:
            self._run.note(
                f"cannot write {self._run.report}: {why}; the records are safe, and the same run "
                "writes it again"
            )

    def _records(self) -> Iterator[Record]:
        return iter(()) if self._journal is None else self._journal.records()

    def _parts(self) -> list[_Part]:
        """Return what is left to do, in the order and the batches the run was begun with.

        Photographs that are new come at the end, and then those that are to be tried again. Those
        of earlier runs that were not asked for this time are passed over.
        """
        asked, journal = self._photographs, self._journal
        if journal is None:
            done = self._with_sidecars()
            self.result.skipped = len(done)
            return [_Part([p.found for p in asked.values()], done)]
        with _writing():
            self._catch_up(journal)
            journal.add({image: photograph.path for image, photograph in asked.items()})
        finished = journal.done
        self._failed = journal.errors & asked.keys()
        others = {image: path for image, path in journal.photographs.items() if image not in asked}
        everything = [
            Found(others[image]) if image in others else asked[image].found
            for image in journal.photographs
        ]
        done = {asked[image].found.path for image in finished & asked.keys()}
        again = self._again(journal)
        self.result.skipped = len(done) - len(again)
        return [
            _Part(everything, done | set(others.values())),
            _Part([asked[image].found for image in again], frozenset()),
        ]

    def _again(self, journal: Journal) -> list[str]:
        """Return the images that have a record and are to have another."""
        run = self._run
        others = changed(self._photographs, journal)
        self.result.changed = 0 if run.retry_changed else len(others)
        again = set(others if run.retry_changed else ())
        again |= self._failed if run.retry_errors else set()
        return [image for image in self._photographs if image in again]

    def _with_sidecars(self) -> set[str]:
        """Return the photographs that are done where sidecars are the only output."""
        sidecars = self._sidecars
        if sidecars is None or not self._run.sidecars_alone:
            return set()
        return {path for path in self._photographs if sidecars.has(path)}

    def _catch_up(self, journal: Journal) -> None:
        """Write the sidecars of what was done before there were to be any, or could be any."""
        for record in journal.records() if self._sidecars is not None else ():
            photograph = self._photographs.get(record["image"])
            if photograph is not None:
                written = self._with_sidecar(record, photograph.found.path)
                if written is not record:
                    journal.write(written, journal.stamp(record["image"]))

    def _with_sidecar(self, record: Record, path: str, again: bool = False) -> Record:
        """Write the sidecar of a photograph at a path; return the record, or what became of it."""
        if self._sidecars is None:
            return record
        ours = {**record, "image": path}
        written = self._sidecars.write(ours, again)
        return record if written is ours else {**written, "image": record["image"]}

    def _described(self, part: _Part) -> Iterator[Record]:
        run = self._run
        return describe_folder(
            self._captioner,
            self._stamped(part),
            options=self._options,
            captions=run.captions,
            tags=run.tags,
            min_confidence=run.min_confidence,
            attention=run.report is not None and run.captions,
            tag_options=self._tag_options,
            batch_size=run.batch_size,
            workers=run.workers,
            decode_timeout=run.decode_timeout,
            done=part.done,
        )

    def _stamped(self, part: _Part) -> Iterator[Found]:
        """Yield photographs, each stamped before it is read: a later change shows next time."""
        for found in part.photographs:
            if self._journal is not None and found.path not in part.done:
                self._stamps[found.path] = stamp_of(found.path)
            yield found

    def _keep(self, record: Record) -> None:
        """Write a record wherever it goes, and count it."""
        path = record["image"]
        image = self._images[path]
        again = self._journal is not None and self._journal.has(image)
        record = self._with_sidecar({**record, "image": image}, path, again)
        if self._journal is not None:
            self._journal.write(record, self._stamps.pop(path))
        self._output.write(record)
        if "error" in record:
            self._failed.add(record["image"])
        else:
            self._failed.discard(record["image"])
            self.result.described += 1
        self.result.errors = len(self._failed)
        self.result.done += 1

    def _finish(self) -> None:
        if self._sidecars is not None:
            self.result.left_alone = self._sidecars.left_alone
            self.result.sidecar_errors = len(self._sidecars.failed)
        reordered = self._journal is not None and self._journal.reordered
        with _writing():
            self._output.finish(self._records(), reordered)


class _Part(NamedTuple):
    """The task of one call of ``describe_folder``: ``photographs`` except those in ``done``."""

    photographs: Sequence[Found]
    done: Container[str]


class _Nowhere:
    """The output of a run that has only sidecars or a report."""

    def start(self, records: Iterable[Record]) -> None:
        pass

    def write(self, record: Record) -> None:
        pass

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        pass


def _output(run: FolderRun) -> Output:
    if run.output is None:
        return _Nowhere()
    if not isinstance(run.output, str | os.PathLike):
        return run.output
    return output_file(os.fspath(run.output), sidecars=bool(run.kinds))


def _sidecars(run: FolderRun) -> Sidecars | None:
    if not run.kinds:
        return None
    return Sidecars(run.kinds, run.overwrite, full_names=run.full_names, alone=run.sidecars_alone)


def _spelled(path: str | os.PathLike[str] | Found) -> str:
    return path.path if isinstance(path, Found) else os.fspath(path)


@contextmanager
def _beginning() -> Iterator[None]:
    """Turn an ``OSError`` before any work into a ``RunError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}") from error


@contextmanager
def _writing() -> Iterator[None]:
    """Turn an ``OSError`` of what writes into a ``WriteError``."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror, error.filename) from error
