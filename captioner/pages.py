"""What all pages for a browser have in common: one file that needs nothing else, thumbnails."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from io import BytesIO
from typing import Any

from jinja2 import Environment, PackageLoader

from captioner.files import replacing
from captioner.photos.images import open_rgb

__all__ = ["picture", "thumbnail", "write_page"]

_SIDE = 256


def write_page(path: str, name: str, **values: Any) -> None:
    """Write the page of a template, with its style and its script in it, whole or not at all.

    Its files are ``page/NAME.html``, which extends ``page.html``, ``NAME.css``, which comes after
    ``page.css``, and where there is one ``NAME.js``. The values are escaped. Raises ``OSError``.
    """
    loader = PackageLoader("captioner", "page")
    environment = Environment(autoescape=True, loader=loader)

    def source(file: str) -> str:
        return loader.get_source(environment, file)[0]

    style = source("page.css") + source(f"{name}.css")
    script = source(f"{name}.js") if f"{name}.js" in loader.list_templates() else ""
    stream = environment.get_template(f"{name}.html").stream(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script), **values
    )
    stream.enable_buffering(64)
    with replacing(path) as file:
        for part in stream:
            file.write(part.encode("utf-8", "backslashreplace"))


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def thumbnail(path: str) -> bytes:
    """Return a JPEG, its longer side at most 256 pixels, after its width and height.

    Raises ``UnreadableError``.
    """
    image = open_rgb(path, _SIDE // 3)
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=65)
    return b"%d %d " % image.size + stream.getvalue()


def picture(thumbnail: bytes) -> dict[str, Any]:
    """Return what a page needs to show a thumbnail."""
    width, height, jpeg = thumbnail.split(b" ", 2)
    return {"width": int(width), "height": int(height), "thumbnail": b64encode(jpeg).decode()}
