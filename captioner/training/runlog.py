"""The log of a training run: ``log.jsonl``, and on request the same figures for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captioner.files import Record, append, as_json, from_json, printable, replacing
from captioner.photos.images import UnreadableError, open_rgb
from captioner.settings import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog", "read_log"]

_EVERY = 10
_SAMPLES = 8
_SIDE = 256


def read_log(run: Path) -> list[Record]:
    """Return the records of a run's ``log.jsonl`` in order, without a line that is cut off.

    Each record has ``step``, the number of updates done, and ``stage``. The record of an evaluation
    also has ``epoch`` and ``samples``, the captions of a few photographs by path. The record of a
    step has neither. Raises ``OSError``.
    """
    return [record for _, record in _lines(run / "log.jsonl")]


def _lines(path: Path) -> list[tuple[bytes, Record]]:
    found = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with suppress(ValueError):
            record = from_json(line)
            whole = line.endswith(b"\n") and isinstance(record, dict)
            if whole and isinstance(record.get("step"), int):
                found.append((line, record))
    return found


class RunLog:
    """The log of one run, in the run's folder; each record is written at once.

    Every method that writes raises ``OSError``.
    """

    def __init__(self, run: Path, after: int | None, tensorboard: bool) -> None:
        """Open the log of a run that continues after step ``after``; ``None`` empties the log.

        Lines of later steps are removed, because these steps are done again. Raises
        ``ConfigError`` where ``tensorboard`` is true and TensorBoard is not installed.
        """
        self._path = run / "log.jsonl"
        lines = _lines(self._path)
        kept = [(line, r) for line, r in lines if after is not None and r["step"] <= after]
        self._evaluated = max((r["step"] for _, r in kept if "epoch" in r), default=-1)
        self._writer = None
        if tensorboard:
            self._writer = _writer(run / "tensorboard", 0 if after is None else after + 1)
        with replacing(str(self._path)) as file:
            file.writelines(line for line, _ in kept)

    def __enter__(self) -> RunLog:
        """Return this log."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write TensorBoard's buffered records and close its writer."""
        if self._writer is not None:
            self._writer.close()

    def flush(self) -> None:
        """Write TensorBoard's buffered records, so that a snapshot is never ahead of the log."""
        if self._writer is not None:
            self._writer.flush()

    def step(self, step: int, stage: str, figures: Mapping[str, SupportsFloat]) -> None:
        """Log every tenth step: the loss or reward, the learning rate, the norm of the gradient.

        Figures of other steps are not converted to floats, because this can wait for the device.
        """
        if step % _EVERY == 0:
            values = {name: float(value) for name, value in figures.items()}
            self._scalars("step", values, step)
            self._append({"step": step, "stage": stage, **values})

    def evaluation(
        self, figures: Mapping[str, Any], images: Sequence[str], captions: Sequence[str]
    ) -> None:
        """Log the figures of an evaluation, and its captions of a few photographs.

        The evaluation of a step that is in the log is not logged again: a run may have been killed
        between the log's record and the snapshot.

        Args:
            figures: The figures by name, at least ``epoch``, ``step`` and ``stage``.
            images: The paths of the evaluated photographs.
            captions: The caption of each photograph, in the same order.
        """
        step = figures["step"]
        if step <= self._evaluated:
            return
        self._evaluated = step
        places = [len(images) * sample // _SAMPLES for sample in range(_SAMPLES)]
        samples = {images[place]: captions[place] for place in places}
        numbers = {n: v for n, v in figures.items() if n != "step" and isinstance(v, int | float)}
        self._scalars("evaluation", numbers, step)
        self._samples(samples, step)
        self.flush()
        self._append({**figures, "samples": samples})

    def _append(self, record: Record) -> None:
        """Append a record; NaN and infinity, which JSON lacks, are written as null."""
        known = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        with FileIO(self._path, "a") as file:
            append(file, as_json(known) + b"\n")

    def _scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def _samples(self, samples: Mapping[str, str], step: int) -> None:
        if self._writer is None:
            return
        for number, (image, caption) in enumerate(samples.items(), 1):
            tag = f"samples/{number}"
            text = printable(f"{Path(image).name}: {caption}")
            # The picture's font lacks many letters, so the caption is logged as text too.
            self._writer.add_text(tag, text, step)
            with suppress(UnreadableError):
                pixels = np.asarray(_with_caption(image, caption))
                self._writer.add_image(tag, pixels, step, dataformats="HWC")


def _writer(folder: Path, purge_step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "training.tensorboard is true, but TensorBoard is not installed; "
            f'pip install "captioner[tensorboard]" brings it ({error})'
        ) from error
    return SummaryWriter(str(folder), purge_step=purge_step)


def _with_caption(path: str, caption: str) -> Image.Image:
    """Return a picture of a photograph, at most 256 x 256 pixels, with the caption below."""
    photograph = open_rgb(path, _SIDE // 3)
    photograph.thumbnail((_SIDE, _SIDE))
    lines = wrap(printable(caption), 34)
    canvas = Image.new("RGB", (_SIDE, photograph.height + 18 * len(lines) + 8), "white")
    canvas.paste(photograph)
    font = ImageFont.load_default(14)
    place = (4, photograph.height + 4)
    ImageDraw.Draw(canvas).multiline_text(place, "\n".join(lines), "black", font, spacing=4)
    return canvas
