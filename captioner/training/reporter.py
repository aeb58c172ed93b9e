"""Reports of a run's progress: lines and a progress bar on a terminal, records in the log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from captioner.evaluation import Evaluation
from captioner.files import printable
from captioner.training.runlog import RunLog

__all__ = ["Reporter", "Say"]

Say = Callable[[str], None]


class Reporter:
    """The voice of a run; of several processes the main one alone speaks and writes."""

    def __init__(self, run: Path, say: Say, main: bool) -> None:
        """Report on the run in a folder; ``say`` is called with each line for a person."""
        self._run, self._say, self._main = run, say, main
        self._log: RunLog | None = None
        self._bar: tqdm[Any] | None = None
        self.unreadable: dict[str, str] = {}
        """The reason for each photograph, by its path, that could not be read."""

    def say(self, text: str) -> None:
        """Tell a person, above the progress bar."""
        if self._main:
            with tqdm.external_write_mode():
                self._say(printable(text))

    @contextmanager
    def logging(self, after: int | None, tensorboard: bool) -> Iterator[None]:
        """Keep the log open; ``after`` is the step that a run continues from, ``None`` a new run's.

        Raises ``OSError``, and ``ConfigError`` where TensorBoard is asked for and not installed.
        """
        if not self._main:
            yield
            return
        with RunLog(self._run, after, tensorboard) as self._log:
            yield

    def flush(self) -> None:
        """Write the log out, so that a snapshot written next is not ahead of it."""
        if self._log is not None:
            self._log.flush()

    @contextmanager
    def bar(self, epoch: str, done: int, steps: int) -> Iterator[None]:
        """Show the progress of an epoch, of which some steps are done."""
        form = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}, {rate_fmt}, {remaining} left"
        shown = None if self._main else True  # None: on a terminal only
        with tqdm(
            total=steps, initial=done, desc=f"epoch {epoch}", unit="step", bar_format=form,
            leave=False, disable=shown,
        ) as self._bar:  # fmt: skip
            yield
        self._bar = None

    def advance(self, shown: str | None) -> None:
        """Move the progress bar on by a step, with the figures to show beside it."""
        if self._bar is not None:
            if shown is not None:
                self._bar.set_postfix_str(shown, False)
            self._bar.update()

    def step(self, step: int, stage: str, figures: Mapping[str, float]) -> None:
        """Log a step."""
        if self._log is not None:
            self._log.step(step, stage, figures)

    def evaluation(self, result: Evaluation, figures: Mapping[str, Any], figure: str) -> None:
        """Tell and log an evaluation.

        Args:
            result: What the model wrote.
            figures: The record of the evaluation.
            figure: Whether the stage has a "loss" or a "reward".
        """
        self.say(
            f"epoch {figures['epoch']}, {figures['stage']}: {figure} {figures[figure]:.3f}, "
            f"BLEU-4 {100 * figures['bleu_4']:.1f}, CIDEr-D {100 * figures['cider_d']:.1f}, "
            f"tags {100 * figures['tag_precision']:.0f} % right, "
            f"{figures['different_tags']} different, mAP {100 * figures['map']:.1f}, "
            f"{figures['seconds']:.0f} s"
        )
        if self._log is not None:
            images = [str(example.image) for example in result.examples]
            self._log.evaluation(figures, images, [caption.text for caption in result.captions])

    def leave_out(self, unreadable: Mapping[str, str]) -> None:
        """Tell of photographs that cannot be read, of each once: paths, and why."""
        for path, why in unreadable.items():
            if path not in self.unreadable:
                self.unreadable[path] = why
                self.say(f"left out {path}: {why}")
