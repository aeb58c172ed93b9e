"""A run's stages: teacher forcing on kept features, then end to end, then self-critical."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from captioner import __version__, readers
from captioner.checkpoint import (
    Checkpoint,
    build_model,
    default_path,
    load_checkpoint,
    save_checkpoint,
    write_tensors,
)
from captioner.config import (
    Config,
    ConfigError,
    EncoderConfig,
    OptimizerConfig,
    SearchOptions,
    to_dict,
)
from captioner.dataset import Batch, CaptionDataset, Features, batches
from captioner.decoder import Decoder
from captioner.encoder import Encoder, load_backbone_weights
from captioner.evaluation import Evaluation, evaluate, feature_grids, pixel_grids, tag_hits
from captioner.features import encode_features
from captioner.losses import sequence_loss
from captioner.model import CaptionModel, choose_precision
from captioner.readers import Example
from captioner.self_critical import Reward, draw, policy_gradient_loss, policy_log_probs
from captioner.tags import Calibration, TagSet, fit_calibration
from captioner.tokenizer import tokenize
from captioner.vocabulary import PAD, Vocabulary

__all__ = ["Data", "Trainer", "fit", "learning_rate_factor", "read_data"]

Say = Callable[[str], None]
Stage = Literal["frozen", "end to end", "self-critical"]
_RESUME = "resume.safetensors"


@dataclass(frozen=True)
class Data:
    """The two splits of a run, without junk captions and missing photographs."""

    train: list[Example]
    val: list[Example]
    notes: list[str]

    def digest(self) -> str:
        """Return a hash of every path, caption and tag."""
        everything = repr((self.train, self.val)).encode("utf-8", "surrogateescape")
        return hashlib.sha256(everything).hexdigest()


def read_data(config: Config) -> Data:
    """Read both splits of a config.

    ``notes`` says what was dropped. Raises ``readers.DataError`` when a split cannot be used,
    ``ConfigError`` when the config does not say where it is.
    """
    data = config.data
    notes: list[str] = []
    for key in ("images", "captions"):
        if not getattr(data, key):
            raise ConfigError(f"data.{key} is not set; say where with --set data.{key}=…")
    if not data.val_captions and not data.val_split:
        raise ConfigError("data.val_captions or data.val_split must say what to validate on")

    def load(name: str, images: str, captions: str, instances: str, split: str) -> list[Example]:
        objects = Path(instances) if instances else None
        examples, left_out = readers.load(Path(captions), Path(images), split, objects)
        notes.extend(
            f"{name}: left out {path}: {why}" for path, why in islice(left_out.items(), 20)
        )
        without = f", {len(left_out)} left out" if left_out else ""
        notes.append(f"{name}: {len(examples)} photographs{without}")
        return examples

    everything = load("train", data.images, data.captions, data.instances, data.split)
    val = load(
        "val",
        data.val_images or data.images,
        data.val_captions or data.captions,
        data.val_instances or data.instances,
        data.val_split,
    )
    train, junk = readers.drop_junk(everything)
    if not train:
        raise readers.DataError(f"{data.captions}: all {junk} captions are junk")
    notes.append(f"train: {junk} junk captions dropped")
    # Candidates are compared with what people wrote, all of it.
    return Data(train, val, notes)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step: a linear rise, then a cosine to 0.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, with one period.
    """
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def _load_encoder(encoder: Encoder, config: EncoderConfig) -> None:
    if config.weights != "default":
        load_backbone_weights(encoder, config)
        return
    default = load_checkpoint(default_path()).model.encoder
    if default.name != config.name:
        raise ConfigError(f"encoder.weights is 'default', which is a {default.name}")
    encoder.load_state_dict(default.state_dict())


def _optimizer(model: CaptionModel, config: OptimizerConfig) -> torch.optim.AdamW:
    encoder = list(model.encoder.parameters())
    known = {id(parameter) for parameter in encoder}
    decoders = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": decoders, "peak": config.lr},
        {"params": encoder, "peak": config.encoder_lr},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=config.weight_decay)


@dataclass
class Progress:
    """Where a run stands."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    best: float = -1.0
    figure_sum: float = 0.0
    seconds: float = 0.0


class Trainer:
    """One run: its model, optimizer and place in the data."""

    def __init__(
        self, config: Config, data: Data, run: Path, device: torch.device, say: Say
    ) -> None:
        """Build the vocabularies, the model and the optimizer of a run at its beginning."""
        self.config, self.data, self.run, self.device, self.say = config, data, run, device, say
        settings = config.training
        self.precision = choose_precision(settings.precision, device)
        self.workers = max(1, (os.cpu_count() or 1) // 2)
        torch.manual_seed(settings.seed)
        captions = (tokenize(c) for e in data.train for c in e.captions)
        vocabulary = Vocabulary.build(captions, config.data.vocabulary_size, config.data.min_count)
        tags = TagSet.build(data.train, config.data.tag_size, config.data.tag_min_count)
        model = build_model(config, vocabulary, tags)
        _load_encoder(model.encoder, config.encoder)
        provenance = {
            "photographs": len(data.train),
            "captions": sum(len(example.captions) for example in data.train),
            "encoder from": Path(config.encoder.weights).name,
            "versions": f"captioner {__version__}, torch {torch.__version__}",
        }
        self.checkpoint = Checkpoint(
            model.to(device), config, vocabulary, tags, provenance=provenance
        )
        self.dataset = CaptionDataset(
            data.train, vocabulary, tags, config.preprocessing, config.data.max_words
        )
        self.progress = Progress()
        self.steps_per_epoch = math.ceil(len(self.dataset) / settings.batch_size)
        self.optimizer = _optimizer(model, config.optimizer)
        self._named: set[str] = set()

    @property
    def model(self) -> CaptionModel:
        """The model that learns."""
        return self.checkpoint.model

    @property
    def epochs(self) -> int:
        """How many epochs the run has in all."""
        return self.config.training.epochs + self.config.self_critical.epochs

    @property
    def stage(self) -> Stage:
        """What the present epoch is of."""
        epoch, settings = self.progress.epoch, self.config.training
        if epoch >= settings.epochs:
            return "self-critical"
        return "frozen" if epoch < settings.frozen_epochs else "end to end"

    @property
    def figure(self) -> str:
        """What an update returns in this stage."""
        return "reward" if self.stage == "self-critical" else "loss"

    @cached_property
    def _reward(self) -> Reward:
        bleu_weight = self.config.self_critical.bleu_weight
        return Reward(self.data.train, self.checkpoint.vocabulary, bleu_weight)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of one batch: captions, and ``tag_weight`` times the tags."""
        settings = self.config.training
        images = batch.images.to(self.device)
        words, tags = batch.words.to(self.device), batch.tags.to(self.device)
        with self._autocast():
            pixels = images.dtype == torch.uint8
            grid = self.model.encode(images) if pixels else self.model.project(images.float())
            caption_loss = _teacher_forcing(
                self.model.caption_decoder, grid, words, settings.label_smoothing
            )
            tag_loss = _teacher_forcing(self.model.tag_decoder, grid, tags, 0.0)
        return caption_loss + settings.tag_weight * tag_loss

    def _autocast(self) -> torch.autocast:
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)

    def reward_loss(self, batch: Batch) -> tuple[Tensor, float]:
        """Return the self-critical loss of one batch of features, and the mean reward."""
        settings, max_words = self.config.self_critical, SearchOptions.max_words
        decoder, samples = self.model.caption_decoder, settings.samples
        # A function of the step alone, so that a resumed run draws what an undisturbed one would.
        generator = torch.Generator().manual_seed(
            self.config.training.seed * 1_000_003 + self.progress.step
        )
        with self._autocast(), torch.no_grad():
            grid = self.model.project(batch.images.to(self.device).float())
            captions = draw(decoder, grid, samples, settings.temperature, max_words, generator)
        # Not in the same autocast: it keeps the weights as it cast them, here without gradient.
        with self._autocast():
            log_probs = policy_log_probs(decoder, grid, captions, settings.temperature, max_words)
        images = [place for place in batch.places for _ in range(samples)]
        rewards = self._reward(captions, images).to(self.device)
        loss = policy_gradient_loss(log_probs.view(-1, samples), rewards.view(-1, samples))
        return loss, rewards.mean().item()

    def update(self, batch: Batch) -> float:
        """Do one optimizer step and return the loss; in the self-critical stage, the reward."""
        self._set_learning_rates()
        if self.stage == "self-critical":
            loss, figure = self.reward_loss(batch)
        else:
            loss = self.loss(batch)
            figure = loss.item()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        return figure

    def _set_learning_rates(self) -> None:
        """Each of the two kinds of learning has a rise and a fall of its own."""
        config, step = self.config, self.progress.step
        forced = self.steps_per_epoch * config.training.epochs
        if self.stage == "self-critical":
            step, steps = step - forced, self.steps_per_epoch * config.self_critical.epochs
        else:
            steps = forced
        factor = learning_rate_factor(step, steps, config.optimizer.warmup_steps)
        for group in self.optimizer.param_groups:
            peak = config.self_critical.lr if self.stage == "self-critical" else group["peak"]
            group["lr"] = peak * factor

    def epoch(self) -> None:
        """Train to the end of the present epoch."""
        settings, progress = self.config.training, self.progress
        self._begin_epoch()
        started = time.monotonic()
        with tqdm(
            total=self.steps_per_epoch,
            initial=progress.position,
            desc=f"epoch {progress.epoch + 1}/{self.epochs}",
            unit="step",
            disable=None,
        ) as bar:
            for batch in self._batches():
                self._name(batch.unreadable)
                if len(batch.images):
                    progress.figure_sum += self.update(batch)
                progress.position += 1
                progress.step += 1
                mean = progress.figure_sum / progress.position
                bar.set_postfix({self.figure: f"{mean:.3f}"}, refresh=False)
                bar.update()
                if progress.step % settings.save_every == 0:
                    progress.seconds += time.monotonic() - started
                    started = time.monotonic()
                    self.save()
        progress.seconds += time.monotonic() - started

    def _begin_epoch(self) -> None:
        settings, progress = self.config.training, self.progress
        frozen = self.stage != "end to end"
        self.model.encoder.freeze(frozen)
        self.dataset.features = self._features(self.data.train) if frozen else None
        augmented = settings.augment and not frozen
        self.dataset.augmentation = f"{settings.seed}/{progress.epoch}" if augmented else None
        # What is drawn and what is reinforced must be one policy: no dropout.
        self.model.train(self.stage != "self-critical")
        if progress.epoch == settings.epochs and progress.position == 0:
            self.optimizer.state.clear()  # another loss, whose gradients are of another size

    def _batches(self) -> Iterator[Batch]:
        settings, progress = self.config.training, self.progress
        return batches(
            self.dataset,
            settings.batch_size,
            settings.seed,
            progress.epoch,
            progress.position,
            self.workers,
        )

    def validate(self) -> Evaluation:
        """Caption and tag the validation split, and calibrate the tags' scores on it."""
        options = SearchOptions(beam_size=self.config.training.beam_size)
        paths = [str(example.image) for example in self.data.val]
        unreadable: dict[int, str] = {}
        if self.stage != "end to end":
            features = self._features(self.data.val)
            unreadable = features.unreadable
            grids = feature_grids(self.checkpoint, features)
        else:
            grids = pixel_grids(self.checkpoint, paths, self.workers, unreadable, self.precision)
        self.checkpoint.calibration = Calibration()
        result = evaluate(self.checkpoint, self.data.val, grids, options)
        found = [tag for tags in result.tags for tag in tags]
        hits = [tag_hits(e, t) for e, t in zip(result.examples, result.tags, strict=True)]
        self.checkpoint.calibration = fit_calibration(
            [math.log(tag.score) for tag in found], [hit for image in hits for hit in image]
        )
        self._name({paths[place]: why for place, why in unreadable.items()})
        return result

    def _features(self, examples: list[Example]) -> Features:
        paths = [str(example.image) for example in examples]
        settings = self.config.training
        # What an encoder says that learnt in this run is of no use to others.
        learnt = self.stage != "frozen" and settings.frozen_epochs < settings.epochs
        shared = settings.features != "" and not learnt
        folder = Path(settings.features) if shared else self.run / "features"
        return encode_features(
            self.model.encoder, paths, folder, self.precision, self.workers, self.say, shared
        )

    def _name(self, unreadable: Mapping[str, str]) -> None:
        for path, why in unreadable.items():
            if path not in self._named:
                self._named.add(path)
                self.say(f"left out {path}: {why}")

    def finish_epoch(self) -> Evaluation:
        """Validate, log, save the best and the last checkpoint, and move on."""
        result, progress = self.validate(), self.progress
        figures = {
            "epoch": progress.epoch + 1,
            "stage": self.stage,
            self.figure: progress.figure_sum / max(progress.position, 1),
            **result.as_dict(),
            "seconds": round(progress.seconds, 1),
        }
        self.checkpoint.provenance["figures"] = figures
        with (self.run / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(figures) + "\n")
        self.say(
            f"epoch {figures['epoch']}, {self.stage}: {self.figure} {figures[self.figure]:.3f}, "
            f"BLEU-4 {100 * result.scores.bleu[3]:.1f}, CIDEr-D {100 * result.scores.cider_d:.1f}, "
            f"tags {100 * result.tag_precision:.0f} % right, {result.different_tags} different, "
            f"{progress.seconds:.0f} s"
        )
        save_checkpoint(self.checkpoint, self.run / "last.safetensors")
        if result.scores.cider_d > progress.best:
            progress.best = result.scores.cider_d
            save_checkpoint(self.checkpoint, self.run / "best.safetensors")
        self.progress = Progress(progress.epoch + 1, 0, progress.step, progress.best)
        self.save()
        return result

    def _tensors(self) -> dict[str, Tensor]:
        model = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return {name: tensor.detach() for name, tensor in model.items()}

    def save(self) -> None:
        """Write all that an exact continuation needs to the run folder, in one file."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        tensors = {f"model.{name}": tensor for name, tensor in self._tensors().items()}
        for parameter, state in self.optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{key}.{names[id(parameter)]}"] = value
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {
            "progress": json.dumps(vars(self.progress)),
            "config": json.dumps(to_dict(self.config)),
            "data": self.data.digest(),
        }
        write_tensors(tensors, self.run / _RESUME, metadata)

    def resume(self) -> None:
        """Continue from the run folder, exactly.

        Raises ``ConfigError`` if it holds a run with another config or other data, or cannot be
        read.
        """
        path = self.run / _RESUME
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                self._check_same(json.loads(metadata["config"]), metadata["data"])
                for key in file.keys():  # noqa: SIM118
                    self._restore(key, file.get_tensor(key))
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} cannot be continued from: {error}") from error
        self.progress = Progress(**json.loads(metadata["progress"]))
        # A kill between the two writes leaves a line of an epoch that is done again.
        log = self.run / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.write_text("".join(f"{line}\n" for line in lines[: self.progress.epoch]), "utf-8")

    def _check_same(self, config: Mapping[str, Any], data: str) -> None:
        changes = _difference(config, json.loads(json.dumps(to_dict(self.config))))
        if changes:
            raise ConfigError(f"{self.run} holds a run with another config: {changes}")
        if data != self.data.digest():
            raise ConfigError(f"{self.run} holds a run on other photographs or captions")

    def _restore(self, key: str, tensor: Tensor) -> None:
        kind, _, name = key.partition(".")
        if kind == "model":
            self._tensors()[name].copy_(tensor)
        elif kind == "optimizer":
            state, _, name = name.partition(".")
            parameter = self.model.get_parameter(name)
            value = tensor if state == "step" else tensor.to(self.device)
            self.optimizer.state[parameter][state] = value
        elif name == "cpu":
            torch.set_rng_state(tensor)
        else:
            torch.cuda.set_rng_state(tensor, self.device)


def _teacher_forcing(
    decoder: Decoder, grid: Tensor, tokens: Tensor, label_smoothing: float
) -> Tensor:
    targets = tokens[:, 1:]
    keep = targets != PAD
    logits, _ = decoder(grid, tokens[:, :-1], keep)
    return sequence_loss(logits, targets[keep], label_smoothing)


def _difference(saved: Mapping[str, Any], ours: Mapping[str, Any], where: str = "") -> str:
    changes = []
    for key in sorted(saved.keys() | ours.keys()):
        was, now = saved.get(key), ours.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            changes.append(_difference(was, now, f"{where}{key}."))
        elif was != now:
            changes.append(f"{where}{key} was {was!r}, now {now!r}")
    return ", ".join(filter(None, changes))


def fit(config: Config, run: Path, device: torch.device, say: Say = print) -> Path:
    """Train as the config says; return the best checkpoint's path.

    A run folder that holds a cut-off run is continued where it stood.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("training on several devices is not there yet; start one process")
    data = read_data(config)
    run.mkdir(parents=True, exist_ok=True)
    for note in data.notes:
        say(note)
    trainer = Trainer(config, data, run, device, say)
    if (run / _RESUME).exists():
        trainer.resume()
        say(f"continuing at epoch {trainer.progress.epoch + 1}, step {trainer.progress.position}")
    while trainer.progress.epoch < trainer.epochs:
        trainer.epoch()
        trainer.finish_epoch()
    return run / "best.safetensors"
