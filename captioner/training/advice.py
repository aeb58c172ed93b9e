"""Errors that end a training run, and what to try."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import NamedTuple

import torch

from captioner.config import Config
from captioner.training.stage import Stage

__all__ = ["Situation", "TrainingError", "advised", "is_worth_saving", "no_finite_gradient"]


class TrainingError(RuntimeError):
    """A run that cannot go on as it is; the message says why and what to try."""


class Situation(NamedTuple):
    """Where a run stood when an error came."""

    config: Config
    run: Path
    stage: Stage
    step: int
    processes: int


def is_worth_saving(error: BaseException, processes: int) -> bool:
    """Return whether a run should be saved after a step that failed with an error.

    Not after an error of which nothing is known, unless other processes fail along with this one:
    what the first of them saves is the run's. Not where a worker process that reads photographs
    was lost: torch reports it from a signal handler, between any two instructions, so that the
    weights and the progress may not belong together.
    """
    if isinstance(error, TrainingError | OSError) or _is_reader_lost(error):
        return False
    return _is_out_of_memory(error) or processes > 1


def advised(error: RuntimeError | OSError, situation: Situation) -> RuntimeError | OSError:
    """Return the error to raise: one that says what to try, or the same if nothing is known."""
    if isinstance(error, TrainingError):
        return error
    if _is_reader_lost(error):
        return TrainingError(
            f"a process that reads photographs has ended: {error}; if its decoder crashed, and "
            "not for want of memory, scripts/check_data.py names the photograph. Empty that "
            "file, so that it is left out, and the same command continues the run"
        )
    if _is_out_of_memory(error):
        return TrainingError(_smaller_micro_batches(situation))
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TrainingError(
            f"{error.filename or situation.run}: {error.strerror}; make room, and the same "
            "command continues the run from where it was last saved"
        )
    return error


def no_finite_gradient(situation: Situation, steps: int) -> TrainingError:
    """Return the error after so many steps in a row without a finite gradient."""
    best = situation.run / "best.safetensors"
    start = f", which may begin from model.init = {str(best)!r}" if best.exists() else ""
    return TrainingError(
        f"no finite gradient in {steps} steps in a row, up to step {situation.step}; try an "
        f"optimizer.lr lower than {situation.config.optimizer.lr}, a longer "
        'optimizer.warmup_steps, or training.precision = "float32", in a new run' + start
    )


def _is_reader_lost(error: BaseException) -> bool:
    return "DataLoader worker (pid" in str(error)


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, on any device or in a worker process."""
    signs = ("out of memory", "allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def _smaller_micro_batches(situation: Situation) -> str:
    settings = situation.config.training
    size = math.ceil(settings.batch_size / situation.processes / settings.accumulation)
    message = f"out of memory at step {situation.step}, with {size} photographs at a time; "
    if size == 1:
        return message + "begin another run with a smaller model or preprocessing.size"
    fewer = "" if situation.stage.figure == "loss" else ", or with fewer self_critical.samples"
    return message + (
        f"the run is saved: continue it with --set training.accumulation="
        f"{2 * settings.accumulation}, or begin another with a training.batch_size lower than "
        f"{settings.batch_size}{fewer}"
    )
