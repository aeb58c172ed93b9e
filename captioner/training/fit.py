"""A whole training run, from its config to its best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from captioner.config import Config
from captioner.data.sources import read_data
from captioner.files import locked
from captioner.model.device import own_settings
from captioner.training.distributed import joined
from captioner.training.reporter import Say
from captioner.training.stopper import Stopper
from captioner.training.trainer import Trainer

__all__ = ["fit"]


@own_settings()
def fit(
    config: Config,
    run: Path,
    device: torch.device,
    say: Say = print,
    stopper: Stopper | None = None,
) -> Path:
    """Train as the config says; return the path of the best checkpoint.

    A run that was cut off continues where it was last saved. Processes that ``torchrun`` started
    train one model together; they need the same folder.

    Args:
        config: The config of the run.
        run: The folder of the run.
        device: Where to compute; each of several processes takes a GPU of its own.
        say: Called with each line for a person.
        stopper: Tells when to stop; never by default.

    Raises:
        ConfigError: The config, the data and the folder do not fit each other.
        DataError: The data cannot be used.
        CheckpointError: ``model.init`` names no checkpoint.
        TrainingError: The run cannot go on as it is; the message says what to try.
        StoppedError: A process was asked to stop, and the run is saved.
        OSError: A file cannot be read or written.
    """
    stopper = stopper or Stopper()
    with stopper.idle():
        data = read_data(config)
    with joined(device) as group:
        run.mkdir(parents=True, exist_ok=True)
        with stopper.idle():
            trainer = Trainer(config, data, run, group.device(device), say, group, stopper)
        for note in data.notes:
            trainer.reporter.say(note)
        with _alone(trainer, stopper):
            trainer.train()
        trainer.reporter.say(f"best checkpoint: {run / 'best.safetensors'}")
    return run / "best.safetensors"


@contextmanager
def _alone(trainer: Trainer, stopper: Stopper) -> Iterator[None]:
    """Wait until no other run writes to the folder, and keep others out of it."""
    if not trainer.group.main:
        yield
        return
    waiting = f"another process trains in {trainer.run}; waiting for its end"
    with ExitStack() as stack:
        with stopper.idle():
            lock = locked(str(trainer.run / "lock"), partial(trainer.reporter.say, waiting))
            stack.enter_context(lock)
        yield
