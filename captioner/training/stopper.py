"""Stopping a run by SIGINT (Ctrl-C) or SIGTERM, at the end of a step where possible."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["StoppedError", "Stopper"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A second signal within this time repeats the first: torchrun forwards a signal that the terminal
# has already sent to every process.
_AGAIN_SECONDS = 1.0


class StoppedError(BaseException):
    """The run was asked to stop; a later run continues from the latest snapshot.

    Not an ``Exception``, so that code which handles a broken file does not catch the stop.
    """


class Stopper:
    """A context manager in which SIGINT and SIGTERM ask the run to stop.

    The run stops after the present step, or at once between steps. A second signal stops the run
    at once. ``signal`` is the number of the signal that came, 0 before one came.
    """

    def __init__(self) -> None:
        """Begin without a signal."""
        self.signal = 0
        self._asked = 0.0
        self._idle = False
        self._before: list[Any] = []

    def __enter__(self) -> Stopper:
        """Install the signal handlers; only the main thread may do this."""
        self._before = [(number, signal.signal(number, self.ask)) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before:
            signal.signal(number, handler)

    def ask(self, number: int, *_: object) -> None:
        """Ask the run to stop; raises ``StoppedError`` unless a step must be finished first."""
        now = time.monotonic()
        self._asked = self._asked or now
        self.signal = number
        again = now - self._asked > _AGAIN_SECONDS
        if self._idle or again:
            raise StoppedError

    @contextmanager
    def idle(self) -> Iterator[None]:
        """Raise ``StoppedError`` at once on a signal in this context: no step is under way."""
        self._idle = True
        try:
            if self.signal:
                raise StoppedError
            yield
        finally:
            self._idle = False
