"""Global settings of other libraries, held at our value while they are needed."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

__all__ = ["Held"]

T = TypeVar("T")


class Held(Generic[T]):
    """A context in which a global setting has our value; afterwards it is the caller's again.

    Threads may enter it together: the last one to leave restores the setting.
    """

    def __init__(self, get: Callable[[], T], put: Callable[[T], object], value: T) -> None:
        """Say how the setting is read and written, and our value."""
        self._get, self._put, self._value = get, put, value
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._theirs = self._get()
                self._put(self._value)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._put(self._theirs)
