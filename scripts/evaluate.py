"""Score a checkpoint on a data set, or captions that are written already, as coco-caption does.

python scripts/evaluate.py runs/first/best.safetensors --images … --captions … --split …
python scripts/evaluate.py results.json --captions captions_val.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from captioner import readers
from captioner.checkpoint import CheckpointError, default_path
from captioner.config import ConfigError, SearchOptions
from captioner.evaluation import (
    Evaluation,
    coco_form,
    compare_images,
    describe_captions,
    evaluate_images,
    versions,
)
from captioner.inference import Captioner
from captioner.metrics import MissingToolError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", help="a checkpoint, 'default' for the one in the package, or a COCO results .json")
    add("--captions", type=Path, required=True, help="the references")
    add("--output", type=Path, help="folder for report.json, results.json and references.json")
    add("--meteor", action="store_true", help="METEOR too, by Java and pycocoevalcap")
    add("--spice", action="store_true", help="SPICE too, by Java and pycocoevalcap")
    add("--training-captions", type=Path, help="to count the captions that are not among these")
    add("--training-split", default="", help="of the training captions, as --split")
    add("--subset", action="store_true", help="of a results file: score only the images it has")
    model = parser.add_argument_group("for a checkpoint")
    add = model.add_argument
    add("--images", type=Path, help="the folder of photographs")
    add("--instances", type=Path, help="COCO's objects, for the tags")
    add("--split", default="", help="list of names (Flickr8k), or split (Karpathy)")
    add("--compare-images", type=Path, help="folder with the same photographs once more")
    add("--fit", choices=("squash", "crop"), help="other than the checkpoint's")
    add("--beam-size", type=int, default=SearchOptions.beam_size)
    add("--length-penalty", type=float, default=SearchOptions.length_penalty)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="float32", choices=("auto", "float32", "bfloat16"))
    add("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    if not args.what.endswith(".json") and args.images is None:
        parser.error("--images is needed to evaluate a checkpoint")
    return args


def caption(args: argparse.Namespace) -> tuple[Evaluation, dict[str, Any], list[str]]:
    """Caption the photographs; also return figures of the model, and notes of what is left out."""
    options = SearchOptions(beam_size=args.beam_size, length_penalty=args.length_penalty)
    examples, notes = readers.load(args.captions, args.images, args.split, args.instances)
    model = None if args.what == "default" else args.what
    checkpoint = Captioner.load(model, device=args.device, precision=args.precision).checkpoint
    if args.fit:
        preprocessing = replace(checkpoint.config.preprocessing, fit=args.fit)
        checkpoint.config = replace(checkpoint.config, preprocessing=preprocessing)
    result, unreadable = evaluate_images(checkpoint, examples, options, args.workers)
    notes += [f"{path} is left out: {why}" for path, why in unreadable.items()]
    figures: dict[str, Any] = result.tag_figures()
    if args.compare_images:
        folder = args.compare_images
        figures |= compare_images(checkpoint, result, folder, options, args.workers)
    return result, figures, notes


def training_captions(args: argparse.Namespace) -> list[str] | None:
    if args.training_captions is None:
        return None
    source = args.training_captions
    examples = readers.read(source, source.parent, args.training_split)
    return [caption for example in examples for caption in example.captions]


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Return the three files of the output by name."""
    report: dict[str, Any] = {"figures": {}, "settings": vars(args), "versions": versions()}
    training = training_captions(args)
    if args.what.endswith(".json"):
        examples, captions = readers.pair_results(Path(args.what), args.captions, args.subset)
        said: list[dict[str, Any]] = [{} for _ in examples]
        figures: dict[str, Any] = {}
    else:
        result, figures, report["left_out"] = caption(args)
        examples, captions = result.examples, [written.text for written in result.captions]
        said = [{"tags": [tag.name for tag in tags]} for tags in result.tags]
        file = default_path() if args.what == "default" else Path(args.what)
        report["checkpoint"] = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    scores, entries = describe_captions(examples, captions, training, args.meteor, args.spice)
    report["figures"] = scores | figures
    report["photographs"] = [e | tags for e, tags in zip(entries, said, strict=True)]
    results, references = coco_form(examples, captions)
    return {"report": report, "results": results, "references": references}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        files = evaluate(args)
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                text = json.dumps(content, indent=1, default=str, ensure_ascii=False)
                (args.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    except (CheckpointError, ConfigError, MissingToolError, OSError, readers.DataError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    for note in files["report"].get("left_out", ()):
        print(note, file=sys.stderr)
    for name, value in files["report"]["figures"].items():
        print(f"{name:<16} {value:.4f}" if isinstance(value, float) else f"{name:<16} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
