"""Make a checkpoint small enough to give away, without the paths of the machine it comes from.

    python scripts/export.py runs/flickr8k/best.safetensors small.safetensors --storage int8 \\
        --provenance "data=Flickr8k, the 6,000 photographs of its training split"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from captioner.console import Parser, complain


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--storage", default="int8", choices=("float32", "float16", "int8"))
    parser.add_argument(
        "--provenance", action="append", default=[], metavar="KEY=TEXT", help="what info shows"
    )
    args = parser.parse_args(argv)

    from captioner.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

    try:
        checkpoint = load_checkpoint(args.source)
    except CheckpointError as error:
        complain("export.py", error)
        return 2
    config = checkpoint.config
    # Strings and sources of a data config say where its files lay, numbers how they were read.
    nowhere: dict[str, Any] = {
        f.name: f.default for f in fields(config.data) if isinstance(f.default, str | tuple)
    }
    checkpoint.config = replace(
        config,
        data=replace(config.data, **nowhere),
        encoder=replace(config.encoder, weights="default"),
        model=replace(config.model, init=""),
        training=replace(config.training, features=""),
    )
    checkpoint.provenance |= dict(note.partition("=")[::2] for note in args.provenance)
    save_checkpoint(checkpoint, args.target, args.storage)
    print(f"{args.target}: {args.target.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
