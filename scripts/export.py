"""Make a checkpoint small enough to give away, or an ONNX file that runs without torch.

    python scripts/export.py runs/flickr8k/best.safetensors small.safetensors --storage int8 \\
        --provenance "data=Flickr8k, the 6,000 photographs of its training split"
    python scripts/export.py default calibrated.safetensors --calibration photos
    python scripts/export.py default default.onnx --set beam_size=5 --set no_repeat=2

Neither has the paths of the machine it comes from. An ONNX file, which the extra "export" writes,
has the search inside: `--set` says how it searches, by the names of `captioner.SearchOptions`.
`--calibration` finds the ranges of the encoder's activations that `--precision int8` takes. Then
compare the scores of evaluate.py with `--precision int8` and without.
MODEL may be "default", the one in the package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.console import Parser, complain

if TYPE_CHECKING:
    from captioner.model.checkpoint import Checkpoint


# The most photographs that a calibration looks at.
_ENOUGH = 256


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="MODEL")
    parser.add_argument("target", type=Path, help="FILE.safetensors or FILE.onnx")
    parser.add_argument("--storage", default="int8", choices=("float32", "float16", "int8"))
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="PHOTOS",
        help="a folder of photographs like those to caption: makes --precision int8 possible",
    )
    parser.add_argument(
        "--provenance", action="append", default=[], metavar="KEY=TEXT", help="what info shows"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the search"
    )
    args = parser.parse_args(argv)
    is_onnx = args.target.suffix.lower() == ".onnx"
    if args.set and not is_onnx:
        parser.error("--set goes with FILE.onnx: a checkpoint is searched as its user says")
    if args.calibration and is_onnx:
        parser.error("--calibration goes with FILE.safetensors: an ONNX file computes in float32")

    from captioner.generation.options import SearchOptions
    from captioner.model.checkpoint import CheckpointError, default_path, load_checkpoint
    from captioner.photos.images import ImageError
    from captioner.settings import ConfigError, from_overrides

    source = default_path() if str(args.source) == "default" else args.source
    try:
        options = from_overrides(SearchOptions, args.set)
        checkpoint = load_checkpoint(source)
        checkpoint.provenance |= dict(note.partition("=")[::2] for note in args.provenance)
        if args.calibration:
            _calibrate(checkpoint, args.calibration)
        _save(checkpoint, args.target, args.storage, options if is_onnx else None)
    except (CheckpointError, ConfigError, ImageError, ImportError, OSError) as error:
        complain("export.py", error)
        return 2
    print(f"{args.target}: {args.target.stat().st_size:,} bytes")
    return 0


def _calibrate(checkpoint: Checkpoint, folder: Path) -> None:
    from captioner.folder.find import find_photographs
    from captioner.inference import calibrate

    found = [photograph.path for photograph in find_photographs([str(folder)])]
    # The ranges hardly change after some hundred photographs; those of a folder are often in order.
    calibrate(checkpoint, found[:: len(found) // _ENOUGH + 1])


def _save(checkpoint: Checkpoint, target: Path, storage: str, options: Any) -> None:
    if options is not None:
        try:
            from captioner.export.onnx_file import write_onnx
        except ModuleNotFoundError as error:
            raise ImportError(
                f'{error}; an ONNX file takes the extra: "captioner[export]"'
            ) from None

        write_onnx(checkpoint, target, options, storage)
        return
    from captioner.model.checkpoint import save_checkpoint

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
    save_checkpoint(checkpoint, target, storage)


if __name__ == "__main__":
    sys.exit(main())
