"""What a training run says of itself: ``log.jsonl`` always, and TensorBoard's form of it."""

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
    """Return the records of a run's ``log.jsonl`` in order; what is cut off is none.

    Each has ``step``, the updates done, and ``stage``. That of an evaluation also has ``epoch``,
    and ``samples``, the captions of a few photographs by path; that of a step has neither.
    Raises ``OSError``.
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
    """The log of one run, in its folder; a line is written when what it tells has happened.

    All writing raises ``OSError``.
    """

    def __init__(self, run: Path, after: int | None, tensorboard: bool) -> None:
        """Open the log of a run that goes on ``after`` so many steps; ``None`` begins it anew.

        Lines of later steps are taken away, for these steps are done again. Raises
        ``ConfigError`` where ``tensorboard`` is asked for and not installed.
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
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Write out what waits."""
        if self._writer is not None:
            self._writer.close()

    def flush(self) -> None:
        """Write out what waits, so that a state saved next is not ahead of the log."""
        if self._writer is not None:
            self._writer.flush()

    def step(self, step: int, stage: str, figures: Mapping[str, SupportsFloat]) -> None:
        """Log every tenth step: its loss or reward, learning rate, norm of the gradient.

        Figures of other steps are not asked for their values, which may wait on a device.
        """
        if step % _EVERY == 0:
            values = {name: float(value) for name, value in figures.items()}
            self._scalars("step", values, step)
            self._append({"step": step, "stage": stage, **values})

    def evaluation(
        self, figures: Mapping[str, Any], images: Sequence[str], captions: Sequence[str]
    ) -> None:
        """Log the figures of an evaluation, and what it said of a few of the photographs.

        ``figures`` have at least ``epoch``, ``step`` and ``stage``; ``captions`` are those of
        ``images``, in order. A run may have been killed after this and before it was saved: the
        evaluation of a step that is logged already is not logged again.
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
        """Write a line; a figure that is no number, which JSON does not know, is null."""
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
            # The drawn caption is beside its photograph, but its font has few letters.
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
    """Return a photograph of at most 256 x 256 pixels above its caption."""
    photograph = open_rgb(path, _SIDE // 3)
    photograph.thumbnail((_SIDE, _SIDE))
    lines = wrap(printable(caption), 34)
    canvas = Image.new("RGB", (_SIDE, photograph.height + 18 * len(lines) + 8), "white")
    canvas.paste(photograph)
    font = ImageFont.load_default(14)
    place = (4, photograph.height + 4)
    ImageDraw.Draw(canvas).multiline_text(place, "\n".join(lines), "black", font, spacing=4)
    return canvas
