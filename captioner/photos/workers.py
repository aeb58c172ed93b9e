"""Worker processes that read photographs: a decoder that crashes or hangs costs one photograph.

Neither this module nor the workers import torch, so that they start in a moment.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import LifoQueue
from threading import Lock
from typing import NamedTuple

from PIL import Image

from captioner.files import Notice
from captioner.photos.images import MAX_PIXELS, UnreadableError

__all__ = ["DecodingError", "Found", "Reader", "ReadingProcesses", "read_ahead", "serve"]

Reader = Callable[[str], bytes]
"""Reads a photograph, or raises ``UnreadableError``; it is pickled, so a module must hold it."""


class DecodingError(RuntimeError):
    """There is no process to read photographs with."""


class Found(NamedTuple):
    """A photograph to read, or a path that is known to be none (``error`` says why)."""

    path: str
    error: str | None = None


# The package is loaded from its own file, and the path is set before anything is imported: with
# `python -c` alone, a file random.py among the photographs would be run as Python's own.
_CODE = """
import sys
descriptor, package, *path = sys.argv[1:]
sys.path[:] = dict.fromkeys(path + sys.path)
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("captioner", package)
module = sys.modules["captioner"] = module_from_spec(spec)
spec.loader.exec_module(module)
from captioner.photos.workers import serve
serve(int(descriptor))
"""
_PACKAGE = Path(__file__).parents[1] / "__init__.py"
_GOOD, _BAD = b"+", b"-"
_START_SECONDS = 120.0
_POSIX = os.name == "posix"

# Of 1.5 GB; the rest is for the libraries' code. A picture of 250 megapixels is 1 GB, decoded.
_MOST_MEMORY = 1_450_000_000


def read_ahead(
    read: Reader, photographs: Iterable[Found], workers: int, depth: int, timeout: float
) -> Generator[tuple[str, bytes | UnreadableError], None, None]:
    """Yield each path and its pixels, or why there are none, in the order of ``photographs``.

    Where a decoder hangs, needs too much memory or crashes, the result of that photograph alone is
    an ``UnreadableError``. After a crash a photograph is tried once more in a new process, as the
    first one may have been killed for another reason. The processes need POSIX; elsewhere
    photographs are read here, one after the other, and a ``Notice`` says so.

    Args:
        read: Reads one photograph, in a worker process that has at most 1.5 GB of memory.
        photographs: What is to be read; those with an error are passed through.
        workers: How many processes read.
        depth: How many photographs are read ahead of the one that is yielded.
        timeout: Seconds after which a process is killed over a photograph.

    Raises:
        DecodingError: A process cannot be started at all.
    """
    if not _POSIX:
        here = _Here(read)
        yield from ((found.path, here.read(found)) for found in photographs)
        return
    waiting: deque[tuple[str, Future[bytes | UnreadableError]]] = deque()

    def first() -> tuple[str, bytes | UnreadableError]:
        path, future = waiting.popleft()
        return path, future.result()

    with ReadingProcesses(read, workers, timeout) as processes:
        try:
            for found in photographs:
                waiting.append((found.path, processes.submit(found)))
                if len(waiting) >= depth:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, future in waiting:
                future.cancel()


class ReadingProcesses:
    """Processes that read photographs for any thread, in the order in which they are asked.

    At the end of the context they are stopped, whatever they are reading. Errors, limits and
    platforms are as in :func:`read_ahead`.
    """

    def __init__(self, read: Reader, workers: int, timeout: float) -> None:
        """Take what :func:`read_ahead` takes; a process is started when it is first needed."""
        self._crew = _Workers(read, workers, timeout) if _POSIX else _Here(read)
        self._threads = ThreadPoolExecutor(workers if _POSIX else 1)

    def submit(self, found: Found) -> Future[bytes | UnreadableError]:
        """Have a photograph read; the future has its pixels, or why there are none.

        The future raises ``DecodingError`` if no process can be started.
        """
        return self._threads.submit(self._crew.read, found)

    def __enter__(self) -> ReadingProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes; futures that are not done yet are cancelled, or have an error."""
        # In this order: a thread that waits for a process goes on once the process has ended.
        self._crew.close()
        self._threads.shutdown(cancel_futures=True)


class _Here:
    """Reads in this process and without a time limit, where there is no POSIX."""

    def __init__(self, read: Reader) -> None:
        text = "photographs are read one at a time, and without a time limit, where there is no "
        warnings.warn(f"{text}POSIX", Notice, stacklevel=3)
        self._read = read

    def read(self, found: Found) -> bytes | UnreadableError:
        if found.error is not None:
            return UnreadableError(found.error)
        try:
            return self._read(found.path)
        except UnreadableError as why:
            return why

    def close(self) -> None:
        """Do nothing: there is no process."""


class _Workers:
    """Processes that are started when they are first needed, and again after they ended."""

    def __init__(self, read: Reader, count: int, timeout: float) -> None:
        self._read, self._timeout = read, timeout
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        self._all: list[_Worker] = []
        self._lock, self._closed = Lock(), False
        for _ in range(count):
            self._idle.put(None)

    def read(self, found: Found) -> bytes | UnreadableError:
        if found.error is not None:
            return UnreadableError(found.error)
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive:
                worker = self._start()
            try:
                return worker.ask(found.path, self._timeout)
            except _CrashedError:
                if self._closed:
                    raise
                # It may have been killed while it was idle, or by the system, short of memory.
                worker = self._start()
            return worker.ask(found.path, self._timeout)
        except _CrashedError as error:
            return UnreadableError(f"the decoder crashed ({error})")
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        try:
            worker = _Worker(self._read, self._timeout)
        except OSError as error:  # too many processes or open files, or too little memory
            why = error.strerror or error
            raise DecodingError(
                f"no process to read photographs could be started: {why}"
            ) from error
        with self._lock:
            self._all = [other for other in self._all if other.alive] + [worker]
        if self._closed:
            worker.stop()
        worker.wait_until_ready()
        return worker

    def close(self) -> None:
        self._closed = True
        with self._lock:
            for worker in self._all:
                worker.stop()


class _CrashedError(Exception):
    """A process that ended by itself; the message says how."""


class _Worker:
    def __init__(self, read: Reader, timeout: float) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _CODE, str(theirs.fileno()), _PACKAGE, *_path()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # libtiff and others write there as they please
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C is for the run, which then stops its workers
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self.alive = True
        with suppress(BrokenPipeError):  # it shows as not ready
            self._connection.send((read, 2.0 * timeout))

    def wait_until_ready(self) -> None:
        """Raise ``DecodingError`` if the process does not come up."""
        if not self._answer(_START_SECONDS):
            self.stop()
            raise DecodingError(f"no process to read photographs with: {sys.executable} failed")

    def ask(self, path: str, timeout: float) -> bytes | UnreadableError:
        """Have a photograph read, or say why it could not be; raises ``_CrashedError``."""
        with suppress(BrokenPipeError):
            self._connection.send_bytes(os.fsencode(path))
        answer = self._answer(timeout)
        if answer is None:
            self.stop()
            return UnreadableError(f"the decoder took more than {timeout:g} seconds")
        if not answer:
            raise _CrashedError(self._end())
        if answer[:1] == _GOOD:
            return answer[1:]
        return UnreadableError(answer[1:].decode("utf-8", "surrogateescape"))

    def _answer(self, timeout: float) -> bytes | None:
        """Return what the process says: nothing if it is gone, ``None`` if it takes too long."""
        try:
            return self._connection.recv_bytes() if self._connection.poll(timeout) else None
        except (EOFError, OSError):
            return b""

    def _end(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # the end of the pipe comes a moment before its own
        self.stop()
        status = self._process.returncode or 0
        return signal.Signals(-status).name if status < 0 else f"status {status}"

    def stop(self) -> None:
        """End the process."""
        self.alive = False
        self._process.kill()
        # One that hangs in the kernel, on a dead network drive, does not even end then.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)


def _path() -> list[str]:
    """Return this process's import path without the current directory."""
    with suppress(FileNotFoundError):  # the current directory may be gone
        here = os.path.realpath(os.getcwd())
        return [entry for entry in map(os.path.realpath, sys.path) if entry != here]
    return [entry for entry in sys.path if os.path.isabs(entry)]


def serve(descriptor: int) -> None:
    """Be a worker: read the photographs that are asked for, until the pipe ends."""
    connection = Connection(descriptor)
    warnings.simplefilter("ignore")
    # The model's threads wait for each other: one that must share its core holds up all of them.
    os.nice(10)
    _limit_memory()
    # Pillow refuses twice this, wherever in a file the size is found.
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
    read, limit = connection.recv()
    connection.send_bytes(_GOOD)
    while True:
        try:
            path = os.fsdecode(connection.recv_bytes())
        except (EOFError, OSError):
            return
        # A process that hangs ends also when there is nobody left to kill it.
        signal.setitimer(signal.ITIMER_REAL, limit)
        answer = _answer(read, path)
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        with suppress(BrokenPipeError):
            connection.send_bytes(answer)


def _answer(read: Reader, path: str) -> bytes:
    try:
        return _GOOD + read(path)
    except UnreadableError as error:
        reason = str(error)
    except MemoryError:
        reason = "reading it takes more than 1.5 GB of memory"
    return _BAD + reason.encode("utf-8", "surrogateescape")


def _limit_memory() -> None:
    """Let this process have 1.5 GB, where the system keeps such a limit."""
    with suppress(ImportError, ValueError, OSError):  # a lower limit stays
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, hard))
