"""Self-contained HTML pages from templates, and the thumbnails in them."""

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
    """Write the page of a template, with its style and script inline, whole or not at all.

    The template is ``page/NAME.html``, which extends ``page.html``. The style is ``page.css``, then
    ``NAME.css``. The script is ``NAME.js``, if there is one. The values are escaped. Raises
    ``OSError``.
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
    """Return the width and the height in decimal digits, then a JPEG of at most 256 x 256 pixels.

    Raises ``UnreadableError``.
    """
    image = open_rgb(path, _SIDE // 3)
    image.thumbnail((_SIDE, _SIDE), reducing_gap=2.0)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=65)
    return b"%d %d " % image.size + stream.getvalue()


def picture(thumbnail: bytes) -> dict[str, Any]:
    """Return the template's values for a thumbnail: its size in pixels, its JPEG in base64."""
    width, height, jpeg = thumbnail.split(b" ", 2)
    return {"width": int(width), "height": int(height), "thumbnail": b64encode(jpeg).decode()}
