"""What a request brings: its photographs as files of a private folder, within limits."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from fastapi import HTTPException
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.types import Message, Receive

__all__ = ["FIELD", "Folder", "private_folder", "received", "until_gone"]

T = TypeVar("T")

FIELD = "images"
"""The name of the form's fields that are photographs."""

# A client that sends nothing for so many seconds has its request ended.
_IDLE_SECONDS = 30.0

# There should be none but files, and the answer names those that there are.
_MOST_FIELDS = 8


class Folder:
    """A private folder of uploads until they are read; its files are named by numbers alone.

    Attributes:
        path: Where it is.

    """

    def __init__(self, path: str) -> None:
        """Take a folder that exists."""
        self.path, self._numbers = path, count()

    async def keep(self, upload: UploadFile) -> str:
        """Write an upload's content to a file, and return its path; raises ``OSError``.

        The upload is closed.
        """
        path = os.path.join(self.path, str(next(self._numbers)))
        try:
            await run_in_threadpool(_write, upload, path)
        finally:
            await upload.close()
        return path


def _write(upload: UploadFile, path: str) -> None:
    try:
        with open(path, "xb") as file:
            shutil.copyfileobj(upload.file, file, 1 << 20)
    except OSError:
        with suppress(OSError):
            os.unlink(path)
        raise


@contextmanager
def private_folder() -> Iterator[Folder]:
    """Make a folder that nobody else may look into, and remove it in the end."""
    with TemporaryDirectory(prefix="captioner-serve-", ignore_cleanup_errors=True) as path:
        yield Folder(path)


@asynccontextmanager
async def received(request: Request, most_bytes: int, most: int) -> AsyncIterator[list[UploadFile]]:
    """Give the photographs of a request, in order; refuse what is too much with an HTTP status.

    Args:
        request: The request, whose body nobody has read.
        most_bytes: The largest body.
        most: How many photographs there may be.

    Raises:
        HTTPException: The body is not what it should be, too large, or does not come.
        ClientDisconnect: The client is gone.
        OSError: There is no room for what came.

    """
    kind = request.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise HTTPException(415, f"send photographs as multipart/form-data, as files in {FIELD!r}")
    _check_size(int(request.headers.get("content-length", 0)), most_bytes)
    counted = Request(request.scope, _counted(request.receive, most_bytes))
    async with counted.form(max_files=most + 1, max_fields=_MOST_FIELDS) as form:
        uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not uploads or any(name != FIELD for name in form):
            found = ", ".join(map(repr, form)) or "nothing"
            raise HTTPException(422, f"send photographs as files in {FIELD!r}; there is {found}")
        if len(uploads) > most:
            raise HTTPException(413, f"send at most {most} photographs at a time")
        yield uploads


def _counted(receive: Receive, most_bytes: int) -> Receive:
    """Return a ``receive`` that refuses a body that is too large, or does not come."""
    so_far = 0

    async def counting() -> Message:
        nonlocal so_far
        try:
            message = await asyncio.wait_for(receive(), _IDLE_SECONDS)
        except TimeoutError:
            raise HTTPException(408, f"nothing came for {_IDLE_SECONDS:g} seconds") from None
        so_far += len(message.get("body", b""))
        _check_size(so_far, most_bytes)
        return message

    return counting


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise HTTPException(413, f"more than {most:,} bytes; send fewer or smaller photographs")


async def until_gone(receive: Receive, answer: asyncio.Future[T]) -> T | None:
    """Wait for an answer; if the client goes first, cancel it and return ``None``."""
    leaving = asyncio.ensure_future(_left(receive))
    either: set[asyncio.Future[Any]] = {answer, leaving}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        answer.cancel()
        leaving.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
