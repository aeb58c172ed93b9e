"""How all benchmarks take time: in one process, in turn, over rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import quantiles
from typing import Any

import torch

Figures = dict[str, Any]
Named = Iterator[tuple[str, Figures]]


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in each round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return {name: taken[1:] for name, taken in seconds.items()}


def spread(values: Sequence[float]) -> Figures:
    low, median, high = quantiles(values, n=4, method="inclusive")
    return {"median": round(median, 4), "quartiles": [round(low, 4), round(high, 4)]}


def ratio(over: Sequence[float], under: Sequence[float]) -> Figures:
    return spread([a / b for a, b in zip(over, under, strict=True)])


def clock() -> float:
    """Return the time; with one thread, the processor's, that of ended processes included."""
    if torch.get_num_threads() > 1:
        return time.perf_counter()
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def timed(run: Callable[[], object]) -> float:
    started = clock()
    run()
    return clock() - started
