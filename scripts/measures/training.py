"""A step of training on kept features beside its floor, and what its data costs."""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from captioner.config import Config, DecoderConfig
from captioner.data.dataset import Batch, Features
from captioner.data.example import Example
from captioner.data.sources import Data, Subset
from captioner.data.vocabulary import PAD, SPECIAL
from captioner.model.device import choose_device
from captioner.settings import from_dict
from captioner.training.trainer import Trainer
from measures.timing import Figures, Named, in_turn, ratio, spread

_CELLS = 49


def examples(photographs: int, words: int, tags: int) -> list[Example]:
    """Return captions and tags that are as long as Flickr8k's, and as unequal."""
    draw = random.Random(0)

    def some(kind: str, count: int, mean: float, deviation: float) -> list[str]:
        length = max(1, round(draw.gauss(mean, deviation)))
        return [f"{kind}{draw.randrange(count)}" for _ in range(length)]

    return [
        Example(
            Path(f"{number}.jpg"),
            tuple(" ".join(some("word", words, 10.8, 3.8)) for _ in range(5)),
            tuple(some("tag", tags, 5.2, 1.6)),
        )
        for number in range(photographs)
    ]


class Case:
    """A run of the default sizes, on made-up features, at the first step of its frozen stage."""

    def __init__(self, args: argparse.Namespace, precision: str, folder: Path) -> None:
        made = examples(args.photographs, args.vocabulary - len(SPECIAL), 800)
        settings = {"batch_size": args.batch, "precision": precision}
        config = from_dict(
            Config,
            {
                "data": {"min_count": 1, "tag_min_count": 1},
                "encoder": {"weights": "random"},
                "training": settings,
            },
        )
        data = Data(made, made, [], (Subset(len(made), 1.0),))
        self.trainer = Trainer(config, data, folder, choose_device(args.device), print)
        features = kept_features(folder, len(made), self.trainer.learner.model.encoder.width)
        self.trainer._features = lambda examples: features  # type: ignore[method-assign]
        self.trainer.begin_epoch()

    def wait(self) -> None:
        if self.trainer.learner.device.type == "cuda":
            torch.cuda.synchronize()

    def in_memory(self) -> list[list[Batch]]:
        """Return the steps of an epoch, read by this process."""
        workers, self.trainer.workers = self.trainer.workers, 0
        try:
            return list(self.trainer.steps())
        finally:
            self.trainer.workers = workers

    def learn(self, steps: Iterable[Sequence[Batch]]) -> None:
        trainer = self.trainer
        for parts in steps:
            trainer.learner.update(parts, trainer.stage, trainer.step, [])
        self.wait()

    def floor(self, batch: Batch) -> Callable[[], None]:
        """Return the matrix products of a step, forward and backward, and nothing else."""
        learner, images = self.trainer.learner, len(batch.images)
        config, begun = learner.config.model, learner.checkpoint
        floor = Floor(learner.device, learner.precision)
        floor.product(images * _CELLS, learner.model.encoder.width, config.grid_width, False)
        words, tags = len(begun.vocabulary), len(begun.tags.vocabulary)
        floor.decoder(config.caption, config.grid_width, images, batch.words, words)
        # The tags of each photograph, and an end: a token each, as for words.
        spoken = [[1] * int(count) for count in (batch.tags > 0).sum(dim=1) + 2]
        written = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, spoken)), True, PAD)
        floor.decoder(config.tags, config.grid_width, images, written, tags)
        if config.tag_head == "cells":
            floor.product(images * _CELLS, config.grid_width, tags)

        def products() -> None:
            floor.run()
            self.wait()

        return products


def kept_features(folder: Path, photographs: int, width: int) -> Features:
    """Return random features, mapped from the disk as a run's are."""
    path, shape = folder / "rows.float16", (photographs, _CELLS, width)
    draw = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(photographs):
            file.write(draw.random(shape[1:], np.float32).astype(np.float16).tobytes())
    return Features(np.memmap(path, np.float16, "r", shape=shape), {})


class Floor:
    """Matrix products: each forward, and backward for both of its factors."""

    def __init__(self, device: torch.device, precision: torch.dtype) -> None:
        self._like = torch.zeros((), device=device, dtype=precision)
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def run(self) -> None:
        for left, right in self._pairs:
            torch.matmul(left, right)

    def product(self, rows: int, inputs: int, outputs: int, learnt: bool = True) -> None:
        """Add that of a layer, with the gradient of what it reads if that is ``learnt``."""
        zeros = self._like.new_zeros
        data, weight, gradient = zeros(rows, inputs), zeros(outputs, inputs), zeros(rows, outputs)
        self._pairs += [(data, weight.t()), (gradient.t(), data)]
        if learnt:
            self._pairs.append((gradient, weight))

    def sums(self, images: int, rows: int, width: int) -> None:
        """Add the sums over cells that attention takes for rows, alike many for each image."""
        zeros, each = self._like.new_zeros, -(-rows // images)
        weights, grid = zeros(images, each, _CELLS), zeros(images, _CELLS, width)
        gradient = zeros(images, each, width)
        self._pairs += [(weights, grid), (gradient, grid.mT), (weights.mT, gradient)]

    def decoder(
        self, config: DecoderConfig, depth: int, images: int, tokens: Tensor, words: int
    ) -> None:
        """Add those of teacher forcing; of each position, only the rows that have not ended."""
        hidden, width, embedding = config.hidden, config.attention_width, config.embedding
        going_on = (tokens[:, 1:] != PAD).sum(dim=0).tolist()
        self.product(images, depth, 2 * hidden)  # the first state
        self.product(images * _CELLS, depth, width)  # keys
        for rows in going_on:
            self.product(rows, hidden, width)  # the query
            self.product(rows * _CELLS, width, 1)  # energies
            self.sums(images, rows, depth)
            self.product(rows, hidden, depth)  # the gate
            self.product(rows, embedding + depth, 4 * hidden)  # the cell's input
            self.product(rows, hidden, 4 * hidden)  # the cell's state
        self.product(sum(going_on), hidden + depth, embedding)
        self.product(sum(going_on), embedding, words)


def training(args: argparse.Namespace) -> Named:
    """A step on kept features over its matrix products, and an epoch in memory over a real one."""
    for precision in args.precisions:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(args, precision, Path(folder))
            yield f"{precision}, step", against_floor(case, args.rounds)
            yield f"{precision}, data", against_memory(case, args.rounds)


def against_floor(case: Case, rounds: int) -> Figures:
    ((batch,), *_) = case.in_memory()
    taken = in_turn({"step": lambda: case.learn([[batch]]), "floor": case.floor(batch)}, rounds)
    return {
        "step_ms": spread([1e3 * s for s in taken["step"]]),
        "floor_ms": spread([1e3 * s for s in taken["floor"]]),
        "step / floor": ratio(taken["step"], taken["floor"]),
    }


def against_memory(case: Case, rounds: int) -> Figures:
    steps = case.in_memory()
    runs: dict[str, Callable[[], object]] = {
        "memory": lambda: case.learn(steps),
        "real": lambda: case.learn(case.trainer.steps()),
    }
    taken = in_turn(runs, rounds)
    return {
        "epoch_s": spread(taken["real"]),
        "in memory / real": ratio(taken["memory"], taken["real"]),
    }
