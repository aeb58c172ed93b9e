"""Messages for a person on standard error: each a line, whatever the names in it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

from captioner.files import Notice, printable

__all__ = ["Parser", "complain", "shown", "shown_notices"]


class Parser(argparse.ArgumentParser):
    """A parser of arguments whose errors are safe on a terminal: they quote what was typed."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with status 2."""
        super().error(printable(message))


def complain(program: str, text: object) -> None:
    """Print a line on standard error that begins with the program's name.

    Names of files come into messages as they are; here, where all messages are printed, control
    characters become escapes, so that no name acts on the terminal.
    """
    print(printable(f"{program}: {text}"), file=sys.stderr)


@contextmanager
def shown_notices(program: str, quiet: bool = False) -> Iterator[None]:
    """Print the package's notices as lines of a program; other warnings stay as they are."""
    plain = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, Notice):
            plain(message, category, filename, lineno, file, line)
        elif not quiet:
            complain(program, message)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("always", Notice)
        yield


# How the names of scores and shares begin; a loss, a time and a length are neither.
_SHARES = ("bleu", "rouge", "cider", "meteor", "spice", "tag_", "map", "c_", "o_", "coverage",
           "gap", "distinct", "bad_endings", "novel", "right", "confidence_",
           "captions_changed")  # fmt: skip


def shown(value: object, name: str = "") -> str:
    """Return a figure as a person reads it: scores and shares times 100, as papers give them."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner, key)}" for key, inner in value.items())
    if isinstance(value, tuple | list):
        return " to ".join(shown(inner, name) for inner in value)
    if isinstance(value, float):
        return f"{100.0 * value:.1f}" if name.startswith(_SHARES) else f"{value:.4f}"
    return str(value)
