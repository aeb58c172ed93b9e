"""Workers on a local Ray cluster, against a folder run on the same photographs."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from captioner.folder import FolderRun, RunResult
from captioner.inference import Captioner
from captioner.photos.workers import Found
from measures.timing import Named, ratio, spread

_SHARD = 64  # photographs: so few, that workers end together


def cluster(args: argparse.Namespace) -> Named:
    """Workers of a cluster on this machine, of one CPU each, against a folder run on all CPUs."""
    import ray  # an extra, which the other measures do without

    names = [Found(str(path)) for path in sorted(args.images.iterdir())[: args.count]]
    captioner = Captioner.load(device="cpu", precision=args.precision)
    rates: dict[str, list[float]] = {}
    whole: dict[str, list[float]] = {}
    with ray.init("local", num_cpus=max(args.concurrency), include_dashboard=False,
                  logging_level="ERROR", log_to_driver=False):  # fmt: skip
        for _ in range(args.rounds):
            for name, run in _runs(args, captioner, names).items():
                clock = _Clock()
                run(clock)
                rates.setdefault(name, []).append(clock.rate)
                whole.setdefault(name, []).append(clock.seconds)
    for name, taken in rates.items():
        yield name, {"photographs a second": spread(taken), "seconds in all": spread(whole[name])}
    folder = rates["folder run"]
    for name in list(rates)[1:]:
        yield f"{name} / folder run", {"throughput": ratio(rates[name], folder)}


class _Clock:
    """The times at which a run got on, from its first results: Ray takes seconds to begin."""

    def __init__(self) -> None:
        self._started, self._seen = time.perf_counter(), list[tuple[float, int]]()

    def __call__(self, result: RunResult) -> None:
        if result.done:
            self._seen.append((time.perf_counter(), result.done))

    @property
    def rate(self) -> float:
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first)

    @property
    def seconds(self) -> float:
        return self._seen[-1][0] - self._started


def _runs(
    args: argparse.Namespace, captioner: Captioner, photographs: Sequence[Found]
) -> dict[str, Callable[[_Clock], object]]:
    def folder(clock: _Clock) -> None:
        with tempfile.TemporaryDirectory() as place:
            run = FolderRun(output=Path(place, "out.jsonl"), workers=args.workers, progress=clock)
            run.run(captioner, photographs)

    def workers(count: int) -> Callable[[_Clock], None]:
        def run(clock: _Clock) -> None:
            from captioner.cluster import describe_dataset

            with tempfile.TemporaryDirectory() as place:
                describe_dataset(
                    [photograph.path for photograph in photographs],
                    Path(place, "out.jsonl"),
                    concurrency=count,
                    precision=args.precision,
                    shard_size=max(1, min(_SHARD, args.count // 4)),
                    progress=clock,
                )

        return run

    return {"folder run": folder} | {f"{n} workers": workers(n) for n in args.concurrency}
