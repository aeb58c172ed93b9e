"""Measure folder runs: what they cost beyond their parts, and how they grow.

    python scripts/benchmark.py folder parts --images Flickr8k/images --count 1500
    python scripts/benchmark.py folder growth --count 100000

`parts`: the whole run (reading, captions, tags, journal, output) over the sum of its parts alone
(decode, encode, search) and against one photograph at a time, in one process, in turn; a ratio is
the median over rounds, in brackets its extremes. `--megapixels 12` enlarges the photographs first.
`growth`: a model that takes next to no time, over links to a few drawn files: memory and time of
1,000 and of `--count` photographs, and the start of a run that is complete.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from captioner.checkpoint import Checkpoint, build_model, save_checkpoint
from captioner.config import Config, DecoderConfig, EncoderConfig, ModelConfig, Preprocessing
from captioner.decoding import Found, read_ahead
from captioner.folder import _read, describe_folder, keep, plan
from captioner.inference import Captioner
from captioner.journal import Journal
from captioner.outputs import output_file
from captioner.tags import TagSet
from captioner.vocabulary import Vocabulary

Figures = dict[str, Any]

# Runs the command line, and says what its records took and how much memory there was.
_COUNTED = """
import json, resource, sys, time
from captioner import cli, folder
plain, times = folder.keep, []
def keep(*what):
    for record in plain(*what):
        now = time.perf_counter(), time.process_time()
        times[:] = [times[0] if times else now, now, (times[2] if times else 0) + 1]
        yield record
folder.keep = keep
started = time.perf_counter()
status = cli.main(sys.argv[1:])
whole = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"status": status, "times": times, "whole": whole, "peak_mb": peak / 1024}))
"""


class Parts:
    """The parts of a run over some photographs, and the whole."""

    def __init__(self, paths: Sequence[Path], precision: str, batch: int, workers: int) -> None:
        self.captioner = Captioner.load(precision=precision)
        self.found = [Found(str(path)) for path in paths]
        self.batch, self.workers = batch, workers
        self.preprocessing = self.captioner.checkpoint.config.preprocessing
        size = self.preprocessing.size
        pixels = [
            np.frombuffer(read, np.uint8).reshape(3, size, size)
            for _, read in self._read_all()
            if isinstance(read, bytes)
        ]
        self.pixels = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        self.grids = [self.captioner.encode(some) for some in self.pixels]

    def _read_all(self) -> Any:
        reader = partial(_read, self.preprocessing)
        return read_ahead(reader, self.found, self.workers, 3 * self.batch, 60.0)

    def decode(self) -> float:
        """Return the seconds from the first photograph on: starting the processes is no floor."""
        reading = self._read_all()
        next(reading)
        started = time.perf_counter()
        rest = sum(1 for _ in reading)
        return (time.perf_counter() - started) * (rest + 1) / rest

    def encode(self) -> float:
        return timed(lambda: [self.captioner.encode(some) for some in self.pixels])

    def search(self) -> float:
        captioner = self.captioner
        return timed(lambda: [(captioner.captions_of(g), captioner.tags_of(g)) for g in self.grids])

    def run(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return timed(lambda: self._run(os.path.join(folder, "out.jsonl")))

    def _run(self, path: str) -> None:
        with Journal(f"{path}.journal", {}) as journal:
            (part,) = plan(self.found, journal)
            output = output_file(path)
            output.start(())
            records = describe_folder(
                self.captioner, part.photographs, batch_size=self.batch, workers=self.workers
            )
            assert sum(1 for _ in keep(records, output, journal)) == len(self.found)
            output.finish((), False)

    def one_at_a_time(self) -> float:
        some = [found.path for found in self.found[:100]]
        each = timed(lambda: [self.captioner.describe([path]) for path in some]) / len(some)
        return each * len(self.found)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> Figures:
    return {
        "median": round(median(values), 3),
        "extremes": [round(f(values), 3) for f in (min, max)],
    }


def parts(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(args.images.iterdir())[: args.count]
        if args.megapixels:
            paths = enlarged(paths, args.megapixels, args.count, Path(folder))
        measured = Parts(paths, args.precision, args.batch_size, args.workers)
        rounds = []
        for _ in range(args.rounds + 1):
            names = ("decode", "encode", "search", "run", "one_at_a_time")
            rounds.append({name: getattr(measured, name)() for name in names})
    rounds = rounds[1:]
    floors = [taken["decode"] + taken["encode"] + taken["search"] for taken in rounds]
    each: Figures = {
        f"{name}, ms a photograph": spread([1e3 * taken[name] / len(paths) for taken in rounds])
        for name in rounds[0]
    }
    runs = [taken["run"] for taken in rounds]
    each["run / floors"] = spread([run / floor for run, floor in zip(runs, floors, strict=True)])
    each["one at a time / run"] = spread(
        [taken["one_at_a_time"] / taken["run"] for taken in rounds]
    )
    return each


def enlarged(paths: Sequence[Path], megapixels: float, count: int, folder: Path) -> list[Path]:
    """Write 20 large, grainy JPEGs, and return ``count`` paths of links to them."""
    height = round((megapixels * 1e6 * 0.75) ** 0.5 / 8) * 8
    size = (height * 4 // 3, height)
    for index, path in enumerate(paths[:20]):
        with Image.open(path) as image:
            large = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        grain = np.random.default_rng(index).normal(0, 5, size=(*size[::-1], 1))
        pixels = (np.asarray(large) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    return linked(folder, folder, min(len(paths), 20), count)


def linked(sources: Path, folder: Path, kinds: int, count: int) -> list[Path]:
    links = [folder / f"link{index:07}.jpg" for index in range(count)]
    for index, link in enumerate(links):
        link.symlink_to(sources / f"{index % kinds}.jpg")
    return links


def growth(args: argparse.Namespace) -> Figures:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_tiny(folder / "tiny.safetensors")
        for index in range(8):
            draw = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(draw).resize((64, 48)).save(folder / f"{index}.jpg")
        for count in (1000, args.count):
            (folder / str(count)).mkdir()
            linked(folder, folder / str(count), 8, count)
        taken: dict[int, list[Figures]] = {1000: [], args.count: []}
        for count in (1000, 1000, args.count, 1000, args.count, 1000)[: 2 * args.rounds + 2]:
            output = folder / f"{len(taken[count])}-{count}.jsonl"
            taken[count].append(counted(model, folder / str(count), output))
        again = counted(model, folder / str(args.count), folder / f"0-{args.count}.jsonl")
    found: Figures = {}
    for count, runs in taken.items():
        found[f"{count:,}: peak, MB"] = spread([run["peak_mb"] for run in runs])
        found[f"{count:,}: ms a photograph"] = spread([run["ms"] for run in runs])
        found[f"{count:,}: of this process's CPU"] = spread([run["cpu_ms"] for run in runs])
    found["complete run, seconds from start to end"] = round(again["whole"], 2)
    return found


def write_tiny(path: Path) -> Path:
    decoder = DecoderConfig(8, 8, attention_width=8)
    config = Config(
        preprocessing=Preprocessing(size=32),
        encoder=EncoderConfig("squeezenet1_1", "random"),
        model=ModelConfig(grid_width=8, caption=decoder, tags=replace(decoder)),
    )
    words, tags = Vocabulary(list("abcdefgh")), TagSet(list("abcdefgh"))
    save_checkpoint(Checkpoint(build_model(config, words, tags), config, words, tags), path)
    return path


def counted(model: Path, photographs: Path, output: Path) -> Figures:
    arguments = ["caption", str(photographs), "--output", str(output), "--model", str(model)]
    command = [sys.executable, "-c", _COUNTED, *arguments, "--max-words", "5", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: Figures = json.loads(done.stdout)
    if found["times"]:
        first, last, count = found["times"]
        # The first batch came at once.
        found["ms"], found["cpu_ms"] = (
            1e3 * (end - begin) / (count - 32) for begin, end in zip(first, last, strict=True)
        )
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(metavar="WHAT", required=True)
    command = what.add_parser("parts", help="the whole run over its parts, and one at a time")
    command.set_defaults(run=parts)
    command.add_argument("--images", type=Path, required=True)
    command.add_argument("--count", type=int, default=1500)
    command.add_argument("--megapixels", type=float)
    command.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    command.add_argument("--rounds", type=int, default=5)
    command = what.add_parser("growth", help="memory and time as photographs become many")
    command.set_defaults(run=growth)
    command.add_argument("--count", type=int, default=100_000)
    command.add_argument("--rounds", type=int, default=1, choices=(1, 2))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, figure in args.run(args).items():
        print(f"{name:<40} {figure}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
