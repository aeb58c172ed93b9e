"""The stages of a run: teacher forcing on kept features, end to end, self-critical, tags alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from captioner.config import Config
from captioner.data.example import Example
from captioner.evaluation import Evaluation
from captioner.model.checkpoint import Checkpoint
from captioner.model.model import CaptionModel
from captioner.settings import ConfigError
from captioner.training.optimization import rate_factor
from captioner.training.self_critical import Reward, SelfCritical
from captioner.training.tag_learning import TagLearning
from captioner.training.teacher_forcing import TeacherForcing

__all__ = ["Objective", "Stage", "stages_of"]

Objective = TeacherForcing | SelfCritical | TagLearning


@dataclass(frozen=True)
class Stage(ABC):
    """Consecutive epochs, from ``first`` up to but not including ``end``, of one way to learn."""

    config: Config
    steps_per_epoch: int
    first: int
    end: int

    name: ClassVar[str]
    figure: ClassVar[str] = "loss"
    """The name of the figure that a step yields and the log holds."""
    encoder_learns: ClassVar[bool] = False
    """Whether the encoder reads pixels and learns; otherwise its features are read from a cache."""
    begins_from_best: ClassVar[bool] = False
    """Whether the stage goes on from the best model so far, and not from the last."""
    captions_change: ClassVar[bool] = True
    """Whether captions may be others after a step of this stage."""

    @property
    def keeps_given_encoder(self) -> bool:
        """Whether the encoder still has the weights that the run began with."""
        settings = self.config.training
        return self.end <= settings.frozen_epochs or settings.epochs <= settings.frozen_epochs

    @property
    @abstractmethod
    def schedule(self) -> range:
        """The epochs over which the learning rate rises and falls once."""

    @abstractmethod
    def objective(
        self,
        model: CaptionModel,
        examples: Sequence[Example],
        begun: Checkpoint,
        dtype: torch.dtype,
    ) -> Objective:
        """Return the module that computes the loss.

        Args:
            model: The model that learns.
            examples: The training split, in the order of the data set.
            begun: The checkpoint that is trained, for its words and tags.
            dtype: The number type of the forward pass.
        """

    def judge(self, result: Evaluation) -> float:
        """Return the figure by which the best model of the stage is chosen: CIDEr-D."""
        return result.scores.cider_d

    def set_learning(self, model: CaptionModel) -> None:
        """Let exactly those weights learn that learn in this stage, and set the model's mode."""
        model.requires_grad_(True)
        model.encoder.freeze(self.config.encoder.frozen_blocks if self.encoder_learns else None)
        self.set_mode(model)

    def set_mode(self, model: CaptionModel) -> None:
        """Turn dropout on or off, as this stage learns."""
        model.train()

    def set_rates(
        self, optimizer: torch.optim.Optimizer, step: int, scores: Sequence[float]
    ) -> float:
        """Set the learning rates of a step; return that of the decoders.

        Args:
            optimizer: The optimizer, as ``build_optimizer`` makes it.
            step: The number of steps before this one in the whole run.
            scores: CIDEr-D of this stage's evaluations so far.
        """
        factor = rate_factor(self.config, *self.within_schedule(step), scores)
        for group in optimizer.param_groups:
            group["lr"] = factor * self._peak(group["peak"])
        return float(optimizer.param_groups[0]["lr"])

    def within_schedule(self, step: int) -> tuple[int, int]:
        """Return a step of the run as a step of the schedule, and the schedule's length."""
        epochs = self.schedule
        return step - epochs.start * self.steps_per_epoch, len(epochs) * self.steps_per_epoch

    def _peak(self, of_group: float) -> float:
        """Return the highest learning rate of a group of weights."""
        return of_group


class _TeacherForced(Stage):
    """The decoders learn people's captions word by word."""

    @property
    def schedule(self) -> range:
        """All epochs of teacher forcing: frozen and end to end share one rise and fall."""
        return range(self.config.training.epochs)

    def objective(
        self,
        model: CaptionModel,
        examples: Sequence[Example],
        begun: Checkpoint,
        dtype: torch.dtype,
    ) -> Objective:
        """Return teacher forcing; arguments as in :meth:`Stage.objective`."""
        return TeacherForcing(model, begun.tags, self.config, dtype)


class _Frozen(_TeacherForced):
    """The encoder is frozen: it sees each photograph once, and its features are kept."""

    name = "frozen"


class _EndToEnd(_TeacherForced):
    """The encoder learns too, on photographs that look different in each epoch."""

    name = "end to end"
    encoder_learns = True


class _Alone(Stage):
    """Some parts learn alone, on features of the best model, with a schedule of their own."""

    begins_from_best = True

    @property
    def schedule(self) -> range:
        """The epochs of this stage alone."""
        return range(self.first, self.end)

    @abstractmethod
    def learners(self, model: CaptionModel) -> Sequence[nn.Module]:
        """Return the parts that learn."""

    def set_learning(self, model: CaptionModel) -> None:
        """Let the learners alone learn, and set the model's mode."""
        model.encoder.freeze()
        model.requires_grad_(False)
        for learner in self.learners(model):
            learner.requires_grad_(True)
        self.set_mode(model)


class _SelfCritical(_Alone):
    """The caption decoder learns from the scores of captions that it draws."""

    name = "self-critical"
    figure = "reward"

    def objective(
        self,
        model: CaptionModel,
        examples: Sequence[Example],
        begun: Checkpoint,
        dtype: torch.dtype,
    ) -> Objective:
        """Return self-critical learning; arguments as in :meth:`Stage.objective`."""
        reward = Reward(examples, begun.vocabulary, self.config.experimental.bleu_weight)
        return SelfCritical(model, reward, self.config.self_critical, dtype)

    def learners(self, model: CaptionModel) -> Sequence[nn.Module]:
        """Return the caption decoder."""
        return [model.caption_decoder]

    def set_mode(self, model: CaptionModel) -> None:
        """Turn dropout off: captions must be drawn from the very policy that is reinforced."""
        model.eval()

    def _peak(self, of_group: float) -> float:
        return self.config.self_critical.lr


class _Tags(_Alone):
    """The tag decoder and the tag head learn; captions stay what they are."""

    name = "tags"
    captions_change = False

    def objective(
        self,
        model: CaptionModel,
        examples: Sequence[Example],
        begun: Checkpoint,
        dtype: torch.dtype,
    ) -> Objective:
        """Return the loss of tags; arguments as in :meth:`Stage.objective`."""
        return TagLearning(model, begun.tags, self.config.tags, dtype)

    def judge(self, result: Evaluation) -> float:
        """Return the mean average precision of the tags."""
        return result.tag_measures.mean_average_precision

    def learners(self, model: CaptionModel) -> Sequence[nn.Module]:
        """Return the tag decoder and the tag head, if there is one."""
        heads = [] if model.tag_head is None else [model.tag_head]
        return [model.tag_decoder, *heads]

    def _peak(self, of_group: float) -> float:
        return self.config.tags.lr


def stages_of(config: Config, steps_per_epoch: int) -> list[Stage]:
    """Return the stages of a config that have epochs; ``ConfigError`` if none has any."""
    training = config.training
    frozen, taught = min(training.frozen_epochs, training.epochs), training.epochs
    rewarded = taught + config.self_critical.epochs
    every = [
        _Frozen(config, steps_per_epoch, 0, frozen),
        _EndToEnd(config, steps_per_epoch, frozen, taught),
        _SelfCritical(config, steps_per_epoch, taught, rewarded),
        _Tags(config, steps_per_epoch, rewarded, rewarded + config.tags.epochs),
    ]
    stages = [stage for stage in every if stage.first < stage.end]
    if not stages:
        raise ConfigError(
            "training.epochs, self_critical.epochs and tags.epochs are all 0; nothing to do"
        )
    return stages
