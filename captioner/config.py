"""Everything that a training run can set: typed, with defaults and ranges.

Nothing here imports more than the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from captioner.settings import ConfigError, Ranged, from_dict, ranged

__all__ = [
    "PRECISIONS",
    "Config",
    "DataConfig",
    "DataSource",
    "DecoderConfig",
    "EncoderConfig",
    "ExperimentalConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Preprocessing",
    "SelfCriticalConfig",
    "TagsConfig",
    "TrainingConfig",
    "from_stored",
]

PRECISIONS = ("auto", "float32", "bfloat16", "int8")
"""The precisions that a finished model can be used in; it is trained in the first three."""


def _moved(*keys: str) -> dict[str, str]:
    """Return the keys of a section that earlier versions had, and their names now."""
    return {key: f"experimental.{key}" for key in keys}


@dataclass(frozen=True)
class Preprocessing(Ranged):
    """How a photograph becomes pixels; saved in the checkpoint, the same for every use.

    ``squash`` scales the whole photograph to ``size`` x ``size`` pixels, whatever its shape;
    ``crop`` scales its shorter side to ``size`` and keeps the middle. ``mean`` and ``std`` are of
    the channels R, G, B in 0…1.
    """

    size: int = ranged(224, 32, 2048)
    fit: Literal["squash", "crop"] = "squash"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        """Check every range."""
        super().__post_init__()
        for name, values, low in (("mean", self.mean, 0.0), ("std", self.std, 1e-3)):
            if not all(low <= value <= 1.0 for value in values):
                raise ConfigError(f"{name} is {values}; each takes {low} to 1.0")


@dataclass(frozen=True)
class DataSource(Ranged):
    """One of several sources of training data; the fields are those of :class:`DataConfig`.

    An epoch shows each of its photographs ``weight`` times: 2 is twice, 0.5 a random half of them.
    """

    images: str = ""
    captions: str = ""
    instances: str = ""
    split: str = ""
    weight: float = ranged(1.0, 0.001, 1000.0)


@dataclass(frozen=True)
class DataConfig(Ranged):
    """Where the photographs and captions are, and which words are kept.

    ``captions`` may be COCO, Karpathy, JSONL, CSV or Flickr8k's ``token.txt``; ``split`` as in
    :func:`captioner.data.readers.read`. The ``val_…`` fields default to the training ones. Several
    sources to train on are said by ``sources`` in place of ``images``, ``captions``,
    ``instances`` and ``split``; there is one to validate on, with no default then.

    ``tags`` is a list of tags that ``scripts/build_tags.py`` wrote; without one they are collected
    from the data as it would, at most ``tag_size``, each of ``tag_min_count`` photographs.
    """

    images: str = ""
    captions: str = ""
    instances: str = ""
    split: str = ""
    val_images: str = ""
    val_captions: str = ""
    val_instances: str = ""
    val_split: str = ""
    sources: tuple[DataSource, ...] = ()
    vocabulary_size: int = ranged(10_000, 5, 1_000_000)
    min_count: int = ranged(3, 1, 1_000_000)
    tag_size: int = ranged(1_000, 1, 1_000_000)
    tag_min_count: int = ranged(10, 1, 1_000_000)
    tags: str = ""
    max_words: int = ranged(18, 1, 200)

    def __post_init__(self) -> None:
        """Check every range, and that the sources are said in one way."""
        super().__post_init__()
        plain = [key for key in ("images", "captions", "instances", "split") if getattr(self, key)]
        if self.sources and plain:
            raise ConfigError(
                f"sources and {plain[0]} are both set; one source is said by images, captions, "
                "instances and split, several by sources alone"
            )


@dataclass(frozen=True)
class EncoderConfig(Ranged):
    """The backbone: a torchvision name or "efficientnet_lite0" to 2, and its weights.

    ``weights`` is "imagenet" (torchvision's download), "default" (the encoder of the embedded
    model), "random", or a file of the backbone's published state dict. The first
    ``frozen_blocks`` modules of the backbone do not learn end to end either.
    """

    name: str = "mobilenet_v2"
    weights: str = "imagenet"
    frozen_blocks: int = ranged(0, 0, 1_000)


@dataclass(frozen=True)
class DecoderConfig(Ranged):
    """Sizes of one decoder: embedding E, hidden H, attention A; ``dropout`` in 0…1.

    ``attention = false`` is Show and Tell's plain form, ``tied`` shares the embedding with the
    output. ``cell`` is what recurs; the plain tanh "rnn" is there to compare with.
    """

    embedding: int = ranged(512, 1, 8192)
    hidden: int = ranged(512, 1, 8192)
    attention: bool = True
    attention_width: int = ranged(256, 1, 8192)
    tied: bool = True
    dropout: float = ranged(0.5, 0.0, 0.95)
    cell: Literal["lstm", "gru", "rnn"] = "lstm"


@dataclass(frozen=True)
class ModelConfig(Ranged):
    """The grid width D that both decoders see, its dropout in 0…1, and the two decoders.

    ``init`` is a checkpoint to start from, or "default" for the one in the package. The sizes, the
    backbone and the preprocessing are then those of the checkpoint where the config does not say
    the same; only dropout and ``preprocessing.size`` may be others. Its words and tags are kept,
    and those of the data are added; where ``data.tags`` names a list, the tags are those of the
    list alone.

    ``tag_head`` adds a classifier of tags on the same grid, which the scores of tags take into
    account: of each of its "cells", or of their "mean", as the plainest taggers are.
    """

    grid_width: int = ranged(512, 1, 8192)
    grid_dropout: float = ranged(0.2, 0.0, 0.95)
    caption: DecoderConfig = DecoderConfig()
    tags: DecoderConfig = DecoderConfig(embedding=256, hidden=256, attention_width=128)
    tag_head: Literal["cells", "mean", "none"] = "cells"
    init: str = ""


@dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """AdamW, and its learning rates, which rise over ``warmup_steps`` and then fall.

    ``schedule`` "cosine" falls to 0 at the end of the stage's epochs. "plateau" falls by
    ``experimental.plateau_decay`` after every ``experimental.plateau_patience`` evaluations of a
    stage without a better CIDEr-D. ``lr`` is the peak of the decoders, ``encoder_lr`` that of the
    encoder. ``clip_norm`` bounds the norm of a step's gradient.
    """

    lr: float = ranged(1e-3, 0.0, 1.0)
    encoder_lr: float = ranged(1e-4, 0.0, 1.0)
    weight_decay: float = ranged(1e-4, 0.0, 1.0)
    clip_norm: float = ranged(5.0, 1e-6, 1e6)
    warmup_steps: int = ranged(100, 0, 10_000_000)
    schedule: Literal["cosine", "plateau"] = "cosine"

    MOVED: ClassVar = _moved("clip_value", "plateau_patience", "plateau_decay")


@dataclass(frozen=True)
class TrainingConfig(Ranged):
    """Epochs, batches, validation, and the numbers that training computes with.

    - ``epochs`` of teacher forcing. The encoder is frozen for the first ``frozen_epochs``: its
      features are computed once and kept, in the folder ``features``, which several runs may
      share, or in the run's folder if that is empty.
    - ``batch_size``: photographs per optimizer step, over all processes, each with all its
      captions. ``accumulation``: micro-batches per optimizer step in each process.
    - ``label_smoothing`` of the words. ``tag_weight`` of the tags' loss beside the captions'.
    - ``augment``: each photograph has another crop and light in every epoch
      (:func:`captioner.photos.images.augment`) while the encoder learns.
    - ``ema``: the share that the moving average of the weights keeps of itself at each step. Where
      it is not 0, the average is validated and saved.
    - ``precision`` of the forward pass. ``seed`` of all chance.
    - ``save_every``: steps between snapshots, which a killed run continues from.
    - ``validate_every``: steps between evaluations on the validation split; 0 is after each epoch.
      ``patience``: evaluations without a better CIDEr-D after which a stage ends; 0 is never.
      ``beam_size`` of these evaluations.
    - ``tensorboard``: the log is also written for TensorBoard, which the extra of that name
      installs.
    """

    epochs: int = ranged(15, 0, 100_000)
    frozen_epochs: int = ranged(5, 0, 100_000)
    batch_size: int = ranged(32, 1, 100_000)
    accumulation: int = ranged(1, 1, 100_000)
    label_smoothing: float = ranged(0.1, 0.0, 0.9)
    tag_weight: float = ranged(0.5, 0.0, 100.0)
    augment: bool = True
    ema: float = ranged(0.0, 0.0, 0.99999)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    features: str = ""
    seed: int = ranged(0, 0, 2**31 - 1)
    save_every: int = ranged(100, 1, 10_000_000)
    validate_every: int = ranged(0, 0, 10_000_000)
    patience: int = ranged(0, 0, 100_000)
    beam_size: int = ranged(3, 1, 100)
    tensorboard: bool = False

    MOVED: ClassVar = _moved("own_words", "attention_penalty", "truncation")


@dataclass(frozen=True)
class SelfCriticalConfig(Ranged):
    """The last stage, of ``epochs``: the caption decoder learns from captions that it draws.

    It reads the features of the encoder as teacher forcing left it. ``samples`` captions a
    photograph are drawn from the logits divided by ``temperature``, which is part of the policy
    that learns. The reward is CIDEr-D. ``lr`` is the peak of the learning rate.
    """

    epochs: int = ranged(0, 0, 100_000)
    samples: int = ranged(5, 2, 1_000)
    temperature: float = ranged(0.4, 0.01, 100.0)
    lr: float = ranged(5e-5, 0.0, 1.0)

    MOVED: ClassVar = _moved("bleu_weight")


@dataclass(frozen=True)
class ExperimentalConfig(Ranged):
    """Options of the literature that showed no gain here beyond the noise of a seed.

    The table in ``configs/README.md`` has the scores of those that were measured. Any version may
    drop them.

    - ``own_words``: the share of words that the decoder reads from itself at the end of teacher
      forcing, rising from 0. Bengio et al., "Scheduled Sampling" (2015).
    - ``attention_penalty``: the weight of doubly stochastic attention. Xu et al., "Show, Attend
      and Tell" (2015), equation 14.
    - ``truncation``: positions after which gradients stop going back through the state; 0 is never.
    - ``clip_value``: bounds each entry of the gradient in place of its norm; 0 is off.
    - ``plateau_patience`` and ``plateau_decay``: of ``optimizer.schedule = "plateau"``.
    - ``bleu_weight``: the share of BLEU-4 in the reward of the self-critical stage.
    """

    own_words: float = ranged(0.0, 0.0, 1.0)
    attention_penalty: float = ranged(0.0, 0.0, 1e3)
    truncation: int = ranged(0, 0, 1_000)
    clip_value: float = ranged(0.0, 0.0, 1e6)
    plateau_patience: int = ranged(2, 1, 1_000)
    plateau_decay: float = ranged(0.5, 0.0, 1.0)
    bleu_weight: float = ranged(0.0, 0.0, 1.0)


@dataclass(frozen=True)
class TagsConfig(Ranged):
    """How the tag decoder and the tag head learn, in all stages, and a last stage for them alone.

    ``order`` is that in which the decoder learns a photograph's tags: "free", whichever of those
    that are left it thinks likeliest; "frequent" or "rare", the most or the least frequent first.

    The last stage has ``epochs``: the tag decoder and the tag head learn, with the peak learning
    rate ``lr``, on features of the encoder as it then is, and nothing else changes. It is judged by
    the mean average precision of the tags. With no other epochs (``training.epochs = 0``) and
    ``model.init`` it gives a captioner other tags.
    """

    order: Literal["free", "frequent", "rare"] = "free"
    epochs: int = ranged(0, 0, 100_000)
    lr: float = ranged(3e-3, 0.0, 1.0)


@dataclass(frozen=True)
class Config:
    """Everything a run depends on."""

    data: DataConfig = DataConfig()
    preprocessing: Preprocessing = Preprocessing()
    encoder: EncoderConfig = EncoderConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    self_critical: SelfCriticalConfig = SelfCriticalConfig()
    tags: TagsConfig = TagsConfig()
    experimental: ExperimentalConfig = ExperimentalConfig()

    def __post_init__(self) -> None:
        """Check that the sections fit each other."""
        if self.experimental.attention_penalty and not self.model.caption.attention:
            raise ConfigError(
                f"experimental.attention_penalty is {self.experimental.attention_penalty}, "
                "but model.caption.attention is false; one of them must go"
            )


def from_stored(values: Any) -> Config:
    """Return a config that is stored in a checkpoint, also in one of an earlier version.

    This is the one place where the keys of earlier versions are known: each section's ``MOVED``
    says where they are now. A model of before tag heads has none. Raises ``ConfigError``.
    """
    if not isinstance(values, Mapping):
        return from_dict(Config, values)  # which refuses it
    sections = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    if not isinstance(sections.setdefault("experimental", {}), dict):
        return from_dict(Config, {"experimental": sections["experimental"]})  # refused too
    for section in fields(Config):
        stored = sections.get(section.name)
        for key, now in getattr(section.default, "MOVED", {}).items():
            if isinstance(stored, dict) and key in stored:
                to, _, name = now.partition(".")
                sections[to][name] = stored.pop(key)
    if isinstance(model := sections.get("model"), dict):
        model.setdefault("tag_head", "none")  # which models of version 0.1 do not have
    return from_dict(Config, sections)
