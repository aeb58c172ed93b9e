"""Measure speed as ratios, in one process, in turns: medians with their spread.

python scripts/benchmark.py metrics        # against pycocoevalcap (pip install "captioner[coco]")
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from captioner.evaluation import versions
from captioner.metrics import References


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ratio(slow: Callable[[], object], quick: Callable[[], object], rounds: int) -> dict[str, float]:
    """Return the median of the first's time over the second's, and the extremes."""
    slow(), quick()
    ratios = [seconds(slow) / seconds(quick) for _ in range(rounds)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def made_captions(images: int, each: int, seed: int) -> list[list[list[str]]]:
    """Make up captions of 7 to 15 words, as frequent as words are (Zipf), of 5,000 words."""
    draw = random.Random(seed)
    words = [f"w{n}" for n in range(5000)]
    weights = [1.0 / (n + 3) for n in range(5000)]
    return [
        [draw.choices(words, weights, k=draw.randint(7, 15)) for _ in range(each)]
        for _ in range(images)
    ]


def measure_metrics(args: argparse.Namespace) -> dict[str, Any]:
    """CIDEr-D, BLEU and ROUGE-L of 5,000 images; CIDEr-D as a reward, 160 candidates at a time."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    wanted = made_captions(args.images, 5, seed=1)
    written = [each[0] for each in made_captions(args.images, 1, seed=2)]
    theirs = (
        {i: [" ".join(words) for words in each] for i, each in enumerate(wanted)},
        {i: [" ".join(words)] for i, words in enumerate(written)},
    )
    prepared = References(wanted)

    def reward() -> None:
        for start in range(0, args.images, 160):
            chunk = written[start : start + 160]
            prepared.cider_d(chunk, range(start, start + len(chunk)))

    def all_three() -> None:
        Bleu(4).compute_score(*theirs, verbose=0)
        Rouge().compute_score(*theirs)
        Cider().compute_score(*theirs)

    return {
        "pycocoevalcap / ours": ratio(
            all_three, lambda: References(wanted).score(written), args.rounds
        ),
        "Cider / reward": ratio(lambda: Cider().compute_score(*theirs), reward, args.rounds),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=7)
    kinds = parser.add_subparsers(required=True)
    metrics = kinds.add_parser("metrics", help=measure_metrics.__doc__)
    metrics.add_argument("--images", type=int, default=5000)
    metrics.set_defaults(measure=measure_metrics)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    figures = args.measure(args)
    report = {"figures": figures, "machine": platform.platform(), "versions": versions()}
    for name, value in figures.items():
        print(f"{name:<24} {value['median']:6.2f}  ({value['low']:.2f} to {value['high']:.2f})")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
