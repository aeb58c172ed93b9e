"""Score a checkpoint on a data set: BLEU-1…4, CIDEr-D, and how often tags are right.

python scripts/evaluate.py runs/first/best.safetensors --images … --captions … --split …
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from captioner import readers
from captioner.checkpoint import CheckpointError
from captioner.config import ConfigError, SearchOptions
from captioner.evaluation import compare_images, evaluate_images
from captioner.inference import Captioner


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a checkpoint, or 'default' for the one in the package")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--instances", type=Path)
    parser.add_argument("--split", default="", help="list of names (Flickr8k), or split (Karpathy)")
    parser.add_argument("--compare-images", type=Path, help="the same photographs once more")
    parser.add_argument("--fit", choices=("squash", "crop"), help="other than the checkpoint's")
    parser.add_argument("--beam-size", type=int, default=SearchOptions.beam_size)
    parser.add_argument("--length-penalty", type=float, default=SearchOptions.length_penalty)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    parser.add_argument("--precision", default="float32", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write figures, captions and tags as JSON")
    return parser.parse_args(argv)


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    options = SearchOptions(beam_size=args.beam_size, length_penalty=args.length_penalty)
    examples, notes = readers.load(args.captions, args.images, args.split, args.instances)
    model = None if args.model == "default" else args.model
    checkpoint = Captioner.load(model, device=args.device, precision=args.precision).checkpoint
    if args.fit:
        preprocessing = replace(checkpoint.config.preprocessing, fit=args.fit)
        checkpoint.config = replace(checkpoint.config, preprocessing=preprocessing)
    result, unreadable = evaluate_images(checkpoint, examples, options, args.workers)
    notes += [f"{path} is left out: {why}" for path, why in unreadable.items()]
    print("\n".join(notes), file=sys.stderr)
    figures: dict[str, Any] = {"photographs": len(result.examples), **result.as_dict()}
    if args.compare_images:
        folder = args.compare_images
        figures |= compare_images(checkpoint, result, folder, options, args.workers)
    return {"figures": figures, "options": asdict(options), "written": result.written()}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        report = evaluate(args)
    except (CheckpointError, ConfigError, readers.DataError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for name, value in report["figures"].items():
        print(f"{name:<16} {value}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
