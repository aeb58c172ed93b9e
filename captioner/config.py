"""Everything that a training run can set: typed, with defaults and ranges.

Nothing here imports more than the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from captioner.settings import ConfigError, Ranged, ranged

__all__ = [
    "Config",
    "DataConfig",
    "DataSource",
    "DecoderConfig",
    "EncoderConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Preprocessing",
    "SelfCriticalConfig",
    "TrainingConfig",
]


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
    and those of the data are added.
    """

    grid_width: int = ranged(512, 1, 8192)
    grid_dropout: float = ranged(0.2, 0.0, 0.95)
    caption: DecoderConfig = DecoderConfig()
    tags: DecoderConfig = DecoderConfig(embedding=256, hidden=256, attention_width=128)
    init: str = ""


@dataclass(frozen=True)
class OptimizerConfig(Ranged):
    """AdamW; learning rates rise over ``warmup_steps``, then fall.

    Either as a "cosine" to 0, or on a "plateau": by ``plateau_decay`` after each
    ``plateau_patience`` evaluations of a stage without a better CIDEr-D. ``clip_norm`` bounds the
    gradient's norm at each step; where ``clip_value`` is not 0, each of its entries is bounded
    instead.
    """

    lr: float = ranged(1e-3, 0.0, 1.0)
    encoder_lr: float = ranged(1e-4, 0.0, 1.0)
    weight_decay: float = ranged(1e-4, 0.0, 1.0)
    clip_norm: float = ranged(5.0, 1e-6, 1e6)
    clip_value: float = ranged(0.0, 0.0, 1e6)
    warmup_steps: int = ranged(100, 0, 10_000_000)
    schedule: Literal["cosine", "plateau"] = "cosine"
    plateau_patience: int = ranged(2, 1, 1_000)
    plateau_decay: float = ranged(0.5, 0.0, 1.0)


@dataclass(frozen=True)
class TrainingConfig(Ranged):
    """Epochs and batches; the encoder stays frozen for the first ``frozen_epochs``.

    While it is frozen its features are computed once and kept, in the folder ``features``, which
    several runs may share, or in the run folder if that is empty. ``batch_size`` counts the
    photographs of a step, each with all its captions, over all processes; ``accumulation`` is in
    how many parts, one after the other, each process reads its share. ``augment`` shows each
    photograph in another view and light every epoch (:func:`captioner.photos.images.augment`)
    once the encoder learns. ``ema`` is the share that the moving average of the weights keeps of
    itself at each step; where it is not 0, the average is what is validated and saved.

    ``own_words`` is the share of words that the decoder reads from itself at the end of teacher
    forcing, rising from 0 (scheduled sampling: Bengio et al. 2015). ``attention_penalty`` weighs
    the doubly stochastic term of Xu et al. (2015), equation 14. ``truncation`` is after how many
    positions gradients stop going back through the state, 0 for never.

    The validation split is captioned every ``validate_every`` steps, or, at 0, after each epoch;
    after ``patience`` times without a better CIDEr-D a stage ends early (0: never). ``precision``
    is that of the forward pass. ``tensorboard`` also writes what is logged for TensorBoard, which
    the extra of that name installs.
    """

    epochs: int = ranged(15, 0, 100_000)
    frozen_epochs: int = ranged(5, 0, 100_000)
    batch_size: int = ranged(32, 1, 100_000)
    accumulation: int = ranged(1, 1, 100_000)
    label_smoothing: float = ranged(0.1, 0.0, 0.9)
    own_words: float = ranged(0.0, 0.0, 1.0)
    attention_penalty: float = ranged(0.0, 0.0, 1e3)
    truncation: int = ranged(0, 0, 1_000)
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


@dataclass(frozen=True)
class SelfCriticalConfig(Ranged):
    """The last stage: the caption decoder learns from the scores of captions that it draws.

    It comes after teacher forcing, on features of the encoder as it then is, for ``epochs``.
    ``samples`` captions a photograph are drawn from the logits over ``temperature``, which is part
    of what is learnt. The reward is CIDEr-D, and for ``bleu_weight`` of it BLEU-4.
    """

    epochs: int = ranged(0, 0, 100_000)
    samples: int = ranged(5, 2, 1_000)
    temperature: float = ranged(0.4, 0.01, 100.0)
    lr: float = ranged(5e-5, 0.0, 1.0)
    bleu_weight: float = ranged(0.0, 0.0, 1.0)


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

    def __post_init__(self) -> None:
        """Check that the sections fit each other."""
        if self.training.attention_penalty and not self.model.caption.attention:
            raise ConfigError(
                f"training.attention_penalty is {self.training.attention_penalty}, "
                "but model.caption.attention is false; one of them must go"
            )
