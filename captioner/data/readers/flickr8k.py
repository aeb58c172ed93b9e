"""Flickr8k's ``token.txt``, which is also the form of Flickr30k's ``results_20130124.token``."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from captioner.data.example import Example
from captioner.data.readers.entries import Annotations, Problems, Text
from captioner.settings import shown

__all__ = ["is_token_line", "read_flickr8k"]

_LINE = re.compile(r"(?P<name>[^\t]*)#[^#\t]*\t(?P<caption>.*)")


def is_token_line(line: str) -> bool:
    """Whether a line is of this form: ``NAME#N<TAB>caption``."""
    return _LINE.fullmatch(line) is not None


def read_flickr8k(text: Text) -> Annotations:
    """Read lines of ``NAME.jpg#0<TAB>caption``.

    Source: Hodosh, Young and Hockenmaier, JAIR 47 (2013). Raises ``DataError`` for lines of
    another form.
    """
    problems = Problems(text.path)
    texts: dict[Path, list[str]] = defaultdict(list)
    for number, line in text.lines():
        match = _LINE.fullmatch(line)
        if match is None:
            problems.add(number, f"expected NAME#N<TAB>caption, found {shown(line)}")
            continue
        name = problems.name(number, match["name"])
        if name is not None:
            texts[name].append(match["caption"].strip())
    problems.check()
    return Annotations([Example(name, tuple(lines)) for name, lines in texts.items()], [])
