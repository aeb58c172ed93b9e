"""A page to look through the results of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import math
import os
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import closing
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from itertools import tee
from typing import Any
from urllib.parse import quote

from jinja2 import Environment

from captioner.decoding import Found, read_ahead
from captioner.images import UnreadableError, open_rgb
from captioner.journal import Record, replacing
from captioner.outputs import printable

__all__ = ["is_report", "write_report"]

_SIDE = 256
_MARK = b'<meta name="generator" content="captioner">'


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

    ``workers`` processes make the thumbnails; a photograph that is gone has none. ``fit`` says
    what part of a photograph the model saw, as in ``Preprocessing``. Raises ``OSError``.
    """
    page = files("captioner") / "page"
    style, script = ((page / f"report.{e}").read_text(encoding="utf-8") for e in ("css", "js"))
    template = Environment(autoescape=True).from_string(
        (page / "report.html").read_text(encoding="utf-8")
    )
    first, second = tee(records)
    photographs = (Found(record["image"], record.get("error")) for record in first)
    thumbnails = read_ahead(_thumbnail, photographs, workers, 16 * workers, decode_timeout)
    with replacing(path) as file, closing(thumbnails):
        stream = template.stream(
            title=title,
            fit=fit,
            total=total,
            errors=errors,
            style=style,
            script=script,
            style_hash=_hash(style),
            script_hash=_hash(script),
            cards=_cards(second, thumbnails, os.path.dirname(os.path.abspath(path))),
        )
        stream.enable_buffering(64)
        for part in stream:
            file.write(part.encode("utf-8", "backslashreplace"))


def is_report(path: str) -> bool:
    """Whether a file is such a page."""
    with open(path, "rb") as file:
        return _MARK in file.read(300)


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _thumbnail(path: str) -> bytes:
    """Return a JPEG, its longer side at most ``_SIDE``, after its width and height."""
    image = open_rgb(path, _SIDE // 3)
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=65)
    return b"%d %d " % image.size + stream.getvalue()


def _cards(
    records: Iterable[Record],
    thumbnails: Iterable[tuple[str, bytes | UnreadableError]],
    folder: str,
) -> Iterator[dict[str, Any]]:
    for record, (_, thumbnail) in zip(records, thumbnails, strict=True):
        card = _card(record, folder)
        if not isinstance(thumbnail, UnreadableError):
            width, height, jpeg = thumbnail.split(b" ", 2)
            card |= {"width": int(width), "height": int(height)}
            card["thumbnail"] = b64encode(jpeg).decode()
        yield card


def _card(record: Record, folder: str) -> dict[str, Any]:
    """Return what the page shows of a record."""
    caption, log_prob = record.get("caption", ""), record.get("log_prob")
    relative = os.path.relpath(record["image"], folder)
    tags = record.get("tags", ())
    confidence = max((tag["score"] for tag in tags), default=0.0)
    if log_prob is not None:
        confidence = math.exp(log_prob / (len(caption.split()) + 1))
    return {
        "name": printable(record["image"]),
        # The dot keeps a name with a colon from being taken for a scheme.
        "href": f"./{quote(os.fsencode(relative))}",
        "error": None if "error" not in record else printable(record["error"]),
        "confidence": f"{confidence:.4f}",
        "log_prob": log_prob,
        "words": _words(caption, record.get("attention")),
        "tags": [{"name": t["name"], "score": round(100.0 * t["score"])} for t in tags],
        "alternatives": record.get("captions", ())[1:],
    }


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
