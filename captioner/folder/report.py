"""A page to look through the results of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import tee
from typing import Any
from urllib.parse import quote

from captioner.files import Record, printable
from captioner.pages import picture, thumbnail, write_page
from captioner.photos.images import UnreadableError
from captioner.photos.workers import Found, read_ahead

__all__ = ["is_report", "write_report"]

_GENERATOR = "captioner"


def write_report(
    path: str,
    records: Iterable[Record],
    total: int,
    errors: int,
    *,
    title: str = "captioner",
    fit: str = "squash",
    workers: int = 2,
    decode_timeout: float = 30.0,
) -> None:
    """Write the page of ``total`` records, of which ``errors`` are errors.

    A record may have the ``path`` of its photograph, where ``image`` does not lead to it.
    ``workers`` processes make the thumbnails; a photograph that is gone has none. ``fit`` says
    what part of a photograph the model saw, as in ``Preprocessing``. Raises ``OSError``.
    """
    first, second = tee(records)
    photographs = (Found(_path(record), record.get("error")) for record in first)
    thumbnails = read_ahead(thumbnail, photographs, workers, 16 * workers, decode_timeout)
    with closing(thumbnails):
        write_page(
            path,
            "report",
            generator=_GENERATOR,
            title=title,
            fit=fit,
            total=total,
            errors=errors,
            cards=_cards(second, thumbnails, os.path.dirname(os.path.abspath(path))),
        )


def is_report(path: str) -> bool:
    """Return whether a file is such a page."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        return f'name="generator" content="{_GENERATOR}"'.encode() in file.read(300)


def _cards(
    records: Iterable[Record],
    thumbnails: Iterable[tuple[str, bytes | UnreadableError]],
    folder: str,
) -> Iterator[dict[str, Any]]:
    for record, (_, made) in zip(records, thumbnails, strict=True):
        shown = {} if isinstance(made, UnreadableError) else picture(made)
        yield _card(record, folder) | shown


def _path(record: Record) -> str:
    """Return where a photograph lies: its record may have it as it is spelled from elsewhere."""
    return str(record.get("path", record["image"]))


def _card(record: Record, folder: str) -> dict[str, Any]:
    """Return what the page shows of a record."""
    caption, log_prob = record.get("caption") or "", record.get("log_prob")
    relative = os.path.relpath(_path(record), folder)
    tags = record.get("tags", ())
    confidence = max((tag["score"] for tag in tags), default=0.0)
    if "confidence" in record:
        confidence = record["confidence"]
    elif log_prob is not None:
        confidence = _word_probability(caption, log_prob)
    return {
        "name": printable(record["image"]),
        # The dot keeps a name with a colon from being taken for a scheme.
        "href": f"./{quote(os.fsencode(relative))}",
        "error": None if "error" not in record else printable(record["error"]),
        "sidecar_error": printable(record.get("sidecar_error", "")),
        "confidence": f"{confidence:.4f}",
        "sure": f"{record['confidence']:.0%}" if "confidence" in record else "",
        "percent": None if log_prob is None else _percent(caption, log_prob),
        "words": _words(caption, record.get("attention")),
        "tags": [{"name": t["name"], "score": round(100.0 * t["score"])} for t in tags],
        "alternatives": [
            {"text": c["text"], "percent": _percent(c["text"], c["log_prob"])}
            for c in record.get("captions", ())[1:]
        ],
    }


def _percent(caption: str, log_prob: float) -> str:
    return f"{100.0 * _word_probability(caption, log_prob):.0f}"


def _word_probability(caption: str, log_prob: float) -> float:
    """Return the geometric mean of the probabilities of a caption's words and of its end."""
    return math.exp(log_prob / (len(caption.split()) + 1))


def _words(caption: str, attention: Record | None) -> list[dict[str, str]]:
    """Cut a caption into its words, each with what stands before it and its weights."""
    words, at = [], 0
    for word, weights in zip(
        *((attention["words"], attention["weights"]) if attention else ((), ())), strict=True
    ):
        start = caption.index(word, at)
        words.append({"before": caption[at:start], "text": word, "weights": weights})
        at = start + len(word)
    return [*words, {"before": "", "text": caption[at:], "weights": ""}] if caption else []
