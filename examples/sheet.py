"""Draw photographs side by side, each with its caption and tags beneath; print them as well.

python examples/sheet.py docs/captions.jpg --photographs camera.png astronaut.png
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from captioner import Captioner, Description

SIDE, MARGIN, TEXT = 300, 12, 100  # pixels: a photograph, the space around it, the lines beneath
LETTERS = 36  # in a line


def draw(photographs: Sequence[Path], descriptions: Sequence[Description]) -> Image.Image:
    """Return the sheet: one column for each photograph, cut to a square."""
    columns, step = len(photographs), SIDE + MARGIN
    sheet = Image.new("RGB", (columns * step + MARGIN, SIDE + 2 * MARGIN + TEXT), "white")
    canvas = ImageDraw.Draw(sheet)
    for column, (path, description) in enumerate(zip(photographs, descriptions, strict=True)):
        left, below = MARGIN + column * step, SIDE + 2 * MARGIN
        with Image.open(path) as photograph:
            square = ImageOps.fit(photograph.convert("RGB"), (SIDE, SIDE))
        sheet.paste(square, (left, MARGIN))
        caption = textwrap.fill(description.caption.text, LETTERS)
        tags = ", ".join(tag.name for tag in description.tags)
        canvas.text((left, below), caption, "black", ImageFont.load_default(17))
        lines = caption.count("\n") + 1
        canvas.text((left, below + 24 * lines), tags, "#666", ImageFont.load_default(14))
    return sheet


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sheet", type=Path, help="the picture to write; .jpg keeps it small")
    parser.add_argument("--photographs", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--model", help="a checkpoint (default: the embedded model)")
    args = parser.parse_args(argv)
    captioner = Captioner.load(args.model, precision="float32")
    descriptions = captioner.describe(args.photographs)
    for path, description in zip(args.photographs, descriptions, strict=True):
        tags = ", ".join(tag.name for tag in description.tags)
        print(f"{path.name}  {description.caption.text}  [{tags}]")
    draw(args.photographs, descriptions).save(args.sheet, quality=82)
    return 0


if __name__ == "__main__":
    sys.exit(main())
