"""The cells of the CSV that the command line writes, and that training data may come as."""

from __future__ import annotations

import re

__all__ = ["BETWEEN_TAGS", "csv_cell", "csv_tags", "csv_text"]

BETWEEN_TAGS = ", "
"""Stands between the tags of a cell."""

# A spreadsheet takes a cell for a formula that begins with one of these, quotes and blanks apart;
# the last four are full-width signs. Whoever opens the file chooses what stands between cells, so a
# cell may begin after every comma, semicolon and tab of a text, and on every line.
_FORMULA = re.compile("(?:\\A|(?<=[,;\t\r\n]))([\"' ]*)(?=[=+@\t\r\n＝＋－＠-])")


def csv_cell(text: str) -> str:
    """Return the cell of a text: an apostrophe stands before whatever could begin a formula."""
    return _FORMULA.sub(r"\1'", text)


def csv_text(cell: str) -> str:
    """Return the text of a cell that :func:`csv_cell` wrote."""
    return _FORMULA.sub(lambda found: found[1].removesuffix("'"), cell)


def csv_tags(cell: str) -> list[str]:
    """Return the tags of a cell, as the command line writes them."""
    names = (name.strip() for name in csv_text(cell).split(BETWEEN_TAGS.strip()))
    return [name for name in names if name]
