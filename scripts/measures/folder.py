"""A folder run beside its parts, and how it grows."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from captioner.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Preprocessing,
)
from captioner.data.tags import TagSet
from captioner.data.vocabulary import Vocabulary
from captioner.folder import FolderRun
from captioner.folder.describe import read_photograph
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, build_model, save_checkpoint
from captioner.photos.images import open_rgb
from captioner.photos.workers import Found, read_ahead
from measures.timing import Figures, Named, ratio, spread, timed

# Runs the command line, and says what its records took and how much memory there was.
_COUNTED = """
import json, resource, sys, time
from captioner import cli
from captioner.folder import run
plain, times = run.describe_folder, []
def timed(*what, **settings):
    for record in plain(*what, **settings):
        yield record
        # Here the record has been written.
        now = time.perf_counter(), time.process_time()
        times[:] = [times[0] if times else now, now, (times[2] if times else 0) + 1]
run.describe_folder = timed
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
            np.frombuffer(read, np.uint8, offset=1).reshape(3, size, size)
            for read in self._read(self.found)
        ]
        self.pixels = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        self.grids = [self.captioner.encode(some) for some in self.pixels]

    def _read(self, found: Sequence[Found]) -> list[bytes]:
        reader, depth = partial(read_photograph, self.preprocessing), 3 * self.batch
        reading = read_ahead(reader, found, self.workers, depth, 60.0)
        return [read for _, read in reading if isinstance(read, bytes)]

    def decode(self) -> float:
        """Return the time of all but the first, which start the processes: that is no floor."""
        some, everything = self.found[: self.workers], self.found
        start = timed(lambda: self._read(some))
        taken = timed(lambda: self._read(everything)) - start
        return taken * len(everything) / (len(everything) - len(some))

    def encode(self) -> float:
        return timed(lambda: [self.captioner.encode(some) for some in self.pixels])

    def search(self) -> float:
        captioner = self.captioner
        return timed(lambda: [(captioner.captions_of(g), captioner.tags_of(g)) for g in self.grids])

    def run(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return timed(lambda: self._run(os.path.join(folder, "out.jsonl")))

    def _run(self, path: str) -> None:
        run = FolderRun(output=path, batch_size=self.batch, workers=self.workers)
        assert run.run(self.captioner, self.found).described == len(self.found)

    def one_at_a_time(self) -> float:
        some = [found.path for found in self.found[:100]]
        each = timed(lambda: [self.captioner.describe([path]) for path in some]) / len(some)
        return each * len(self.found)


def folder(args: argparse.Namespace) -> Named:
    """A folder run over the sum of its parts alone, and against one photograph at a time."""
    names = ("decode", "encode", "search", "run", "one_at_a_time")
    with tempfile.TemporaryDirectory() as place:
        paths = sorted(args.images.iterdir())[: args.count]
        if args.megapixels:
            paths = enlarged(paths, args.megapixels, args.count, Path(place))
        parts = Parts(paths, args.precision, args.batch_size, args.workers)
        rounds = [[getattr(parts, name)() for name in names] for _ in range(args.rounds + 1)]
    *alone, runs, singles = zip(*rounds[1:], strict=True)
    for name, seconds in zip(names, (*alone, runs, singles), strict=True):
        yield name, {"ms a photograph": spread([1e3 * s / len(paths) for s in seconds])}
    yield "run / parts", {"ratio": ratio(runs, [sum(three) for three in zip(*alone, strict=True)])}
    yield "one at a time / run", {"ratio": ratio(singles, runs)}


def enlarged(paths: Sequence[Path], megapixels: float, count: int, folder: Path) -> list[Path]:
    """Write 20 large, grainy JPEGs, and return ``count`` paths of links to them."""
    height = round((megapixels * 1e6 * 0.75) ** 0.5 / 8) * 8
    size = (height * 4 // 3, height)
    for index, path in enumerate(paths[:20]):
        large = open_rgb(path).resize(size, Image.Resampling.LANCZOS)
        grain = np.random.default_rng(index).normal(0, 5, size=(*size[::-1], 1))
        pixels = (np.asarray(large) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg", quality=90)
    return linked(folder, folder, min(len(paths), 20), count)


def linked(sources: Path, folder: Path, kinds: int, count: int) -> list[Path]:
    links = [folder / f"link{index:07}.jpg" for index in range(count)]
    for index, link in enumerate(links):
        link.symlink_to(sources / f"{index % kinds}.jpg")
    return links


def growth(args: argparse.Namespace) -> Named:
    """The memory and time of 1,000 photographs and of many, with a model that costs nothing."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        model = write_tiny(place / "tiny.safetensors")
        for index in range(8):
            draw = np.random.default_rng(index).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(draw).resize((64, 48)).save(place / f"{index}.jpg")
        taken: dict[int, list[Figures]] = {1000: [], args.count: []}
        for count in taken:
            (place / str(count)).mkdir()
            linked(place, place / str(count), 8, count)
        for count in (1000, 1000, args.count, 1000):
            output = place / f"{len(taken[count])}-{count}.jsonl"
            taken[count].append(counted(model, place / str(count), output))
        again = counted(model, place / str(args.count), place / f"0-{args.count}.jsonl")
    for count, runs in taken.items():
        figures = {key: [round(run[key], 3) for run in runs] for key in ("peak_mb", "ms", "cpu_ms")}
        yield f"{count:,} photographs", figures
    yield "start when complete", {"seconds": again["whole"]}


def write_tiny(path: Path) -> Path:
    decoder = DecoderConfig(8, 8, attention_width=8)
    config = Config(
        preprocessing=Preprocessing(size=32),
        encoder=EncoderConfig("squeezenet1_1", "random"),
        model=ModelConfig(grid_width=8, caption=decoder, tags=decoder),
    )
    words, tags = Vocabulary(list("abcdefgh")), TagSet(list("abcdefgh"))
    save_checkpoint(Checkpoint(build_model(config, words, tags), config, words, tags), path)
    return path


def counted(model: Path, photographs: Path, output: Path) -> Figures:
    arguments = ["caption", str(photographs), "--output", str(output), "--model", str(model)]
    command = [sys.executable, "-P", "-c", _COUNTED, *arguments, "--max-words", "5", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    found: Figures = json.loads(done.stdout)
    if found["times"]:
        first, last, count = found["times"]
        # The first batch came at once.
        found["ms"], found["cpu_ms"] = (
            1e3 * (end - begin) / (count - 32) for begin, end in zip(first, last, strict=True)
        )
    return found
