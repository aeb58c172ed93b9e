"""All that an exact continuation of a run needs, in one file beside its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from captioner.config import Config
from captioner.model.checkpoint import write_tensors
from captioner.settings import ConfigError, to_dict

__all__ = ["Progress", "Snapshot"]

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
    """The weights, their average, the optimizer's state and the progress of a run."""

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        config: Config,
        data: str,
    ) -> None:
        """Take what is to be saved: modules by name, and the optimizer of the one named "model".

        ``config`` and ``data``, a digest, are what a continued run must have in common with it.
        """
        self.path, self._optimizer, self._config, self._data = path, optimizer, config, data
        self._tensors = {
            f"{kind}.{name}": tensor.detach()
            for kind, module in modules.items()
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
        self._parameters = dict(modules["model"].named_parameters())

    def write(self, progress: Progress) -> None:
        """Write everything, whole or not at all."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        tensors = dict(self._tensors)
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
        metadata = {
            "progress": json.dumps(asdict(progress)),
            "config": json.dumps(to_dict(self._config)),
            "data": self._data,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_tensors(tensors, self.path, metadata)

    def read(self) -> Progress:
        """Put everything back where it was, and return the progress.

        Raises ``ConfigError`` if the run has another config or other data, or cannot be read.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata()
                self._check_same(json.loads(metadata["config"]), metadata["data"])
                for key in file.keys():  # noqa: SIM118
                    self._restore(key, file.get_tensor(key))
            return Progress(**json.loads(metadata["progress"]))
        except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise ConfigError(f"{self.path} cannot be continued from: {error}") from error

    def _check_same(self, config: Mapping[str, Any], data: str) -> None:
        changes = _difference(config, json.loads(json.dumps(to_dict(self._config))))
        if changes:
            raise ConfigError(f"{self.path.parent} holds a run with another config: {changes}")
        if data != self._data:
            raise ConfigError(f"{self.path.parent} holds a run on other photographs or captions")

    def _restore(self, key: str, tensor: Tensor) -> None:
        if key in self._tensors:
            self._tensors[key].copy_(tensor)
            return
        _, state, name = key.split(".", 2)
        parameter = self._parameters[name]
        self._optimizer.state[parameter][state] = tensor.to(parameter.device)


def _difference(saved: Mapping[str, Any], ours: Mapping[str, Any], where: str = "") -> str:
    changes = []
    for key in sorted(saved.keys() | ours.keys()):
        was, now = saved.get(key), ours.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            changes.append(_difference(was, now, f"{where}{key}."))
        elif was != now and where + key not in _FREE:
            changes.append(f"{where}{key} was {was!r}, now {now!r}")
    return ", ".join(filter(None, changes))
