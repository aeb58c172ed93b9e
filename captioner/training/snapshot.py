"""The snapshot of a run: one file from which the run continues exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captioner.config import Config
from captioner.files import replacing
from captioner.settings import ConfigError, to_dict

__all__ = ["Progress", "Snapshot"]

_NAME = "resume.snapshot"
_BEFORE = "resume.safetensors"
_DIGEST_BYTES = 32

# What may be said anew when a run is continued: nothing that is learnt depends on it.
_FREE = frozenset(
    {"training.accumulation", "training.features", "training.save_every", "training.tensorboard"}
)


@dataclass
class Progress:
    """Where a run stands: what an epoch has done so far, and how its evaluations went.

    ``scores`` are the CIDEr-D of the present stage, ``stale`` counts those since the best of the
    run, ``evaluated`` is the step of the last, since which there were ``steps`` in ``seconds``.
    ``skipped`` steps had no finite gradient, the last ``in_a_row`` of them without another between.
    Chance needs no place: it is a function of the step.
    """

    epoch: int = 0
    position: int = 0
    best: float = -1.0
    stale: int = 0
    evaluated: int = -1
    scores: list[float] = field(default_factory=list)
    figure_sum: float = 0.0
    updates: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def mean_figure(self) -> float:
        """The mean loss, or reward, of the updates of this epoch."""
        return self.figure_sum / max(self.updates, 1)

    def count(self, figure: float | None) -> None:
        """Count an update with its loss or reward; ``None`` is one that was skipped."""
        if figure is None:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        else:
            self.updates, self.in_a_row = self.updates + 1, 0
            self.figure_sum += figure

    def judge(self, score: float, step: int) -> bool:
        """Take up the CIDEr-D of an evaluation after a step; return whether it is a new best."""
        better = score > self.best
        self.best, self.stale = max(score, self.best), 0 if better else self.stale + 1
        self.scores.append(score)
        self.evaluated, self.seconds, self.steps = step, 0.0, 0
        return better

    def next_epoch(self) -> Progress:
        """Return the progress at the beginning of the next epoch of a stage."""
        return Progress(
            epoch=self.epoch + 1,
            best=self.best,
            stale=self.stale,
            scores=self.scores,
            skipped=self.skipped,
            in_a_row=self.in_a_row,
        )

    def next_stage(self, epoch: int) -> Progress:
        """Return the progress at the beginning of a stage, which begins with an epoch."""
        return replace(self.next_epoch(), epoch=epoch, stale=0, scores=[])


class Snapshot:
    """A file with the weights, their average, the optimizer's state and the progress of a run.

    The SHA-256 of the rest, then what ``torch.save`` writes. The checksum is needed: torch reads a
    damaged file without a word, or with an error of any kind.
    """

    def __init__(
        self,
        run: Path,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        config: Config,
        data: str,
    ) -> None:
        """Take what is saved and put back.

        Args:
            run: The folder of the run.
            modules: The modules of the run, by name.
            optimizer: The optimizer of the run.
            config: The config, which a continued run must have in common with the snapshot.
            data: A digest of the data, which a continued run must have in common too.
        """
        self.path, self._modules, self._optimizer = run / _NAME, modules, optimizer
        self._config, self._data = config, data

    def write(self, progress: Progress) -> None:
        """Write everything, whole or not at all; raises ``OSError``."""
        stream = BytesIO()
        content = {
            "progress": asdict(progress),
            "config": to_dict(self._config),
            "data": self._data,
            "modules": {name: module.state_dict() for name, module in self._modules.items()},
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(content, stream)
        with replacing(str(self.path)) as file:
            file.write(sha256(stream.getbuffer()).digest())
            file.write(stream.getbuffer())

    def read(self) -> Progress | None:
        """Put everything back where it was, and return the progress; ``None`` without a file.

        Raises ``ConfigError`` if the run has another config or other data, or the file cannot be
        read.
        """
        if not self.path.exists():
            if (before := self.path.with_name(_BEFORE)).exists():
                raise ConfigError(f"{before} is of an earlier version of captioner; {self._advice}")
            return None
        try:
            content = self._content()
            progress = Progress(**content["progress"])
        except ConfigError:
            raise
        except Exception as error:  # torch.load raises pickle's errors, and EOFError, and more
            raise self._refused(error) from error
        self._check_same(content["config"], content["data"])
        try:
            for name, module in self._modules.items():
                module.load_state_dict(content["modules"][name])
            self._optimizer.load_state_dict(content["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise self._refused(error) from error
        return progress

    def _content(self) -> dict[str, Any]:
        content = memoryview(self.path.read_bytes())
        digest, rest = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if sha256(rest).digest() != digest:
            raise ConfigError(f"{self.path} is damaged; {self._advice}")
        stored: dict[str, Any] = torch.load(BytesIO(rest), map_location="cpu", weights_only=True)
        return stored

    @property
    def _advice(self) -> str:
        best = self.path.with_name("best.safetensors")
        start = f", from model.init = {str(best)!r} if you like" if best.exists() else ""
        return f"take another --run folder{start}, or delete that file to begin this run anew"

    def _refused(self, error: Exception) -> ConfigError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return ConfigError(f"{self.path} cannot be continued from: {reason}; {self._advice}")

    def _check_same(self, config: Mapping[str, Any], data: str) -> None:
        changes = _difference(config, to_dict(self._config))
        if changes:
            raise ConfigError(f"{self.path.parent} holds a run with another config: {changes}")
        if data != self._data:
            raise ConfigError(f"{self.path.parent} holds a run on other photographs or captions")


def _difference(saved: Mapping[str, Any], ours: Mapping[str, Any], where: str = "") -> str:
    changes = []
    for key in sorted(saved.keys() | ours.keys()):
        was, now = saved.get(key), ours.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            changes.append(_difference(was, now, f"{where}{key}."))
        elif was != now and where + key not in _FREE:
            changes.append(f"{where}{key} was {was!r}, now {now!r}")
    return ", ".join(filter(None, changes))
