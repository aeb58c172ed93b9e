"""Photographs that arrive together go through the model together."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from threading import Condition, Thread
from time import monotonic
from typing import Any, NamedTuple

from captioner.files import Record
from captioner.folder.describe import describe_read
from captioner.generation.describer import Describer
from captioner.generation.options import SearchOptions, TagOptions
from captioner.photos.images import TooLargeError, UnreadableError
from captioner.photos.workers import Found, ReadingProcesses
from captioner.serve.reading import read_upload, too_large

__all__ = ["Answer", "Asked", "Batches"]

# How long, in seconds, a batch that is not full waits for photographs that are being read. About
# what the model takes for two photographs on a CPU core.
_PATIENCE = 0.04

# The weight of the last batch in the mean time of a photograph.
_NEWEST = 0.2


class Asked(NamedTuple):
    """How captions are searched for, and which tags are given; ``None`` where none are wanted."""

    captions: SearchOptions | None
    tags: TagOptions | None
    min_confidence: float = 0.0


class Answer(NamedTuple):
    """A record without ``image``, and whether its error is that the picture is too large."""

    record: Record
    too_large: bool = False


class _Upload(NamedTuple):
    """A photograph on its way: the future of its pixels, and that of its answer."""

    path: str
    asked: Asked
    pixels: Future[bytes | UnreadableError]
    answer: Future[Answer]


class Batches:
    """Reads uploads in processes, and describes them in batches in one thread; a context.

    A batch is what is ready once the model is free, at most ``batch_size`` photographs. An upload
    whose answer is cancelled takes no more work than what has begun.
    """

    def __init__(
        self,
        captioner: Describer[Any],
        *,
        batch_size: int = 32,
        workers: int = 2,
        decode_timeout: float = 30.0,
    ) -> None:
        """Take the model, and the numbers of a folder run."""
        self._captioner, self._batch_size = captioner, batch_size
        reader = partial(read_upload, captioner.preprocessing)
        self._processes = ReadingProcesses(reader, workers, decode_timeout)
        self._changed = Condition()
        # Both, and whether the end has come, are used under the lock of the condition.
        self._ready: deque[_Upload] = deque()
        self._reading = 0
        self._ending = False
        self._thread = Thread(target=self._work, name="captioner model")
        self.seconds = 0.1
        """The mean time of a photograph, of late."""

    def check(self, asked: Asked) -> None:
        """Raise ``ConfigError`` if a request has words or tags that the model does not know."""
        if asked.captions is not None:
            self._captioner.check(asked.captions)
        if asked.tags is not None:
            self._captioner.check_tags(asked.tags)

    def submit(self, path: str, asked: Asked) -> Future[Answer]:
        """Have an upload described; its file is removed once it is read, or cancelled.

        The future raises ``DecodingError`` where no process can be started, and whatever the model
        raises.
        """
        with self._changed:
            self._reading += 1
        upload = _Upload(path, asked, self._processes.submit(Found(path)), Future())
        upload.answer.add_done_callback(lambda answer: upload.pixels.cancel())
        upload.pixels.add_done_callback(lambda pixels: self._was_read(upload))
        return upload.answer

    def __enter__(self) -> Batches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify()
        self._thread.join()
        self._processes.close()
        for upload in self._ready:
            upload.answer.cancel()

    def _was_read(self, upload: _Upload) -> None:
        with suppress(OSError):
            os.unlink(upload.path)
        with self._changed:
            self._reading -= 1
            if not upload.pixels.cancelled():
                self._ready.append(upload)
            self._changed.notify()

    def _work(self) -> None:
        while batch := self._next():
            begun = monotonic()
            # Who cancels from here on has no answer, but the model works for it.
            wanted = [u for u in batch if u.answer.set_running_or_notify_cancel()]
            kinds: defaultdict[Asked, list[_Upload]] = defaultdict(list)
            for upload in wanted:
                if (error := upload.pixels.exception()) is None:
                    kinds[upload.asked].append(upload)
                else:
                    upload.answer.set_exception(error)
            for asked, uploads in kinds.items():
                self._describe(asked, uploads)
            taken = (monotonic() - begun) / len(batch)
            self.seconds += _NEWEST * (taken - self.seconds)

    def _next(self) -> list[_Upload]:
        """Wait for the next batch; it is empty at the end."""
        with self._changed:
            while not (self._ready or self._ending):
                self._changed.wait()
            until = monotonic() + _PATIENCE
            while self._reading and len(self._ready) < self._batch_size and not self._ending:
                if not self._changed.wait(until - monotonic()):
                    break
            if self._ending:
                return []
            count = min(len(self._ready), self._batch_size)
            return [self._ready.popleft() for _ in range(count)]

    def _describe(self, asked: Asked, uploads: Sequence[_Upload]) -> None:
        """Answer uploads that want the same; whatever goes wrong is an answer, too."""
        try:
            images = [upload.pixels.result() for upload in uploads]
            images = [too_large(image) or image for image in images]
            records = describe_read(
                self._captioner,
                images,
                asked.captions,
                captions=asked.captions is not None,
                tags=asked.tags is not None,
                tag_options=asked.tags,
                min_confidence=asked.min_confidence,
            )
        except Exception as error:
            for upload in uploads:
                upload.answer.set_exception(error)
            return
        for upload, image, record in zip(uploads, images, records, strict=True):
            upload.answer.set_result(Answer(record, isinstance(image, TooLargeError)))
