"""A run's stages: teacher forcing on kept features, then end to end, then self-critical."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from captioner.config import Config
from captioner.data.dataset import Batch, CaptionDataset, Features, batches
from captioner.data.example import DataError, Example
from captioner.data.sources import Data, read_data
from captioner.data.tags import Calibration, fit_calibration
from captioner.evaluation import Evaluation, describe, feature_grids, judge, pixel_grids, tag_hits
from captioner.files import locked, printable
from captioner.generation.options import SearchOptions
from captioner.model.checkpoint import load_checkpoint, save_checkpoint
from captioner.model.device import choose_precision
from captioner.model.model import CaptionModel
from captioner.settings import ConfigError
from captioner.training.distributed import Group, joined
from captioner.training.features import encode_features
from captioner.training.optimization import (
    build_average,
    build_optimizer,
    clip_gradients,
    ramp,
    rate_factor,
)
from captioner.training.runlog import RunLog
from captioner.training.self_critical import Reward, SelfCritical
from captioner.training.snapshot import Progress, Snapshot
from captioner.training.start import begin
from captioner.training.stopper import StoppedError, Stopper
from captioner.training.summary import write_summary
from captioner.training.teacher_forcing import TeacherForcing

__all__ = ["Trainer", "TrainingError", "fit"]

Say = Callable[[str], None]
StageName = Literal["frozen", "end to end", "self-critical"]

# So many steps in a row without a finite gradient are no accident.
_HOPELESS = 10


class TrainingError(RuntimeError):
    """A run that cannot go on as it is; the message says why and what to try."""


@dataclass(frozen=True)
class Stage:
    """Epochs ``first`` to ``end``, not included, of one way to learn."""

    name: StageName
    first: int
    end: int


def _stages(config: Config) -> list[Stage]:
    training = config.training
    frozen = min(training.frozen_epochs, training.epochs)
    bounds = [0, frozen, training.epochs, training.epochs + config.self_critical.epochs]
    names: tuple[StageName, ...] = ("frozen", "end to end", "self-critical")
    stages = [stage for stage in map(Stage, names, bounds, bounds[1:]) if stage.first < stage.end]
    if not stages:
        raise ConfigError("training.epochs and self_critical.epochs are both 0; nothing to do")
    return stages


class Update(NamedTuple):
    """What an optimizer step did: the loss or reward, the norm of the gradient before clipping."""

    figure: float
    gradient_norm: float
    rate: float

    @property
    def finite(self) -> bool:
        """Whether the weights were changed."""
        return math.isfinite(self.figure) and math.isfinite(self.gradient_norm)


class Trainer:
    """One run: its model, optimizer and place in the data."""

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
        """Build the vocabularies, the model and the optimizer of a run at its beginning."""
        torch.manual_seed(config.training.seed)
        begun = begin(config, data.train)
        self.config = config = begun.config
        self.data, self.run, self.device, self.group = data, run, device, group or Group()
        self._say = say
        settings = config.training
        self.precision = choose_precision(settings.precision, device)
        self.workers = max(1, (os.cpu_count() or 1) // 2 // self.group.local_size)
        self.model = begun.model.to(device)
        self.model.encoder.freeze(config.encoder.frozen_blocks)  # now, not after frozen epochs
        self.average = build_average(self.model, settings.ema) if settings.ema else None
        judged = self.model if self.average is None else cast(CaptionModel, self.average.module)
        self.checkpoint = replace(begun, model=judged)
        self.dataset = CaptionDataset(
            data.train,
            begun.vocabulary,
            begun.tags,
            config.preprocessing,
            config.data.max_words,
            data.parts,
        )
        self.steps_per_epoch = math.ceil(self.dataset.epoch_size / settings.batch_size)
        self.stages, self.progress = _stages(config), Progress()
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self._stopper = stopper or Stopper()
        self._log: RunLog | None = None
        self._objective_of = ""
        self._whole = True  # no weight has moved without the others
        self._named: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Tell a person, above the progress line; one process speaks for all."""
        if self.group.main:
            with tqdm.external_write_mode():
                self._say(printable(text))

    @property
    def stage(self) -> Stage:
        """The stage of the present epoch, or the last one."""
        return next((s for s in self.stages if self.progress.epoch < s.end), self.stages[-1])

    @property
    def step(self) -> int:
        """How many steps lie behind; those of a stage that ended early count."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.position

    @property
    def figure(self) -> str:
        """What an update returns in this stage."""
        return "reward" if self.stage.name == "self-critical" else "loss"

    @cached_property
    def snapshot(self) -> Snapshot:
        """What the run continues from."""
        modules = {"model": self.model, "average": self.average}
        there = {name: module for name, module in modules.items() if module is not None}
        path = self.run / "resume.safetensors"
        return Snapshot(path, there, self.optimizer, self.config, self._digest())

    def _digest(self) -> str:
        """Return a hash of the data and of what its words are for the model."""
        begun = self.checkpoint
        words = (begun.vocabulary.words, begun.tags.vocabulary.words, begun.tags.frequencies)
        return hashlib.sha256(f"{self.data.digest()} {words}".encode()).hexdigest()

    @cached_property
    def _reward(self) -> Reward:
        bleu_weight = self.config.self_critical.bleu_weight
        return Reward(self.data.train, self.checkpoint.vocabulary, bleu_weight)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other run writes to the folder, and keep others out of it."""
        if not self.group.main:
            yield
            return
        wait = partial(self.say, f"another process trains in {self.run}; waiting for its end")
        with ExitStack() as stack:
            with self._stopper.idle():
                stack.enter_context(locked(str(self.run / "lock"), wait))
            yield

    def train(self) -> None:
        """Train to the end, from the snapshot if there is one.

        Raises ``StoppedError`` where a process was asked to stop, and ``TrainingError`` for a run
        that cannot go on; both after saving.
        """
        digests = self.group.merge({self.group.rank: self._digest()})
        if len(set(digests.values())) > 1:
            raise ConfigError("the processes of this run do not see the same data")
        continued = self.snapshot.path.exists()
        if continued:
            self.progress = self.snapshot.read()
            over = self.progress.epoch == self.stages[-1].end
            self.say("the run is at its end" if over else f"continuing at {self._place}")
        if self.group.main:
            tensorboard = self.config.training.tensorboard
            self._log = RunLog(self.run, self.step if continued else None, tensorboard)
        with self._log or nullcontext():
            try:
                while self.progress.epoch < self.stages[-1].end:
                    self.begin_epoch()
                    self._epoch()
                    self._end_epoch()
            except RuntimeError as error:
                self._after(error)
                raise

    @property
    def _place(self) -> str:
        progress = self.progress
        return f"epoch {progress.epoch + 1}, step {progress.position} of {self.steps_per_epoch}"

    def begin_epoch(self) -> None:
        """Set what learns, from what, and how."""
        settings, stage = self.config.training, self.stage.name
        frozen, rewarded = stage != "end to end", stage == "self-critical"
        self.model.requires_grad_(not rewarded)
        self.model.caption_decoder.requires_grad_(True)
        self.model.encoder.freeze(None if frozen else self.config.encoder.frozen_blocks)
        with self._stopper.idle():
            self.dataset.features = self._features(self.data.train) if frozen else None
        seed = f"{settings.seed}/{self.progress.epoch}"
        self.dataset.augmentation = seed if settings.augment and not frozen else None
        self._set_objective(rewarded)
        self._set_mode()

    def _set_objective(self, rewarded: bool) -> None:
        settings, stage = self.config.training, self.stage.name
        if self._objective_of == stage:
            return
        self._objective_of = stage
        self.objective: TeacherForcing | SelfCritical
        if rewarded:
            critical = self.config.self_critical
            self.objective = SelfCritical(self.model, self._reward, critical, self.precision)
        else:
            self.objective = TeacherForcing(self.model, settings, self.precision)
        self._shared = self.group.wrap(self.objective)

    def _set_mode(self) -> None:
        # What is drawn and what is reinforced must be one policy: no dropout.
        self.model.train(self.stage.name != "self-critical")

    def steps(self) -> Iterator[list[Batch]]:
        """Yield this process's parts of each step that is left in the epoch."""
        settings, progress = self.config.training, self.progress
        parts = batches(
            self.dataset,
            settings.batch_size,
            settings.seed,
            progress.epoch,
            progress.position,
            self.workers,
            (self.group.rank, self.group.size, settings.accumulation),
        )
        while step := list(islice(parts, settings.accumulation)):
            yield step

    def update(self, parts: Sequence[Batch]) -> Update | None:
        """Do one optimizer step on this process's parts; ``None`` if no process has a photograph.

        A step whose loss or gradient is not finite leaves the weights as they are.
        """
        self._seed()
        rate = self._set_rates()
        counts = [self.objective.counts(part).to(self.device) for part in parts]
        totals = self.group.sum(torch.stack(counts).sum(dim=0))
        if not totals.any():
            return None
        self.optimizer.zero_grad(set_to_none=True)
        figure = self.group.sum(self._backward(parts, totals)).item()
        update = Update(figure, clip_gradients(self.model, self.config.optimizer), rate)
        if update.finite:
            self._whole = False
            self.optimizer.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self._whole = True
        return update

    def _backward(self, parts: Sequence[Batch], totals: Tensor) -> Tensor:
        """Add up the gradients of all parts; return the sum of their figures."""
        figures = torch.zeros((), device=self.device)
        for place, part in enumerate(parts, 1):
            with nullcontext() if place == len(parts) else self.group.alone(self._shared):
                loss, figure = self._shared(part, totals)
                # The group takes the mean of what are the terms of a sum.
                (loss * self.group.size).backward()
            figures += figure
        return figures

    def _seed(self) -> None:
        """Make chance a function of the step, so that a resumed run needs no random state."""
        step = self.config.training.seed * 1_000_003 + self.step
        torch.manual_seed((step + 1) * 1_009 + self.group.rank)  # 0 drew the first weights
        if isinstance(self.objective, SelfCritical):
            self.objective.seed = step

    def _set_rates(self) -> float:
        """Set the learning rates; each of the two kinds of learning has a rise and a fall."""
        config, step = self.config, self.step
        steps = self.steps_per_epoch * config.training.epochs
        rewarded = isinstance(self.objective, SelfCritical)
        if isinstance(self.objective, SelfCritical):
            step, steps = step - steps, self.steps_per_epoch * config.self_critical.epochs
        else:
            self.objective.own_words = ramp(step, steps, config.training.own_words)
        factor = rate_factor(config.optimizer, step, steps, self.progress.scores)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * (config.self_critical.lr if rewarded else group["peak"])
        return float(self.optimizer.param_groups[0]["lr"])

    def _epoch(self) -> None:
        with self._bar() as bar:
            self._evaluate_if_due()
            steps = self.steps()
            before = time.monotonic()
            while not self._stalled and (parts := next(steps, None)):
                self._take(parts, bar)
                self.progress.seconds += time.monotonic() - before
                stop = self._any(bool(self._stopper.signal))
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

    def _any(self, said: bool) -> bool:
        return bool(self.group.sum(torch.tensor(float(said), device=self.device)))

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.steps_per_epoch,
            initial=self.progress.position,
            desc=f"epoch {self.progress.epoch + 1}/{self.stages[-1].end}",
            unit="step",
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}, {rate_fmt}, {remaining} left",
            leave=False,
            disable=None if self.group.main else True,
        )

    def _take(self, parts: Sequence[Batch], bar: tqdm[Any]) -> None:
        """Do a step and write it down."""
        for part in parts:
            self._name(part.unreadable)
        update, progress = self.update(parts), self.progress
        progress.position, progress.steps = progress.position + 1, progress.steps + 1
        if update is not None:
            self._count(update)
            progress.figure_sum += update.figure if update.finite else 0.0
            mean = progress.figure_sum / max(progress.updates, 1)
            bar.set_postfix_str(f"{self.figure} {mean:.3f}, rate {update.rate:.1e}", False)
        bar.update()

    def _count(self, update: Update) -> None:
        progress = self.progress
        if self._log is not None:
            values = dict(zip((self.figure, "gradient_norm", "rate"), update, strict=True))
            self._log.step(self.step, self.stage.name, values)
        if update.finite:
            progress.updates, progress.in_a_row = progress.updates + 1, 0
            return
        progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
        self.say(f"step {self.step} skipped: its {self.figure} or gradient is not finite")
        if progress.in_a_row >= _HOPELESS:
            self.save()
            best = self.run / "best.safetensors"
            start = f", which may begin from model.init = {str(best)!r}" if best.exists() else ""
            raise TrainingError(
                f"no finite gradient in {_HOPELESS} steps in a row, up to step {self.step}; try an "
                f"optimizer.lr lower than {self.config.optimizer.lr}, a longer "
                'optimizer.warmup_steps, or training.precision = "float32", in a new run' + start
            )

    def _after(self, error: RuntimeError) -> None:
        """Save what a failed step leaves as it was; say what to try, where that is known.

        A group's other processes fail with it: their save is the run's.
        """
        if isinstance(error, TrainingError):
            return
        if "DataLoader worker (pid" in str(error):
            # A signal handler raises it, between any two instructions: nothing is saved, for what
            # is there may not belong together.
            raise TrainingError(
                f"a process that reads photographs has ended: {error}; if its decoder crashed, and "
                "not for want of memory, scripts/check_data.py names the photograph. Empty that "
                "file, so that it is left out, and the same command continues the run"
            ) from error
        scarce = isinstance(error, torch.OutOfMemoryError) or any(
            sign in str(error) for sign in ("out of memory", "allocate memory")
        )
        if not scarce and self.group.size == 1:
            return
        self.optimizer.zero_grad(set_to_none=True)
        if self._whole:
            self.save()
        if scarce:
            raise TrainingError(self._more_parts()) from error

    def _more_parts(self) -> str:
        settings = self.config.training
        share = math.ceil(settings.batch_size / self.group.size / settings.accumulation)
        message = f"out of memory at step {self.step}, with {share} photographs at a time; "
        if share == 1:
            return message + "begin another run with a smaller model or preprocessing.size"
        fewer = ", or with fewer self_critical.samples" if self.figure == "reward" else ""
        return message + (
            f"the run is saved: continue it with --set training.accumulation="
            f"{2 * settings.accumulation}, or begin another with a training.batch_size lower than "
            f"{settings.batch_size}{fewer}"
        )

    def evaluate(self) -> Evaluation:
        """Caption the validation split, write down how good it is, and save the models."""
        result, progress = self._validate(), self.progress
        self._set_mode()
        score = result.scores.cider_d
        figures = {
            "epoch": progress.epoch + 1,
            "step": self.step,
            "stage": self.stage.name,
            self.figure: progress.figure_sum / max(progress.updates, 1),
            **result.as_dict(),
            "skipped": progress.skipped,
            "steps": progress.steps,
        }
        self.checkpoint.provenance["figures"] = figures
        better = score > progress.best
        progress.best = max(score, progress.best)
        progress.stale = 0 if better else progress.stale + 1
        progress.scores.append(score)
        self._tell(result, figures | {"seconds": round(progress.seconds, 1)})
        progress.evaluated, progress.seconds, progress.steps = self.step, 0.0, 0
        if self.group.main:
            save_checkpoint(self.checkpoint, self.run / "last.safetensors")
            if better:
                save_checkpoint(self.checkpoint, self.run / "best.safetensors")
        return result

    def _tell(self, result: Evaluation, figures: Mapping[str, Any]) -> None:
        self.say(
            f"epoch {figures['epoch']}, {self.stage.name}: "
            f"{self.figure} {figures[self.figure]:.3f}, "
            f"BLEU-4 {100 * result.scores.bleu[3]:.1f}, CIDEr-D {100 * result.scores.cider_d:.1f}, "
            f"tags {100 * result.tag_precision:.0f} % right, {result.different_tags} different, "
            f"{figures['seconds']:.0f} s"
        )
        if self._log is not None:
            images = [str(example.image) for example in result.examples]
            self._log.evaluation(figures, images, [c.text for c in result.captions])

    def _validate(self) -> Evaluation:
        """Caption and tag the validation split, and calibrate the tags' scores on it."""
        options = SearchOptions(beam_size=self.config.training.beam_size)
        places = range(self.group.rank, len(self.data.val), self.group.size)
        unreadable: dict[int, str] = {}
        self.checkpoint.calibration = Calibration()
        with self._stopper.idle():
            described = describe(self.checkpoint, self._grids(places, unreadable), options)
            found, unreadable = self.group.merge(described), self.group.merge(unreadable)
        self._name({str(self.data.val[place].image): why for place, why in unreadable.items()})
        result = judge(self.data.val, found, self.checkpoint.tags)
        hits = [tag_hits(e, t) for e, t in zip(result.examples, result.tags, strict=True)]
        self.checkpoint.calibration = fit_calibration(
            [math.log(tag.score) for tags in result.tags for tag in tags],
            [hit for image in hits for hit in image],
        )
        return result

    def _grids(
        self, places: Sequence[int], unreadable: dict[int, str]
    ) -> Iterator[tuple[list[int], Tensor]]:
        if self.stage.name != "end to end":
            features = self._features(self.data.val)
            unreadable |= features.unreadable
            yield from feature_grids(self.checkpoint, features, places)
            return
        paths, found = [str(self.data.val[place].image) for place in places], dict[int, str]()
        for own, grid in pixel_grids(self.checkpoint, paths, self.workers, found, self.precision):
            yield [places[place] for place in own], grid
        unreadable |= {places[place]: why for place, why in found.items()}

    def _features(self, examples: list[Example]) -> Features:
        paths = [str(example.image) for example in examples]
        settings = self.config.training
        # What an encoder says that learnt in this run is of no use to others.
        learnt = self.stage.name != "frozen" and settings.frozen_epochs < settings.epochs
        shared = settings.features != "" and not learnt
        folder = Path(settings.features) if shared else self.run / "features"
        # Of several processes one writes what the others, who wait for its lock, then find.
        return encode_features(
            self.model.encoder, paths, folder, self.precision, self.workers, self.say, shared
        )

    def _name(self, unreadable: Mapping[str, str]) -> None:
        for path, why in unreadable.items():
            if path not in self._named:
                self._named[path] = why
                self.say(f"left out {path}: {why}")

    @property
    def _stalled(self) -> bool:
        return 0 < self.config.training.patience <= self.progress.stale

    def _end_epoch(self) -> None:
        """Evaluate if it is time, and go on to the next epoch, or the next stage."""
        stage, progress = self.stage, self.progress
        for named in self.group.merge({self.group.rank: self._named}).values():
            self._name(named)
        if not progress.updates and not progress.skipped:
            raise DataError("none of the photographs to train on could be read")
        last = progress.epoch + 1 == stage.end
        if progress.evaluated != self.step and (last or not self.config.training.validate_every):
            self.save()
            self.evaluate()
        over = last or self._stalled
        self.progress = Progress(
            epoch=stage.end if over else progress.epoch + 1,
            best=progress.best,
            stale=0 if over else progress.stale,
            scores=[] if over else progress.scores,
            skipped=progress.skipped,
            in_a_row=progress.in_a_row,
        )
        if over and self.stage.name == "self-critical" != stage.name:
            self._begin_self_critical()
        self.save()

    def _begin_self_critical(self) -> None:
        """Go on from the best model; the optimizer knows gradients of another size."""
        self.group.wait()
        best = load_checkpoint(self.run / "best.safetensors").model.state_dict()
        for model in (self.model, self.checkpoint.model):
            model.load_state_dict(best)
        self.optimizer.state.clear()
        if self.average is not None:
            self.average.n_averaged.zero_()

    def save(self) -> None:
        """Write all that an exact continuation needs."""
        if self.group.main:
            if self._log is not None:
                self._log.flush()
            self.snapshot.write(self.progress)


def fit(
    config: Config,
    run: Path,
    device: torch.device,
    say: Say = print,
    stopper: Stopper | None = None,
) -> Path:
    """Train as the config says; return the best checkpoint's path.

    A run folder that holds a cut-off run is continued where it stood. Processes that ``torchrun``
    started train one model together; they need the same folder. Raises as
    :meth:`Trainer.train`, and ``ConfigError`` and ``DataError`` for what cannot be begun.
    """
    stopper = stopper or Stopper()
    with stopper.idle():
        data = read_data(config)
    with joined(device) as group:
        run.mkdir(parents=True, exist_ok=True)
        with stopper.idle():
            trainer = Trainer(config, data, run, group.device(device), say, group, stopper)
        for note in data.notes:
            trainer.say(note)
        with trainer.alone():
            trainer.train()
        if group.main:
            references = {str(example.image): example.captions for example in data.val}
            write_summary(run, trainer.config, references)
            trainer.say(f"best checkpoint: {run / 'best.safetensors'}")
    return run / "best.safetensors"
