"""A page that sums a training run up, beside its checkpoints: one file that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from captioner.config import Config
from captioner.files import Record, printable
from captioner.pages import picture, thumbnail, write_page
from captioner.photos.images import UnreadableError
from captioner.settings import to_dict
from captioner.training.runlog import read_log

__all__ = ["write_summary"]


class _Figure(NamedTuple):
    """How a figure is named and written."""

    title: str
    form: str = ".4g"
    factor: float = 1.0

    def write(self, value: float | str | None) -> str:
        if value is None:
            return "–"
        return value if isinstance(value, str) else format(self.factor * value, self.form)


_FIGURES = {
    "step": _Figure("Step", ",.0f"),
    "loss": _Figure("Loss", ".3f"),
    "reward": _Figure("Reward", ".3f"),
    "rate": _Figure("Learning rate", ".3g"),
    "gradient_norm": _Figure("Norm of the gradient", ".3g"),
    **{f"bleu_{n}": _Figure(f"BLEU-{n}", ".1f", 100.0) for n in range(1, 5)},
    "rouge_l": _Figure("ROUGE-L", ".1f", 100.0),
    "cider_d": _Figure("CIDEr-D", ".1f", 100.0),
    "tag_precision": _Figure("Tags right, %", ".1f", 100.0),
    "tag_baseline": _Figure("Baseline, %", ".1f", 100.0),
    "seconds": _Figure("Seconds", ",.0f"),
    "steps": _Figure("Steps", ",.0f"),
}
_CHARTS = ("loss", "reward", "rate", "gradient_norm", "cider_d", "bleu_4")
_MOST_POINTS = 200

# Of a chart, in its own units: where the curves lie, and how wide a letter is.
_LEFT, _TOP, _WIDTH, _HEIGHT, _LETTER = 44.0, 18.0, 348.0, 164.0, 5.6


class _Stage(NamedTuple):
    """A part of the run; ``start`` and ``end`` are the updates done before and after it."""

    name: str
    start: int
    end: int
    seconds: float
    steps: int

    @property
    def time(self) -> str:
        return _time(self.seconds)

    @property
    def time_per_step(self) -> str:
        return f"{self.seconds / max(self.steps, 1):.3g} s"


def write_summary(run: Path, config: Config, references: Mapping[str, Sequence[str]]) -> Path:
    """Write ``summary.html`` from a run's ``log.jsonl``, and return where it is.

    Curves, evaluations and the best of them by CIDEr-D, what it said of a few photographs beside
    their ``references`` (captions by path), where ``config`` differs from the defaults, and times.
    Raises ``OSError``.
    """
    records = read_log(run)
    evaluations = [record for record in records if "epoch" in record]
    best = max(evaluations, key=lambda record: float(record["cider_d"]), default=None)
    stages = list(_stages(records))
    charts = (_chart(name, records, stages, best) for name in _CHARTS)
    columns = dict.fromkeys(name for e in evaluations for name in e if name != "samples")
    path = run / "summary.html"
    write_page(
        str(path),
        "summary",
        generator="captioner summary",
        title=printable(run.resolve().name),
        outcome=None if best is None else _outcome(best),
        stages=stages,
        total=_time(sum(stage.seconds for stage in stages)),
        charts=[chart for chart in charts if chart is not None],
        columns=[_figure(name).title for name in columns],
        rows=[_row(e, columns, e is best) for e in evaluations],
        settings=list(_settings(config)),
        cards=[] if best is None else list(_cards(best["samples"], references)),
    )
    return path


def _figure(name: str) -> _Figure:
    return _FIGURES.get(name, _Figure(name.replace("_", " ").capitalize()))


def _outcome(best: Record) -> str:
    figures = ", ".join(
        f"{_figure(name).title} {_figure(name).write(best[name])}" for name in ("cider_d", "bleu_4")
    )
    return f"epoch {best['epoch']}, {best['stage']}: {figures}"


def _row(evaluation: Record, columns: Iterable[str], best: bool) -> dict[str, Any]:
    return {"best": best, "cells": [_figure(name).write(evaluation.get(name)) for name in columns]}


def _stages(records: Iterable[Record]) -> Iterator[_Stage]:
    start = 0
    for name, group in groupby(records, lambda record: str(record["stage"])):
        members = list(group)
        end = members[-1]["step"]
        seconds, steps = (sum(r.get(key, 0) for r in members) for key in ("seconds", "steps"))
        yield _Stage(name, start, end, seconds, steps)
        start = end


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _settings(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield each key that is not at its default, its value and the default, as in TOML."""
    defaults = dict(_flat(to_dict(Config())))
    for key, value in _flat(to_dict(config)):
        if value != defaults[key]:
            yield key, _toml(value), _toml(defaults[key])


def _toml(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False))


def _flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield where + key, value


def _cards(
    samples: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, Any]]:
    for image, caption in samples.items():
        card = {
            "name": printable(Path(image).name),
            "caption": printable(caption),
            "references": [printable(text) for text in references.get(image, ())],
        }
        with suppress(UnreadableError):  # it may be gone by now
            card |= picture(thumbnail(image))
        yield card


class _Scale(NamedTuple):
    """Where on a chart values lie."""

    origin: float
    length: float
    low: float
    high: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.origin + self.length * share, 1)


def _chart(
    name: str, records: Sequence[Record], stages: Sequence[_Stage], best: Record | None
) -> dict[str, Any] | None:
    """Return what the page shows of a figure's course, if it was logged.

    That is each step's where they have it, otherwise each evaluation's.
    """
    figure, points = _figure(name), [r for r in records if r.get(name) is not None]
    by_step = [record for record in points if "epoch" not in record]
    dots = [] if by_step else points
    points = by_step or points
    if not points:
        return None
    ticks = _ticks(*(figure.factor * f(r[name] for r in points) for f in (min, max)))
    last = max(records[-1]["step"], 1)
    x = _Scale(_LEFT, _WIDTH, 0.0, last)
    y = _Scale(_TOP + _HEIGHT, -_HEIGHT, ticks[0], ticks[-1])
    return {
        "title": figure.title,
        "first": figure.write(points[0][name]),
        "last": figure.write(points[-1][name]),
        "bands": [_band(number, stage, x) for number, stage in enumerate(stages, 1)],
        "x_ticks": [(x(tick), f"{tick:,.6g}") for tick in _ticks(0.0, last) if tick <= last],
        "y_ticks": [(y(tick), f"{tick:,.6g}") for tick in ticks],
        "lines": list(_lines(points, name, figure, x, y)),
        "dots": [_dot(record, name, figure, x, y, record is best) for record in dots],
        "best": None if best is None else x(best["step"]),
    }


def _band(number: int, stage: _Stage, x: _Scale) -> dict[str, Any]:
    """Return the part of a chart that a stage takes, with its name where there is room."""
    start, end = x(stage.start), x(stage.end)
    label = f"{number} {stage.name}"
    fits = len(label) * _LETTER < end - start
    title = f"{stage.name}: step {stage.start:,} to {stage.end:,}"
    return {"x": start, "width": end - start, "title": title, "label": label if fits else number}


def _lines(
    points: Iterable[Record], name: str, figure: _Figure, x: _Scale, y: _Scale
) -> Iterator[str]:
    """Yield the curve of evaluations, or of each stage's steps; of means where steps are many."""
    for _, group in groupby(points, lambda r: None if "epoch" in r else str(r["stage"])):
        members = list(group)
        size = math.ceil(len(members) / _MOST_POINTS)
        chunks = (members[at : at + size] for at in range(0, len(members), size))
        yield " ".join(
            f"{x(fmean(r['step'] for r in chunk))},"
            f"{y(figure.factor * fmean(r[name] for r in chunk))}"
            for chunk in chunks
        )


def _dot(
    record: Record, name: str, figure: _Figure, x: _Scale, y: _Scale, best: bool
) -> dict[str, Any]:
    what = f"epoch {record['epoch']}, step {record['step']:,}: {figure.write(record[name])}"
    place = {"x": x(record["step"]), "y": y(figure.factor * record[name])}
    return {**place, "best": best, "title": f"{what} (best)" if best else what}


def _ticks(low: float, high: float) -> list[float]:
    """Return two to six or so round numbers, from at most ``low`` to at least ``high``."""
    rough = ((high - low) or abs(high) or 1.0) / 4.0
    power = 10.0 ** math.floor(math.log10(rough))
    unit = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough)
    first = math.floor(low / unit)
    return [unit * n for n in range(first, max(math.ceil(high / unit), first + 1) + 1)]
