"""Measure speed as ratios, and whether a batch changes what is found.

    python scripts/benchmark.py metrics      # against pycocoevalcap (pip install "captioner[coco]")
    python scripts/benchmark.py search --images Flickr8k/images --split Flickr8k/dev.txt
    python scripts/benchmark.py steadiness --images Flickr8k/images --split Flickr8k/dev.txt
    python scripts/benchmark.py folder --images Flickr8k/images      # and with --megapixels 12
    python scripts/benchmark.py growth

Times are compared in one process, in turn; a ratio is the median over rounds with its quartiles.
With `--threads 1` they are of the processor's time, which other programs hardly disturb. The
search's peer is the `generate` of the transformers package around the same step, where that
package is installed.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from captioner import search as search_room
from captioner.checkpoint import Checkpoint, build_model, save_checkpoint
from captioner.config import (
    Config,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    Preprocessing,
    SearchOptions,
)
from captioner.decoder import Decoder, DecoderState
from captioner.decoding import Found, read_ahead
from captioner.evaluation import versions
from captioner.folder import _read, describe_folder, keep, plan
from captioner.generation import Caption, write_captions
from captioner.inference import Captioner
from captioner.journal import Journal
from captioner.metrics import References
from captioner.model import choose_device
from captioner.outputs import output_file
from captioner.tags import TagSet
from captioner.vocabulary import BOS, EOS, PAD, SPECIAL, Vocabulary

Figures = dict[str, Any]
Named = Iterator[tuple[str, Figures]]


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, after a round that does not count."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: taken[1:] for name, taken in seconds.items()}


def spread(values: Sequence[float]) -> Figures:
    low, median, high = quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


def ratio(over: Sequence[float], under: Sequence[float]) -> Figures:
    return spread([a / b for a, b in zip(over, under, strict=True)])


def made_captions(images: int, each: int, seed: int) -> list[list[list[str]]]:
    """Make up captions of 7 to 15 words, as frequent as words are (Zipf), of 5,000 words."""
    draw = random.Random(seed)
    words = [f"w{n}" for n in range(5000)]
    weights = [1.0 / (n + 3) for n in range(5000)]
    return [
        [draw.choices(words, weights, k=draw.randint(7, 15)) for _ in range(each)]
        for _ in range(images)
    ]


def metrics(args: argparse.Namespace) -> Named:
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

    def ours() -> None:
        References(wanted).score(written)

    def theirs_reward() -> None:
        Cider().compute_score(*theirs)

    taken = in_turn({"theirs": all_three, "ours": ours}, args.rounds)
    yield "pycocoevalcap / ours", {"ratio": ratio(taken["theirs"], taken["ours"])}
    taken = in_turn({"theirs": theirs_reward, "ours": reward}, args.rounds)
    yield "Cider / reward", {"ratio": ratio(taken["theirs"], taken["ours"])}


class Sizes(NamedTuple):
    """What is searched; the decoder has its default sizes."""

    images: int
    beam_size: int
    vocabulary: int
    steps: int
    cells: int = 49
    width: int = 512


class Case:
    """A decoder at random weights, and grids, on one device in one precision."""

    def __init__(self, sizes: Sizes, device: torch.device, precision: torch.dtype) -> None:
        torch.manual_seed(0)
        self.sizes = sizes
        decoder = Decoder(DecoderConfig(), sizes.width, sizes.vocabulary).eval()
        self.decoder = decoder.to(device, precision)
        self.grid = torch.randn(sizes.images, sizes.cells, sizes.width).to(device, precision)
        count = sizes.vocabulary - len(SPECIAL)
        self.vocabulary = Vocabulary([f"word{number}" for number in range(count)])

    def search(self, images: int | None = None) -> None:
        """Search with all steps forced, so that one caption is as long as another."""
        words = self.sizes.steps - 1
        options = SearchOptions(self.sizes.beam_size, max_words=words, min_words=words)
        write_captions([self.decoder], self.vocabulary, [self.grid[:images]], options)
        self.wait()

    def wait(self) -> None:
        if self.grid.device.type == "cuda":
            torch.cuda.synchronize()

    def floor(self) -> Callable[[], None]:
        """Return the matrix products of a whole search, and nothing else."""
        config, sizes, grid = DecoderConfig(), self.sizes, self.grid
        rows, hidden, embedding = sizes.images * sizes.beam_size, config.hidden, config.embedding
        cells, width, depth = sizes.images * sizes.cells, config.attention_width, sizes.width
        shapes = [
            (rows, embedding + depth, 4 * hidden),  # the cell's input
            (rows, hidden, 4 * hidden),  # the cell's state
            (rows, hidden, width),  # the query
            (sizes.beam_size * cells, width, 1),  # energies
            (rows, hidden, depth),  # the gate
            (rows, hidden + depth, embedding),
            (rows, embedding, sizes.vocabulary),
        ]
        pairs = [(grid.new_zeros(n, k), grid.new_zeros(m, k).t()) for n, k, m in shapes]
        weights = grid.new_zeros(sizes.images, sizes.beam_size, sizes.cells)
        keys = (grid.flatten(0, 1), grid.new_zeros(width, depth).t())

        def products() -> None:
            torch.mm(*keys)
            for _ in range(sizes.steps):
                for left, right in pairs:
                    torch.mm(left, right)
                torch.bmm(weights, grid)
            self.wait()

        return products


def peer(case: Case) -> tuple[Callable[[], None], int]:
    """Return a run of transformers' generate around the same step, and its wrapper's lines."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class Cache:
        is_compileable = False

        def __init__(self, state: DecoderState, beam_size: int) -> None:
            self.state, self.beam_size = state, beam_size

        def reorder_cache(self, rows: Tensor) -> None:
            self.state = self.state.select(rows.view(-1, self.beam_size))

        def get_seq_length(self) -> int:
            return 0

    class Peer(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config_class = PretrainedConfig
        main_input_name = "input_ids"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.decoder = case.decoder

        def forward(self, input_ids: Tensor, past_key_values: Cache, **rest: Any) -> Any:
            tokens = input_ids[:, -1]
            logits, _, past_key_values.state = self.decoder.step(tokens, past_key_values.state)
            return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past_key_values)

    sizes, device = case.sizes, case.grid.device
    special: Figures = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = Peer(PretrainedConfig(vocab_size=sizes.vocabulary, **special)).eval()
    first = torch.full((sizes.images, 1), BOS, device=device)
    beams = torch.arange(sizes.images, device=device)[:, None].expand(-1, sizes.beam_size)

    def run() -> None:
        model.generate(
            first,
            past_key_values=Cache(case.decoder.start(case.grid).select(beams), sizes.beam_size),
            num_beams=sizes.beam_size,
            min_new_tokens=sizes.steps,
            max_new_tokens=sizes.steps,
            do_sample=False,
            **special,
        )
        case.wait()

    return run, sum(len(inspect.getsource(part).splitlines()) for part in (Cache, Peer))


def against_floor(case: Case, rounds: int) -> Figures:
    taken = in_turn({"search": case.search, "floor": case.floor()}, rounds)
    return {
        "search_ms": spread([1e3 * s for s in taken["search"]]),
        "floor_ms": spread([1e3 * s for s in taken["floor"]]),
        "search / floor": ratio(taken["search"], taken["floor"]),
    }


def against_peer(case: Case, rounds: int) -> Figures:
    run, lines = peer(case)
    taken = in_turn({"search": case.search, "peer": run}, rounds)
    return {"search / peer": ratio(taken["search"], taken["peer"]), "wrapper_lines": lines}


def batch_growth(case: Case, rounds: int) -> Figures:
    whole = case.sizes.images
    taken = in_turn({"one": lambda: case.search(1), "all": case.search}, rounds)
    return {f"a caption of 1 / of {whole}": ratio(taken["one"], [s / whole for s in taken["all"]])}


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the bytes of the largest tensor that was made."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


def memory(case: Case) -> Figures:
    """Return the largest tensor of a search, beside a step's and all steps' log-probabilities."""
    sizes = case.sizes
    with torch.inference_mode(False), Largest() as largest:  # type: ignore[no-untyped-call]
        case.search()
    step = 4 * sizes.images * sizes.beam_size * sizes.vocabulary
    made = {"largest_tensor": largest.bytes, "one_step": step, "all_steps": step * sizes.steps}
    return {f"{name}_mb": round(count / 1e6, 1) for name, count in made.items()}


def early_exit(images: Path, split: Path, precision: str, device: torch.device) -> Figures:
    """Return the rows stepped in batches of 32 over those stepped for each photograph alone."""
    captioner = Captioner.load(device=str(device), precision=precision)
    decoder, names = captioner.checkpoint.model.caption_decoder, split.read_text().split()
    plain, rows = decoder.step, [0, 0]

    for start in range(0, len(names), 32):
        pixels = [captioner.pixels(images / name) for name in names[start : start + 32]]
        (grid,) = captioner.encode(pixels)
        for place, batches in enumerate(([grid], [image[None] for image in grid])):

            def counted(tokens: Tensor, state: DecoderState, place: int = place) -> Any:
                rows[place] += len(tokens)
                return plain(tokens, state)

            decoder.step = counted  # type: ignore[method-assign]
            for batch in batches:
                captioner.captions_of([batch])
    return {"photographs": len(names), "rows": rows, "computed / needed": rows[0] / rows[1]}


@contextmanager
def gaps() -> Iterator[list[float]]:
    """Collect, of every image and step, how far the worst kept hypothesis was from the best cut."""
    found: list[float] = []
    plain = search_room._keep

    def keep(ranks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        several = ranks.flatten(1)
        ordered = several.topk(min(count + 1, several.shape[1])).values[:, -2:]
        apart = ordered[:, 0] - ordered[:, 1]
        found.extend(apart[apart.isfinite()].tolist())
        return plain(ranks, count)

    search_room._keep = keep
    try:
        yield found
    finally:
        search_room._keep = plain


def captions_in_batches(
    captioner: Captioner, pixels: Sequence[Any], size: int, options: SearchOptions
) -> list[list[Caption]]:
    batches = (pixels[start : start + size] for start in range(0, len(pixels), size))
    found = (captioner.captions_of(captioner.encode(batch), options) for batch in batches)
    return list(chain(*found))


def beside(these: list[list[Caption]], those: list[list[Caption]]) -> Figures:
    """Return how many of the photographs have other captions, and how far scores differ."""
    pairs = list(zip(these, those, strict=True))
    several = [[caption.text for caption in found] for found in chain(*pairs)]
    same = [(a, b) for pair in pairs for a, b in zip(*pair, strict=True) if a.text == b.text]
    return {
        "best differ": sum(a[0].text != b[0].text for a, b in pairs),
        "n-best differ": sum(a != b for a, b in zip(several[::2], several[1::2], strict=True)),
        "log_prob apart": max(abs(a.log_prob - b.log_prob) for a, b in same),
    }


def steadiness(args: argparse.Namespace) -> Named:
    """Caption the same photographs in batches of several sizes, shuffled, and in bfloat16."""
    options = SearchOptions(num_captions=SearchOptions.beam_size)
    captioner = Captioner.load(device=args.device, precision="float32")
    names = args.split.read_text().split()
    pixels = [captioner.pixels(args.images / name) for name in names]
    with gaps() as cut:
        expected = captions_in_batches(captioner, pixels, 32, options)
    ranks = [
        [c.log_prob / (len(c.words) + 1) ** options.length_penalty for c in found]
        for found in expected
    ]
    between = [a - b for found in ranks for a, b in pairwise(found)]
    yield "photographs", {"count": len(names), "captions each": options.num_captions}
    yield "smallest gap", {"between kept and cut": min(cut), "between captions": min(between)}
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = captions_in_batches(captioner, [pixels[place] for place in order], 32, options)
    yield "shuffled", beside(shuffled, [expected[place] for place in order])
    other = Captioner.load(device=args.device, precision="bfloat16")
    yield "bfloat16", beside(captions_in_batches(other, pixels, 32, options), expected)
    for size in args.sizes:
        again = captions_in_batches(captioner, pixels, size, options)
        yield f"batches of {size}", beside(again, expected)


def search(args: argparse.Namespace) -> Named:
    """Measure the search at random weights, and on photographs when it can stop."""
    device, rounds = choose_device(args.device), args.rounds
    sizes = Sizes(args.batch, args.beam_size, args.vocabulary, args.steps)
    small = sizes._replace(vocabulary=min(2500, sizes.vocabulary), beam_size=3)
    for precision in (torch.float32, torch.bfloat16):
        name = str(precision).removeprefix("torch.")
        for other in (sizes, small):
            shape = f"beam {other.beam_size}, vocabulary {other.vocabulary}"
            yield f"{name}, {shape}", against_floor(Case(other, device, precision), rounds)
        case = Case(sizes, device, precision)
        yield f"{name}, batch", batch_growth(case, rounds)
        yield f"{name}, memory", memory(case)
        for beam_size in args.peer_beams if find_spec("transformers") else ():
            case = Case(sizes._replace(beam_size=beam_size), device, precision)
            yield f"{name}, peer, beam {beam_size}", against_peer(case, rounds)
    for name in ("float32", "bfloat16") if args.images and args.split else ():
        yield f"{name}, early exit", early_exit(args.images, args.split, name, device)


def machine(device: torch.device) -> str:
    threads = torch.get_num_threads()
    cuda = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    model = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    processor = model[0].partition(": ")[2] if model else platform.processor()
    return cuda or f"{processor}, {threads} threads"


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
            np.frombuffer(read, np.uint8).reshape(3, size, size) for read in self._read(self.found)
        ]
        self.pixels = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
        self.grids = [self.captioner.encode(some) for some in self.pixels]

    def _read(self, found: Sequence[Found]) -> list[bytes]:
        reader, depth = partial(_read, self.preprocessing), 3 * self.batch
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


def clock() -> float:
    """Return the time; with one thread, the processor's, that of ended processes included."""
    return sum(os.times()[:4]) if torch.get_num_threads() == 1 else time.perf_counter()


def timed(run: Callable[[], object]) -> float:
    started = clock()
    run()
    return clock() - started


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
    command = [sys.executable, "-c", _COUNTED, *arguments, "--max-words", "5", "--quiet"]
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    kind = add(folder)
    kind.add_argument("--images", type=Path, required=True)
    kind.add_argument("--count", type=int, default=1000)
    kind.add_argument("--megapixels", type=float, help="enlarge the photographs first")
    kind.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16"))
    kind.add_argument("--batch-size", type=int, default=32)
    kind.add_argument("--workers", type=int, default=max(2, os.cpu_count() or 1))
    add(growth).add_argument("--count", type=int, default=100_000)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
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
