"""The loop of a training run: epochs, optimizer steps, evaluations, and what is saved."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch

from captioner.config import Config
from captioner.data.dataset import Batch, CaptionDataset, Features, batches
from captioner.data.example import DataError, Example
from captioner.data.sources import Data
from captioner.evaluation import Evaluation
from captioner.model.checkpoint import save_checkpoint
from captioner.settings import ConfigError
from captioner.training.advice import Situation, advised, is_worth_saving, no_finite_gradient
from captioner.training.distributed import Group
from captioner.training.features import encode_features
from captioner.training.learner import Learner, Update
from captioner.training.reporter import Reporter, Say
from captioner.training.snapshot import Progress, Snapshot
from captioner.training.stage import Stage, stages_of
from captioner.training.start import begin
from captioner.training.stopper import StoppedError, Stopper
from captioner.training.validation import Validation

__all__ = ["Trainer"]

# So many steps in a row without a finite gradient are no accident.
_HOPELESS = 10


class Trainer:
    """One run: its model, optimizer and position in the data."""

    def __init__(
        self,
        config: Config,
        data: Data,
        run: Path,
        device: torch.device,
        say: Say,
        group: Group | None = None,
        stopper: Stopper | None = None,
    ) -> None:
        """Build the vocabularies, the model and the optimizer of a run at its beginning.

        Args:
            config: The config of the run.
            data: Both splits.
            run: The folder of the run.
            device: Where to compute.
            say: Called with each line for a person.
            group: The processes of the run; a group of one by default.
            stopper: Tells when to stop; never by default.
        """
        torch.manual_seed(config.training.seed)
        begun = begin(config, data.train)
        self.config = config = begun.config
        self.data, self.run, self.group = data, run, group or Group()
        self.reporter, self._stopper = Reporter(run, say, self.group.main), stopper or Stopper()
        self.workers = max(1, (os.cpu_count() or 1) // 2 // self.group.local_size)
        self.learner = Learner(begun, device, self.group)
        self.dataset = CaptionDataset(
            data.train,
            begun.vocabulary,
            begun.tags,
            config.preprocessing,
            config.data.max_words,
            data.subsets,
        )
        self.steps_per_epoch = math.ceil(self.dataset.epoch_size / config.training.batch_size)
        self.stages, self.progress = stages_of(config, self.steps_per_epoch), Progress()
        self.validation = Validation(
            self.learner.checkpoint, data.val, self.group, config.training.beam_size
        )

    @property
    def stage(self) -> Stage:
        """The stage of the present epoch, or the last one."""
        return next((s for s in self.stages if self.progress.epoch < s.end), self.stages[-1])

    @property
    def step(self) -> int:
        """The number of steps done; those of epochs that ended early count."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.position

    @cached_property
    def snapshot(self) -> Snapshot:
        """The file that the run continues from."""
        modules, optimizer = self.learner.modules, self.learner.optimizer
        return Snapshot(self.run, modules, optimizer, self.config, self._digest())

    def _digest(self) -> str:
        """Return a hash of the data and of what its words are for the model."""
        begun = self.learner.checkpoint
        words = (begun.vocabulary.words, begun.tags.vocabulary.words, begun.tags.frequencies)
        return hashlib.sha256(f"{self.data.digest()} {words}".encode()).hexdigest()

    def train(self) -> None:
        """Train to the end, from the snapshot if there is one.

        Raises ``StoppedError`` where a process was asked to stop, and ``TrainingError`` for a run
        that cannot go on; both after saving.
        """
        if len(set(self.group.merge({self.group.rank: self._digest()}).values())) > 1:
            raise ConfigError("the processes of this run do not see the same data")
        before = self.snapshot.read()
        if before is not None:
            self.progress = before
            epoch, position = self.progress.epoch, self.progress.position
            where = f"epoch {epoch + 1}, step {position} of {self.steps_per_epoch}"
            over = epoch == self.stages[-1].end
            self.reporter.say("the run is at its end" if over else f"continuing at {where}")
        after = None if before is None else self.step
        with self.reporter.logging(after, self.config.training.tensorboard):
            try:
                while self.progress.epoch < self.stages[-1].end:
                    self.begin_epoch()
                    self._epoch()
                    self._end_epoch()
            except (RuntimeError, OSError) as error:
                if is_worth_saving(error, self.group.size):
                    self._save_after_failure()
                told = advised(error, self._situation())
                if told is error:
                    raise
                raise told from error

    def begin_epoch(self) -> None:
        """Set what learns, from what, and how."""
        settings, stage = self.config.training, self.stage
        self.learner.begin_epoch(stage, self.data.train)
        with self._stopper.idle():
            kept = None if stage.encoder_learns else self._features(self.data.train)
        self.dataset.features = kept
        seed = f"{settings.seed}/{self.progress.epoch}"
        self.dataset.augmentation = seed if settings.augment and stage.encoder_learns else None

    def _features(self, examples: list[Example]) -> Features:
        """Return the encoder's features of a split, from the cache as far as it has them."""
        paths = [str(example.image) for example in examples]
        settings = self.config.training
        # The features of an encoder that learnt in this run are of no use to other runs.
        shared = settings.features != "" and self.stage.keeps_given_encoder
        folder = Path(settings.features) if shared else self.run / "features"
        encoder, dtype = self.learner.model.encoder, self.learner.precision
        # Of several processes one writes what the others, who wait for its lock, then find.
        return encode_features(
            encoder, paths, folder, dtype, self.workers, self.reporter.say, shared
        )

    def steps(self) -> Iterator[list[Batch]]:
        """Yield this process's micro-batches of each step that is left in the epoch."""
        settings, progress = self.config.training, self.progress
        micro_batches = batches(
            self.dataset,
            settings.batch_size,
            settings.seed,
            progress.epoch,
            progress.position,
            self.workers,
            (self.group.rank, self.group.size, settings.accumulation),
        )
        while step := list(islice(micro_batches, settings.accumulation)):
            yield step

    def _epoch(self) -> None:
        epoch = f"{self.progress.epoch + 1}/{self.stages[-1].end}"
        with self.reporter.bar(epoch, self.progress.position, self.steps_per_epoch):
            self._evaluate_if_due()
            steps = self.steps()
            before = time.monotonic()
            while not self._stalled and (micro_batches := next(steps, None)):
                self._take(micro_batches)
                self.progress.seconds += time.monotonic() - before
                stop = self.group.any(bool(self._stopper.signal), self.learner.device)
                if stop or self._due or self.step % self.config.training.save_every == 0:
                    self.save()
                if stop:
                    raise StoppedError
                self._evaluate_if_due()
                before = time.monotonic()

    @property
    def _due(self) -> bool:
        """Whether it is time to evaluate; also after a kill during what was to be evaluated."""
        every, progress = self.config.training.validate_every, self.progress
        begun = progress.position > 0 and progress.evaluated != self.step
        return every > 0 and begun and self.step % every == 0

    def _evaluate_if_due(self) -> None:
        if self._due:
            self.evaluate()
            self.save()

    def _take(self, micro_batches: Sequence[Batch]) -> None:
        """Do a step and write it down."""
        for batch in micro_batches:
            self.reporter.leave_out(batch.unreadable)
        progress = self.progress
        update = self.learner.update(micro_batches, self.stage, self.step, progress.scores)
        progress.position, progress.steps = progress.position + 1, progress.steps + 1
        shown = None
        if update is not None:
            self._count(update)
            shown = f"{self.stage.figure} {progress.mean_figure:.3f}, rate {update.rate:.1e}"
        self.reporter.advance(shown)

    def _count(self, update: Update) -> None:
        figure = self.stage.figure
        figures = dict(zip((figure, "gradient_norm", "rate"), update, strict=True))
        self.reporter.step(self.step, self.stage.name, figures)
        self.progress.count(update.figure if update.finite else None)
        if update.finite:
            return
        self.reporter.say(f"step {self.step} skipped: its {figure} or gradient is not finite")
        if self.progress.in_a_row >= _HOPELESS:
            self.save()
            raise no_finite_gradient(self._situation(), _HOPELESS)

    def _situation(self) -> Situation:
        return Situation(self.config, self.run, self.stage, self.step, self.group.size)

    def _save_after_failure(self) -> None:
        """Save what a failed step left untouched.

        The other processes of a group fail along with one: what the first of them saves is the
        run's.
        """
        self.learner.forget_step()
        if self.learner.consistent:
            self.save()

    def evaluate(self) -> Evaluation:
        """Caption the validation split, write down how good it is, and save the models."""
        result, progress, stage = self._validate(), self.progress, self.stage
        stage.set_mode(self.learner.model)
        figures = {
            "epoch": progress.epoch + 1,
            "step": self.step,
            "stage": stage.name,
            stage.figure: progress.mean_figure,
            **result.as_dict(),
            "skipped": progress.skipped,
            "steps": progress.steps,
        }
        self.learner.checkpoint.provenance["figures"] = figures
        told = figures | {"seconds": round(progress.seconds, 1)}
        self.reporter.evaluation(result, told, stage.figure)
        better = progress.judge(stage.judge(result), self.step)
        if self.group.main:
            save_checkpoint(self.learner.checkpoint, self.run / "last.safetensors")
            if better:
                save_checkpoint(self.learner.checkpoint, self.run / "best.safetensors")
        return result

    def _validate(self) -> Evaluation:
        self.validation.captions_change = self.stage.captions_change
        with self._stopper.idle():
            if self.stage.encoder_learns:
                result = self.validation.of_pixels(self.workers, self.learner.precision)
            else:
                result = self.validation.of_features(self._features(self.data.val))
        self.reporter.leave_out(self.validation.unreadable)
        return result

    @property
    def _stalled(self) -> bool:
        return 0 < self.config.training.patience <= self.progress.stale

    def _end_epoch(self) -> None:
        """Evaluate if it is time, and go on to the next epoch, or the next stage."""
        stage, progress = self.stage, self.progress
        for unreadable in self.group.merge({self.group.rank: self.reporter.unreadable}).values():
            self.reporter.leave_out(unreadable)
        if not progress.updates and not progress.skipped:
            raise DataError("none of the photographs to train on could be read")
        last = progress.epoch + 1 == stage.end
        if progress.evaluated != self.step and (last or not self.config.training.validate_every):
            self.save()
            self.evaluate()
        over = last or self._stalled
        self.progress = progress.next_stage(stage.end) if over else progress.next_epoch()
        if over and self.stage is not stage and self.stage.begins_from_best:
            self.group.wait()  # for the process that writes the best model
            self.learner.begin_from(self.run / "best.safetensors")
            if not self.stage.captions_change:
                self.progress.best = -1.0  # the next figure is another
        self.save()

    def save(self) -> None:
        """Write all that an exact continuation needs."""
        if self.group.main:
            self.reporter.flush()
            self.snapshot.write(self.progress)
