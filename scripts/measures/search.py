"""The search's speed, memory and steadiness."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from captioner.config import DecoderConfig
from captioner.data.vocabulary import BOS, EOS, PAD, SPECIAL, Vocabulary
from captioner.generation import search as search_room
from captioner.generation.captions import write_captions
from captioner.generation.description import Caption
from captioner.generation.options import SearchOptions
from captioner.inference import Captioner
from captioner.model.decoder import Decoder, DecoderState
from captioner.model.device import choose_device
from measures.timing import Figures, Named, in_turn, ratio, spread


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
        is_linear = (True,)  # of the one layer: its state does not grow with the text

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

        def forward(self, input_ids: Tensor, cache: Cache, **rest: Any) -> Any:
            tokens = input_ids[:, -1]
            logits, _, cache.state = self.decoder.step(tokens, cache.state)
            return CausalLMOutputWithPast(logits=logits[:, None], cache=cache)

    sizes, device = case.sizes, case.grid.device
    special: Figures = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = Peer(PretrainedConfig(vocab_size=sizes.vocabulary, **special)).eval()
    first = torch.full((sizes.images, 1), BOS, device=device)
    beams = torch.arange(sizes.images, device=device)[:, None].expand(-1, sizes.beam_size)

    def run() -> None:
        model.generate(
            first,
            cache=Cache(case.decoder.start(case.grid).select(beams), sizes.beam_size),
            num_beams=sizes.beam_size,
            min_new_tokens=sizes.steps,
            max_new_tokens=sizes.steps,
            do_sample=False,
            **special,
        )
        case.wait()

    return run, sum(len(inspect.getsource(part).splitlines()) for part in (Cache, Peer))


def plain_loops(case: Case) -> dict[str, Callable[[], None]]:
    """Return plain loops around the same step for one photograph, as peers have them; no rules.

    The manner of "tutorial" is that of sgrvinod's a-PyTorch-Tutorial-to-Image-Captioning: the best
    of all words of all rows go on, and each row is asked whether it has ended. The manner of
    "toolkit", for greedy search only, is that of ruotianluo's ImageCaptioning.pytorch: words and
    scores are written into tensors, and all rows are asked at once.
    """
    decoder, (_, beam_size, vocabulary, steps, *_) = case.decoder, case.sizes

    def scores_after(tokens: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        logits, _, state = decoder.step(tokens, state)
        log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        log_probs[:, EOS] = -torch.inf  # all steps are forced
        return log_probs, state

    @torch.inference_mode()
    def tutorial() -> None:
        rows = torch.zeros((1, beam_size), dtype=torch.long, device=case.grid.device)
        state, tokens = decoder.start(case.grid).select(rows), rows[0] + BOS
        written, totals = tokens[:, None], torch.zeros_like(tokens, dtype=torch.float32)
        for position in range(steps):
            log_probs, state = scores_after(tokens, state)
            scores = (totals[:, None] + log_probs)[: None if position else 1]
            totals, places = scores.flatten().topk(beam_size)
            parents, tokens = places // vocabulary, places % vocabulary
            written = torch.cat([written[parents], tokens[:, None]], dim=1)
            going_on = [row for row, token in enumerate(tokens) if token != EOS]
            totals, tokens, written = totals[going_on], tokens[going_on], written[going_on]
            state = state.select(parents[going_on][None])
        case.wait()

    @torch.inference_mode()
    def toolkit() -> None:
        state, tokens = decoder.start(case.grid), torch.full((1,), BOS, device=case.grid.device)
        written = torch.zeros((1, steps), dtype=torch.long, device=tokens.device)
        terms, going_on = torch.zeros_like(written, dtype=torch.float32), tokens == BOS
        for position in range(steps):
            log_probs, state = scores_after(tokens, state)
            terms[:, position], tokens = log_probs.max(dim=1)
            written[:, position], going_on = tokens, going_on & (tokens != EOS)
            if not going_on.any():
                break
        case.wait()

    return {"tutorial": tutorial} | ({"toolkit": toolkit} if beam_size == 1 else {})


def alone(case: Case, rounds: int) -> Figures:
    """Return the search of one photograph over its matrix products, and over plain loops.

    "search" has the weights that all others have; "in use" has them packed, as a ``Captioner`` has.
    """
    in_use = copy(case)
    in_use.decoder = case.decoder.packed()
    ours: dict[str, Callable[[], object]] = {"search": case.search, "in use": in_use.search}
    taken = in_turn({**ours, "floor": case.floor(), **plain_loops(case)}, rounds)
    shown: Figures = {f"{name}_ms": spread([1e3 * s for s in taken[name]]) for name in ours}
    return shown | {
        f"{name} / {other}": ratio(taken[name], taken[other])
        for name in ours
        for other in taken
        if other not in ours
    }


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


def doubled(case: Case, name: str, rounds: int) -> Figures:
    """Return the time, and the largest tensor, of twice the images, beams, words or steps."""
    twice = case.sizes._replace(**{name: 2 * getattr(case.sizes, name)})
    larger = Case(twice, case.grid.device, case.grid.dtype)
    taken = in_turn({"once": case.search, "twice": larger.search}, rounds)
    largest = [memory(each)["largest_tensor_mb"] for each in (larger, case)]
    return {
        "time": ratio(taken["twice"], taken["once"]),
        "largest tensor": round(largest[0] / largest[1], 2),
    }


def early_exit(images: Path, split: Path, precision: str, device: torch.device) -> Figures:
    """Return the rows stepped in batches of 32 over those stepped for each photograph alone."""
    captioner = Captioner.load(device=str(device), precision=precision)
    (decoder,), names = captioner.decoders, split.read_text().split()
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
        "log_prob apart": max((abs(a.log_prob - b.log_prob) for a, b in same), default=math.nan),
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
        for beam_size in (1, 3):
            one = Case(sizes._replace(images=1, beam_size=beam_size), device, precision)
            yield f"{name}, one photograph, beam {beam_size}", alone(one, rounds)
        case = Case(sizes, device, precision)
        yield f"{name}, batch", batch_growth(case, rounds)
        for each in ("images", "beam_size", "vocabulary", "steps"):
            yield f"{name}, twice the {each}", doubled(case, each, rounds)
        yield f"{name}, memory", memory(case)
        for beam_size in args.peer_beams if find_spec("transformers") else ():
            case = Case(sizes._replace(beam_size=beam_size), device, precision)
            yield f"{name}, peer, beam {beam_size}", against_peer(case, rounds)
    for name in ("float32", "bfloat16") if args.images and args.split else ():
        yield f"{name}, early exit", early_exit(args.images, args.split, name, device)
