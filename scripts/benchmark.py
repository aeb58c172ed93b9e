"""Measure speed as ratios, and whether a batch changes what is found.

    python scripts/benchmark.py metrics      # against pycocoevalcap (pip install "captioner[coco]")
    python scripts/benchmark.py encoder
    python scripts/benchmark.py search --images Flickr8k/images --split Flickr8k/dev.txt
    python scripts/benchmark.py steadiness --images Flickr8k/images --split Flickr8k/dev.txt
    python scripts/benchmark.py folder --images Flickr8k/images      # and with --megapixels 12
    python scripts/benchmark.py serve --images Flickr8k/images       # needs the extra "serve"
    python scripts/benchmark.py cluster --images Flickr8k/images     # needs the extra "ray"
    python scripts/benchmark.py growth
    python scripts/benchmark.py training
    python scripts/benchmark.py tags --images Flickr8k/images --model runs/first/best.safetensors

Times are compared in one process, in turn; a ratio is the median over rounds with its quartiles.
With `--threads 1` they are of the processor's time, which other programs hardly disturb. The
search's peer is the `generate` of the transformers package, 5.24 or later, around the same step,
where that package is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from captioner.config import PRECISIONS
from captioner.console import Parser
from captioner.evaluation import versions
from captioner.memory import keep_freed_memory
from captioner.model.device import choose_device
from measures.cluster import cluster
from measures.encoder import encoder
from measures.folder import folder, growth
from measures.metrics import metrics
from measures.search import search, steadiness
from measures.serve import serve
from measures.tags import tags
from measures.timing import Figures, Named
from measures.training import training


def machine(device: torch.device) -> str:
    threads = torch.get_num_threads()
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    processor = model[0].partition(": ")[2] if model else platform.processor()
    return cuda or f"{processor}, {threads} threads"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda", "mps"))
    kinds = parser.add_subparsers(required=True)

    def add(measure: Callable[[argparse.Namespace], Named]) -> argparse.ArgumentParser:
        kind = kinds.add_parser(measure.__name__, help=measure.__doc__)
        kind.set_defaults(measure=measure)
        return kind

    add(metrics).add_argument("--images", type=int, default=5000)
    kind = add(encoder)
    kind.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 32])
    kind.add_argument("--library", action="store_true", help="do not keep freed memory")
    kind = add(search)
    kind.add_argument("--batch", type=int, default=32, help="images searched at once")
    kind.add_argument("--beam-size", type=int, default=5)
    kind.add_argument("--vocabulary", type=int, default=10_000)
    kind.add_argument("--steps", type=int, default=20)
    kind.add_argument("--peer-beams", type=int, nargs="*", default=list(range(1, 11)))
    kind.add_argument("--images", type=Path, help="photographs, to count early exits on")
    kind.add_argument("--split", type=Path, help="the list of their names")
    kind = add(steadiness)
    kind.add_argument("--sizes", type=int, nargs="*", default=[1, 7, 32, 128])
    kind.add_argument("--images", type=Path, required=True)
    kind.add_argument("--split", type=Path, required=True, help="the list of names")
    for kind in (add(folder), add(serve)):
        kind.add_argument("--images", type=Path, required=True)
        kind.add_argument("--count", type=int, default=1000)
        kind.add_argument("--megapixels", type=float, help="enlarge the photographs first")
        kind.add_argument("--precision", default="auto", choices=PRECISIONS)
        kind.add_argument("--batch-size", type=int, default=32)
        kind.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    kind.add_argument("--clients", type=int, default=32)
    kind = add(cluster)
    kind.add_argument("--images", type=Path, required=True)
    kind.add_argument("--count", type=int, default=2000)
    kind.add_argument("--precision", default="auto", choices=PRECISIONS)
    kind.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    kind.add_argument("--concurrency", type=int, nargs="+", default=[1, 2], help="workers of Ray")
    add(growth).add_argument("--count", type=int, default=100_000)
    kind = add(tags)
    kind.add_argument("--images", type=Path, required=True)
    kind.add_argument("--model", help="a checkpoint (default: the embedded model)")
    kind.add_argument("--count", type=int, default=128)
    kind.add_argument("--batch", type=int, default=32)
    kind = add(training)
    kind.add_argument("--batch", type=int, default=32, help="photographs a step")
    kind.add_argument("--vocabulary", type=int, default=2500)
    kind.add_argument("--photographs", type=int, default=1024, help="of an epoch")
    kind.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not getattr(args, "library", False):
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    report: Figures = {"machine": machine(choose_device(args.device)), "versions": versions()}
    print(report["machine"])
    report["figures"] = {}
    for name, figures in args.measure(args):
        report["figures"][name] = figures
        shown = ", ".join(f"{key} {value}" for key, value in figures.items())
        print(f"{name:<34} {shown}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
