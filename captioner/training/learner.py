"""The part of a run that learns: a model, its optimizer, and one step of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from captioner.data.dataset import Batch
from captioner.data.example import Example
from captioner.model.checkpoint import Checkpoint, load_checkpoint
from captioner.model.device import choose_precision
from captioner.model.model import CaptionModel
from captioner.training.distributed import Group
from captioner.training.optimization import build_average, build_optimizer, clip_gradients
from captioner.training.stage import Objective, Stage

__all__ = ["Learner", "Update"]


class Update(NamedTuple):
    """The result of an optimizer step."""

    figure: float
    """The loss, or the reward, of the step."""
    gradient_norm: float
    """The norm of the gradient before clipping."""
    rate: float
    """The learning rate of the decoders."""

    @property
    def finite(self) -> bool:
        """Whether the weights were changed."""
        return math.isfinite(self.figure) and math.isfinite(self.gradient_norm)


class Learner:
    """A model that learns, the moving average of its weights if it has one, and the optimizer.

    ``checkpoint`` is what is judged and saved: the average where there is one, else the model.
    ``consistent`` is false while some weights have moved and others have not.
    """

    objective: Objective

    def __init__(self, begun: Checkpoint, device: torch.device, group: Group) -> None:
        """Take what a run begins with, and the processes that train it together."""
        self.config, self.device, self.group = begun.config, device, group
        settings = self.config.training
        self.precision = choose_precision(settings.precision, device)
        self.model = begun.model.to(device)
        self.model.encoder.freeze(self.config.encoder.frozen_blocks)  # refuse a wrong number now
        self.average = build_average(self.model, settings.ema) if settings.ema else None
        judged = self.model if self.average is None else cast(CaptionModel, self.average.module)
        self.checkpoint = replace(begun, model=judged)
        self.optimizer = build_optimizer(self.model, self.config.optimizer)
        self.consistent = True
        self._stage: Stage | None = None

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules whose weights a snapshot holds, by name."""
        return {"model": self.model} | ({} if self.average is None else {"average": self.average})

    def begin_epoch(self, stage: Stage, examples: Sequence[Example]) -> None:
        """Set what learns in a stage, and from what; ``examples`` is the training split."""
        stage.set_learning(self.model)
        if stage is not self._stage:
            self.objective = stage.objective(self.model, examples, self.checkpoint, self.precision)
            self._wrapped, self._stage = self.group.wrap(self.objective), stage

    def update(
        self, micro_batches: Sequence[Batch], stage: Stage, step: int, scores: Sequence[float]
    ) -> Update | None:
        """Do one optimizer step; ``None`` if no process has a photograph.

        A step whose loss or gradient is not finite leaves the weights as they are.

        Args:
            micro_batches: This process's share of the step.
            stage: The stage of the step.
            step: The number of steps before this one in the whole run.
            scores: CIDEr-D of the stage's evaluations so far.
        """
        self._seed(stage, step)
        rate = stage.set_rates(self.optimizer, step, scores)
        counts = [self.objective.counts(batch).to(self.device) for batch in micro_batches]
        totals = self.group.sum(torch.stack(counts).sum(dim=0))
        if not totals.any():
            return None
        self.optimizer.zero_grad(set_to_none=True)
        figure = self.group.sum(self._backward(micro_batches, totals)).item()
        update = Update(figure, clip_gradients(self.model, self.config), rate)
        if update.finite:
            self.consistent = False
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.consistent = True
        return update

    def _seed(self, stage: Stage, step: int) -> None:
        """Make chance a function of the step, so that a continued run needs no random state."""
        seed = self.config.training.seed * 1_000_003 + step
        torch.manual_seed((seed + 1) * 1_009 + self.group.rank)  # 0 drew the first weights
        self.objective.begin_step(seed, *stage.within_schedule(step))

    def _backward(self, micro_batches: Sequence[Batch], totals: Tensor) -> Tensor:
        """Add up the gradients of the micro-batches; return the sum of their figures."""
        figures = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches, 1):
            last = number == len(micro_batches)
            # The processes exchange gradients once a step, with the last micro-batch.
            with nullcontext() if last else self.group.alone(self._wrapped):
                loss, figure = self._wrapped(batch, totals)
                # The group takes the mean over processes; the loss is a sum over them.
                (loss * self.group.size).backward()
            figures += figure
        return figures

    def forget_step(self) -> None:
        """Free the gradients of a step that failed."""
        self.optimizer.zero_grad(set_to_none=True)

    def begin_from(self, path: Path) -> None:
        """Take the weights of a checkpoint of this run; the optimizer begins anew.

        For a stage whose gradients have another size than those that the optimizer remembers.
        """
        best = load_checkpoint(path).model.state_dict()
        for model in (self.model, self.checkpoint.model):
            model.load_state_dict(best)
        self.optimizer.state.clear()
        if self.average is not None:
            self.average.n_averaged.zero_()
