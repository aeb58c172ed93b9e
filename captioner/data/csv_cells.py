"""The cells of the CSV that the command line writes, and that training data may come as."""

from __future__ import annotations

__all__ = ["BETWEEN_TAGS", "csv_cell", "csv_tags", "csv_text"]

BETWEEN_TAGS = ", "
"""Stands between the tags of a cell."""

# A spreadsheet takes a cell that begins so for a formula; the last four are full-width signs.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")


def csv_cell(text: str) -> str:
    """Return the cell of a text; one that a spreadsheet takes for a formula has an apostrophe."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def csv_text(cell: str) -> str:
    """Return the text of a cell that :func:`csv_cell` wrote."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell


def csv_tags(cell: str) -> list[str]:
    """Return the tags of a cell, as the command line writes them."""
    names = (name.strip() for name in csv_text(cell).split(BETWEEN_TAGS.strip()))
    return [name for name in names if name]
