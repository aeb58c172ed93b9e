"""``FolderRun``: many photographs described into files, and continued where a run ended."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from captioner.files import Record, as_json
from captioner.folder.checks import RunError, check_output, check_report, check_sidecars
from captioner.folder.describe import describe_folder, found_of
from captioner.folder.journal import Journal, JournalError
from captioner.folder.outputs import ErrorStream, Output, output_file
from captioner.folder.report import write_report
from captioner.folder.sidecars import Sidecars
from captioner.generation.options import SearchOptions
from captioner.photos.workers import Found

if TYPE_CHECKING:
    from captioner.inference import Captioner

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

    """

    total: int
    done: int = 0
    skipped: int = 0
    described: int = 0
    errors: int = 0
    left_alone: int = 0


@dataclass(frozen=True, kw_only=True)
class FolderRun:
    """A run over many photographs that can be killed at any moment and continued.

    >>> from captioner import Captioner
    >>> from captioner.folder import FolderRun
    >>> run = FolderRun(output="captions.jsonl", sidecar="xmp", report="captions.html")
    >>> run.run(Captioner.load(), ["photos"])  # doctest: +SKIP
    RunResult(total=1204, done=1204, skipped=0, described=1201, errors=3, left_alone=0)

    The same run does only what is left: new photographs come at the end of the output, and what
    is there already stays as it is. ``FILE.journal`` beside the output (or the report) holds
    what was done; without either, a photograph is done once it has its sidecar.

    Attributes:
        output: a file, ``.jsonl``, ``.csv`` or ``.json`` (COCO results), or an ``Output``, to
            which the records go as they are made. Records that go to an ``Output`` alone are not
            kept.
        sidecar: a kind in ``SIDECARS``: a file of it is written beside each photograph.
        report: an HTML file, a page to look through the results.
        overwrite: begin anew, and replace files that exist.
        retry_errors: try again what could not be read before.
        captions: whether captions are written.
        tags: whether tags are.
        batch_size: how many photographs go through the model at a time.
        workers: how many processes read photographs.
        decode_timeout: the longest time to read one photograph, in seconds.
        progress: told the counts so far, at the beginning and after each batch.

    """

    output: str | os.PathLike[str] | Output | None = None
    sidecar: str | None = None
    report: str | os.PathLike[str] | None = None
    overwrite: bool = False
    retry_errors: bool = False
    captions: bool = True
    tags: bool = True
    batch_size: int = 32
    workers: int = 2
    decode_timeout: float = 30.0
    progress: Callable[[RunResult], object] = lambda result: None

    def run(
        self,
        captioner: Captioner | Callable[[], Captioner],
        paths: Iterable[str | os.PathLike[str] | Found],
        options: SearchOptions | None = None,
    ) -> RunResult:
        """Describe what is left of the photographs, and return the counts.

        Args:
            captioner: the model, or a function that loads it; it is called once everything else
                has been checked, and only if there are photographs.
            paths: photographs and folders, as :func:`find_photographs` takes them.
            options: how captions are searched for.

        Raises:
            RunError: the run cannot begin; nothing was written.
            WriteError: a file cannot be written any further.
            ConfigError: the model cannot do what the options say.
            DecodingError: there is no process to read photographs with.

        """
        asked = list(paths)
        photographs = list({found.path: found for found in found_of(asked)}.values())
        self.check(photographs)
        if not photographs:
            return RunResult(0)
        loaded = captioner() if callable(captioner) else captioner
        if self.captions and options is not None:
            loaded.check(options)
        with self._journal(loaded, options) as journal:
            work = _Work(self, loaded, options, photographs, journal)
            work.describe()
            if self.report is not None and journal is not None:
                work.write_report(", ".join(_spelled(path) for path in asked))
            return work.result

    @property
    def journal_path(self) -> str | None:
        """Where the journal lies, if the run has one."""
        output = self.output if isinstance(self.output, str | os.PathLike) else self.report
        return None if output is None else f"{os.fspath(output)}.journal"

    def check(self, photographs: Sequence[Found]) -> None:
        """Raise ``RunError`` for what would keep the run from its end; write nothing."""
        if self.retry_errors and self.journal_path is None:
            raise RunError("--retry-errors needs --output FILE, where the errors are")
        if isinstance(self.output, str | os.PathLike):
            check_output(os.fspath(self.output), photographs, self.overwrite)
        if self.report is not None:
            check_report(os.fspath(self.report), self.overwrite)
        if self.sidecar is not None:
            check_sidecars(photographs, self.sidecar)

    @contextmanager
    def _journal(
        self, captioner: Captioner, options: SearchOptions | None
    ) -> Iterator[Journal | None]:
        path = self.journal_path
        if path is None:
            yield None
            return
        settings = {
            "model": f"the one of SHA-256 {_model_digest(captioner)}",
            "precision": str(captioner.precision).removeprefix("torch."),
            "captions": self.captions,
            "tags": self.tags,
            **(asdict(options or SearchOptions()) if self.captions else {}),
        }
        try:
            with _beginning():
                journal = Journal(path, settings, self.overwrite)
        except JournalError as error:
            raise RunError(str(error)) from error
        with journal:
            yield journal


class _Work:
    """What a run does between its checks and its end."""

    def __init__(
        self,
        run: FolderRun,
        captioner: Captioner,
        options: SearchOptions | None,
        photographs: Sequence[Found],
        journal: Journal | None,
    ) -> None:
        self._run, self._captioner, self._options = run, captioner, options
        self._photographs, self._journal = photographs, journal
        self._sidecars = Sidecars(run.sidecar, run.overwrite) if run.sidecar else None
        self._output = _output(run.output)
        self._failed: set[str] = set()
        self.result = RunResult(len(photographs))
        with _beginning():
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
        finally:
            self._finish()

    def write_report(self, title: str) -> None:
        """Write the page of all records in the journal."""
        run, journal = self._run, self._journal
        assert run.report is not None
        assert journal is not None
        with _writing():
            write_report(
                os.fspath(run.report),
                journal.records(),
                len(journal.done),
                len(journal.errors),
                title=title or "captioner",
                fit=self._captioner.checkpoint.config.preprocessing.fit,
                workers=run.workers,
                decode_timeout=run.decode_timeout,
            )

    def _records(self) -> Iterator[Record]:
        return iter(()) if self._journal is None else self._journal.records()

    def _parts(self) -> list[_Part]:
        """Return what is left to do, in the order and the batches the run was begun with.

        Photographs that are new come at the end, and then, with ``retry_errors``, those that have
        an error record. Those of earlier runs that were not asked for this time are passed over.
        """
        asked = {found.path: found for found in self._photographs}
        journal = self._journal
        if journal is None:
            done = self._with_sidecars()
            self.result.skipped = len(done)
            return [_Part(self._photographs, done)]
        with _writing():
            self._catch_up(journal)
            journal.add(asked)
        done = journal.done
        self._failed = journal.errors & asked.keys()
        self.result.skipped = len(done & asked.keys())
        everything = journal.photographs
        others = {path for path in everything if path not in asked}
        parts = [_Part((asked.get(path) or Found(path) for path in everything), done | others)]
        if self._run.retry_errors and self._failed:
            self.result.skipped -= len(self._failed)
            again = [found for found in self._photographs if found.path in self._failed]
            parts.append(_Part(again, frozenset()))
        return parts

    def _with_sidecars(self) -> set[str]:
        """Return the photographs that are done where sidecars are the only output."""
        run, sidecars = self._run, self._sidecars
        elsewhere = run.output is not None and not isinstance(run.output, ErrorStream)
        if sidecars is None or run.overwrite or elsewhere:
            return set()
        return {found.path for found in self._photographs if sidecars.exists(found.path)}

    def _catch_up(self, journal: Journal) -> None:
        """Write the sidecars of what was done before there were to be any."""
        for record in journal.records() if self._sidecars is not None else ():
            written = self._sidecars.write(record) if self._sidecars else record
            if written is not record:
                journal.write(written)

    def _described(self, part: _Part) -> Iterator[Record]:
        run = self._run
        return describe_folder(
            self._captioner,
            part.photographs,
            options=self._options,
            captions=run.captions,
            tags=run.tags,
            attention=run.report is not None and run.captions,
            batch_size=run.batch_size,
            workers=run.workers,
            decode_timeout=run.decode_timeout,
            done=part.done,
            progress=lambda _: run.progress(self.result),
        )

    def _keep(self, record: Record) -> None:
        """Write a record wherever it goes, and count it."""
        if self._sidecars is not None:
            record = self._sidecars.write(record)
        if self._journal is not None:
            self._journal.write(record)
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
        reordered = self._journal is not None and self._journal.reordered
        with _writing():
            self._output.finish(self._records(), reordered)


class _Part(NamedTuple):
    """What one call of ``describe_folder`` is to do: ``photographs`` but those in ``done``."""

    photographs: Iterable[Found]
    done: Container[str]


class _Nowhere:
    """The output of a run that has only sidecars or a report."""

    def start(self, records: Iterable[Record]) -> None:
        pass

    def write(self, record: Record) -> None:
        pass

    def finish(self, records: Iterable[Record], reordered: bool) -> None:
        pass


def _output(output: str | os.PathLike[str] | Output | None) -> Output:
    if output is None:
        return _Nowhere()
    return output_file(os.fspath(output)) if isinstance(output, str | os.PathLike) else output


def _spelled(path: str | os.PathLike[str] | Found) -> str:
    return path.path if isinstance(path, Found) else os.fspath(path)


def _model_digest(captioner: Captioner) -> str:
    """Return the start of a hash of all that a captioner's answers depend on but its precision."""
    digest = hashlib.sha256()
    for checkpoint in captioner.checkpoints:
        words, tags = checkpoint.vocabulary.words, checkpoint.tags.vocabulary.words
        scale = checkpoint.calibration.slope, checkpoint.calibration.offset
        digest.update(as_json([asdict(checkpoint.config), scale, words, tags]))
        for name, tensor in sorted(checkpoint.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            # Rounded, so that the digest is the same in either precision.
            digest.update(tensor.detach().cpu().bfloat16().float().numpy().tobytes())
    return digest.hexdigest()[:16]


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
