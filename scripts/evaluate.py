"""Score a checkpoint on a data set, or captions that are written already, as coco-caption does.

python scripts/evaluate.py runs/first/best.safetensors --images … --captions … --split …
python scripts/evaluate.py results.json --captions captions_val.json
python scripts/evaluate.py captions.jsonl --captions dataset_flickr8k.json --split test

Ends with 0; with 1 when photographs had to be left out; with 2 when nothing could be scored.
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

from captioner.config import PRECISIONS
from captioner.console import Parser, complain, shown
from captioner.data import readers
from captioner.data.example import DataError
from captioner.data.readers.results import ENDINGS, pair_results
from captioner.evaluation import (
    Evaluation,
    coco_form,
    compare_images,
    describe_captions,
    evaluate_images,
    versions,
)
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.memory import keep_freed_memory
from captioner.metrics import MissingToolError, need_meteor, need_spice
from captioner.model.checkpoint import CheckpointError, default_path
from captioner.settings import ConfigError


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "what",
        help="a checkpoint, 'default' for the one in the package, or captions that are written: "
        "COCO results .json, or captioner's .jsonl or .csv",
    )
    add("--captions", type=Path, required=True, help="the references, of any form")
    add("--split", default="", help="list of names, or split (Karpathy), of the references")
    add("--output", type=Path, help="folder for report.json, results.json and references.json")
    add("--meteor", action="store_true", help="METEOR too, by Java and pycocoevalcap")
    add("--spice", action="store_true", help="SPICE too, by Java and pycocoevalcap")
    add("--training-captions", type=Path, help="to count the captions that are not among these")
    add("--training-split", default="", help="of the training captions, as --split")
    add("--subset", action="store_true", help="score only the images that a results file also has")
    model = parser.add_argument_group("for a checkpoint")
    add = model.add_argument
    add("--images", type=Path, help="the folder of photographs")
    add("--instances", type=Path, help="COCO's objects, for the tags")
    add("--compare-images", type=Path, help="folder with the same photographs once more")
    add("--fit", choices=("squash", "crop"), help="other than the checkpoint's")
    add("--beam-size", type=int, default=SearchOptions.beam_size)
    add("--length-penalty", type=float, default=SearchOptions.length_penalty)
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    add("--precision", default="float32", choices=PRECISIONS)
    add("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    args.written = args.what.lower().endswith(ENDINGS)
    if args.written and (args.images or args.instances or args.compare_images):
        parser.error("a results file is scored without photographs")
    if not args.written and (args.images is None or args.subset):
        parser.error("a checkpoint needs --images, and takes no --subset")
    return args


def caption(args: argparse.Namespace, report: dict[str, Any]) -> tuple[Evaluation, dict[str, Any]]:
    """Caption the photographs; also return figures of the model.

    Adds to the report what was left out and why, and what is odd about the data.
    """
    options = SearchOptions(beam_size=args.beam_size, length_penalty=args.length_penalty)
    loaded = readers.load(args.captions, args.images, args.split, args.instances)
    model = None if args.what == "default" else args.what
    captioner = Captioner.load(model, device=args.device, precision=args.precision)
    checkpoint = captioner.checkpoint
    # What users get is judged: BatchNorm folded and, in int8, convolutions in 8 bits.
    (checkpoint.model.encoder,) = captioner.encoders
    if args.fit:
        preprocessing = replace(checkpoint.config.preprocessing, fit=args.fit)
        checkpoint.config = replace(checkpoint.config, preprocessing=preprocessing)
    result, unreadable = evaluate_images(checkpoint, loaded.examples, options, args.workers)
    report |= {"left_out": loaded.left_out | unreadable, "notes": loaded.notes}
    figures: dict[str, Any] = {
        "left_out": len(report["left_out"]),
        **result.tag_figures(),
        **result.confidence_figures(),
    }
    if args.compare_images:
        folder = args.compare_images
        figures |= compare_images(checkpoint, result, folder, options, args.workers)
    return result, figures


def training_captions(args: argparse.Namespace) -> list[str] | None:
    if args.training_captions is None:
        return None
    source = args.training_captions
    examples = readers.read(source, args.training_split).examples
    return [caption for example in examples for caption in example.captions]


def prepare(args: argparse.Namespace) -> None:
    """Find out before any work what would spoil it at the end."""
    if args.meteor:
        need_meteor()
    if args.spice:
        need_spice()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        for file in (Path(args.what), args.captions):
            if file.resolve().parent == args.output.resolve():
                raise DataError(f"{file} would be overwritten; take another --output")


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Return the three files of the output by name."""
    report: dict[str, Any] = {"figures": {}, "settings": vars(args), "versions": versions()}
    training = training_captions(args)
    file = default_path() if args.what == "default" else Path(args.what)
    if args.written:
        references = readers.read(args.captions, args.split)
        paired = pair_results(file, references, args.captions, args.subset)
        examples, captions, report["notes"] = paired
        said: list[dict[str, Any]] = [{} for _ in examples]
        figures: dict[str, Any] = {}
    else:
        result, figures = caption(args, report)
        examples, captions = result.examples, [written.text for written in result.captions]
        said = [{"tags": [tag.name for tag in tags]} for tags in result.tags]
    report["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    scores, entries = describe_captions(examples, captions, training, args.meteor, args.spice)
    report["figures"] = scores | figures
    report["captions"] = [e | tags for e, tags in zip(entries, said, strict=True)]
    results, wanted = coco_form(examples, captions)
    return {"report": report, "results": results, "references": wanted}


def table(figures: dict[str, Any]) -> str:
    return "".join(f"{name:<16} {shown(value, name)}\n" for name, value in figures.items())


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    keep_freed_memory()
    try:
        prepare(args)
        files = evaluate(args)
        print(table(files["report"]["figures"]), end="", flush=True)
        for name, content in files.items() if args.output else ():
            text = json.dumps(content, indent=1, default=str)
            (args.output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    except (CheckpointError, ConfigError, MissingToolError, OSError, DataError) as error:
        complain("evaluate.py", error)
        return 2
    for note in files["report"]["notes"]:
        complain("evaluate.py", note)
    left_out = files["report"].get("left_out", {})
    for path, why in left_out.items():
        complain("evaluate.py", f"left out {path}: {why}")
    return 1 if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
