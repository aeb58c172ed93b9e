"""A run that is asked to stop: by Ctrl-C, by SIGTERM, at a moment that suits it."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["StoppedError", "Stopper"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What comes sooner is the same wish once more: torchrun passes on what a terminal has sent to all.
_AGAIN_SECONDS = 1.0


class StoppedError(BaseException):
    """A run that was asked to stop, and has saved all it needs to go on.

    No ``Exception``, or whoever answers a broken file would take it for one.
    """


class Stopper:
    """Whether SIGINT or SIGTERM asked a run to stop: after its step, or at once between steps.

    A context manager, in which it handles these signals; ``signal`` is the one that came. Who asks
    again is not kept waiting.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.signal = 0
        self._asked = 0.0
        self._idle = False
        self._before: list[Any] = []

    def __enter__(self) -> Stopper:
        """Begin to listen; only the main thread may."""
        self._before = [(number, signal.signal(number, self.ask)) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signals to whoever had them before."""
        for number, handler in self._before:
            signal.signal(number, handler)

    def ask(self, number: int, *_: object) -> None:
        """Ask the run to stop; raises ``StoppedError`` unless a step is to be finished first."""
        now = time.monotonic()
        self._asked = self._asked or now
        self.signal = number
        again = now - self._asked > _AGAIN_SECONDS
        if self._idle or again:
            raise StoppedError

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Stop at once in here: no step is under way."""
        self._idle = True
        try:
            if self.signal:
                raise StoppedError
            yield
        finally:
            self._idle = False
