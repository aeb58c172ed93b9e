"""Draw coloured shapes with captions and instances in COCO's form, to try training on.

    python scripts/draw_shapes.py shapes --count 300
    python scripts/train.py configs/shapes.toml --set data.images=shapes/images \\
        --set data.captions=shapes/train.json --set data.instances=shapes/instances.json \\
        --set data.val_captions=shapes/val.json --run runs/shapes
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageDraw

from captioner.console import Parser

COLOURS = {"red": "#d22", "green": "#2a3", "blue": "#24d", "yellow": "#ec2", "black": "#111"}
SHAPES = {"circle": 0, "square": 4, "triangle": 3, "hexagon": 6}
PLACES = {"left": (64, 112), "right": (160, 112), "top": (112, 64), "bottom": (112, 160)}


EACH = list(product(SHAPES, COLOURS, PLACES, range(30, 51)))


def draw(each: tuple[str, str, str, int], path: Path) -> tuple[str, list[str], list[float]]:
    """Draw one shape; return its name, its captions and its box (x, y, width, height)."""
    shape, colour, place, radius = each
    x, y = PLACES[place]
    picture = Image.new("RGB", (224, 224), "#eee")
    canvas = ImageDraw.Draw(picture)
    if SHAPES[shape]:
        canvas.regular_polygon((x, y, radius), SHAPES[shape], fill=COLOURS[colour])
    else:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    picture.save(path, quality=92)
    captions = [f"a {colour} {shape} at the {place}", f"there is a {colour} {shape}"]
    return shape, captions, [x - radius, y - radius, 2 * radius, 2 * radius]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=300, help="pictures, a tenth to validate on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists already")
    if args.count > len(EACH):
        parser.error(f"--count is {args.count}; there are {len(EACH)} different pictures")
    splits = ("train", "val")
    categories = [{"id": i, "name": name} for i, name in enumerate(SHAPES, 1)]
    data: dict[str, Any] = {split: {"images": [], "annotations": []} for split in splits}
    instances: list[dict[str, Any]] = []
    (args.folder / "images").mkdir(parents=True)
    # None twice, or what is validated on would have been seen.
    for number, each in enumerate(Random(args.seed).sample(EACH, args.count)):
        name, split = f"{number:06}.jpg", splits[number % 10 == 9]
        shape, captions, box = draw(each, args.folder / "images" / name)
        data[split]["images"].append({"id": number, "file_name": name})
        data[split]["annotations"] += [{"image_id": number, "caption": c} for c in captions]
        area, category = box[2] * box[3], list(SHAPES).index(shape) + 1
        instances.append({"image_id": number, "category_id": category, "bbox": box, "area": area})
    data["instances"] = {"annotations": instances, "categories": categories}
    for name, content in data.items():
        (args.folder / f"{name}.json").write_text(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
