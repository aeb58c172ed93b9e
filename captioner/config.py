"""Everything that can be set: typed, with defaults and ranges; training runs read it from TOML.

Nothing here imports more than the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "DataSource",
    "DecoderConfig",
    "EncoderConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Preprocessing",
    "SearchOptions",
    "SelfCriticalConfig",
    "TrainingConfig",
    "from_dict",
    "load_config",
    "meaning",
    "to_dict",
]

T = TypeVar("T")


class ConfigError(ValueError):
    """An unknown key, a wrong type or a value out of range; the message names the key."""


def _ranged(default: Any, low: float, high: float, help: str = "") -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def _choice(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


class _Ranged:
    """A dataclass whose fields made by ``_ranged`` are checked."""

    def __post_init__(self) -> None:
        for option in fields(self):  # type: ignore[arg-type]
            if "low" not in option.metadata:
                continue
            value: Any = getattr(self, option.name)
            low, high = option.metadata["low"], option.metadata["high"]
            number = Integral if isinstance(option.default, int) else Real
            if not isinstance(value, number):
                kind = "whole numbers" if number is Integral else "numbers"
                raise ConfigError(f"{option.name} is {value!r}; it takes {kind}, {low} to {high}")
            if not low <= value <= high:
                raise ConfigError(f"{option.name} is {value}; it takes {low} to {high}")


def meaning(option: Field[Any]) -> str:
    """Return what a field of ``SearchOptions`` means, with its range and its source."""
    said: str = option.metadata["help"]
    low, high = option.metadata.get("low"), option.metadata.get("high")
    return said if low is None else f"{said}; {low} to {high}"


def _with_meanings(cls: type[T]) -> type[T]:
    lines = (f"\n    {f.name}: {meaning(f)}" for f in fields(cls))  # type: ignore[arg-type]
    cls.__doc__ = f"{cls.__doc__}{''.join(lines)}\n    "
    return cls


@_with_meanings
@dataclass(frozen=True)
class SearchOptions(_Ranged):
    """What a person may say about a search; the command line's flags are made from it.

    Words are taken in lower case, and a caption's length counts its words and its end. A value
    out of range is a ``ConfigError`` that names the range, and so are values that contradict each
    other. Each field's meaning, range and source:
    """

    beam_size: int = _ranged(
        3, 1, 100, "hypotheses kept at each step; 1 is greedy search (Graves 2012, section 3.2)"
    )
    num_captions: int = _ranged(
        1,
        1,
        100,
        "captions for each photograph, at most the beam size unless sampled; fewer if groups agree",
    )
    length_penalty: float = _ranged(
        0.7, 0.0, 4.0, "power of the length that a log-probability is divided by"
    )
    max_words: int = _ranged(20, 1, 200, "longest caption, in words")
    min_words: int = _ranged(0, 0, 200, "shortest caption, in words")
    length_norm: Literal["average", "gnmt"] = _choice(
        "average",
        "the length: words + 1, so that penalty 1 gives the average; or (words + 6) / 6 "
        "(Wu et al. 2016, equation 14)",
    )
    no_repeat: int = _ranged(
        0, 0, 20, "no run of so many words twice; 0 allows all (Paulus et al. 2018, section 2.5)"
    )
    forbidden: tuple[str, ...] = _choice((), "a word that no caption has")
    no_ending: tuple[str, ...] = _choice((), "a word that no caption ends on")
    required: tuple[str, ...] = _choice(
        (),
        "a word that every caption has; the beam is kept once for each number of them written "
        "(Anderson et al. 2017; Post and Vilar 2018)",
    )
    unknown: bool = _choice(False, "let captions have <unk>, which stands for any rare word")
    groups: int = _ranged(
        1, 1, 100, "parts of the beam that shun each other's words (Vijayakumar et al. 2016)"
    )
    diversity: float = _ranged(
        0.5, 0.0, 100.0, "what a word costs for each time an earlier group says it at that place"
    )
    sample: bool = _choice(False, "draw captions by their probability instead of searching")
    temperature: float = _ranged(
        1.0, 0.01, 100.0, "of sampling: log-probabilities are divided by it"
    )
    top_k: int = _ranged(
        0, 0, 1_000_000, "of sampling: so many words to draw from (Fan et al. 2018); 0 is all"
    )
    top_p: float = _ranged(
        1.0,
        0.0,
        1.0,
        "of sampling: draw from the fewest words that reach it (Holtzman et al. 2020)",
    )
    seed: int = _ranged(
        0, 0, 2**31 - 1, "of sampling: the same number gives the same captions, in any batch"
    )

    def __post_init__(self) -> None:
        """Check every range, and that the values fit each other."""
        super().__post_init__()
        for name in ("forbidden", "no_ending", "required"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        if self.length_norm not in ("average", "gnmt"):
            raise ConfigError(f"length_norm is {self.length_norm!r}; it takes average or gnmt")
        for wrong, message in self._contradictions():
            if wrong:
                raise ConfigError(message)

    def _contradictions(self) -> Iterator[tuple[object, str]]:
        beam, most = self.beam_size, self.max_words
        yield (
            self.num_captions > beam and not self.sample,
            f"num_captions is {self.num_captions}; it takes at most beam_size, {beam}",
        )
        yield (
            beam % self.groups,
            f"groups is {self.groups}; it takes a number that divides beam_size, {beam}",
        )
        yield (
            self.min_words > most,
            f"min_words is {self.min_words}; it takes at most max_words, {most}",
        )
        yield (
            len(self.required) > most,
            f"required has {len(self.required)} words; it takes at most max_words, {most}",
        )
        both = sorted({*self.required} & {*self.forbidden})
        yield both, f"a word is both required and forbidden: {', '.join(both)}"
        yield (
            self.sample and (self.required or self.groups > 1),
            "sample draws each caption alone; it goes with neither required words nor groups",
        )


def _words(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise ConfigError(f"{name} is {value!r}; it takes a list of words")
    return tuple(dict.fromkeys(word.lower() for word in value))


@dataclass(frozen=True)
class Preprocessing(_Ranged):
    """How a photograph becomes pixels; saved in the checkpoint, the same for every use.

    ``squash`` scales the whole photograph to ``size`` x ``size`` pixels, whatever its shape;
    ``crop`` scales its shorter side to ``size`` and keeps the middle. ``mean`` and ``std`` are of
    the channels R, G, B in 0…1.
    """

    size: int = _ranged(224, 32, 2048)
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
class DataSource(_Ranged):
    """One of several sources of training data; the fields are those of :class:`DataConfig`.

    An epoch shows each of its photographs ``weight`` times: 2 is twice, 0.5 a random half of them.
    """

    images: str = ""
    captions: str = ""
    instances: str = ""
    split: str = ""
    weight: float = _ranged(1.0, 0.001, 1000.0)


@dataclass(frozen=True)
class DataConfig(_Ranged):
    """Where the photographs and captions are, and which words are kept.

    ``captions`` may be COCO, Karpathy, JSONL, CSV or Flickr8k's ``token.txt``; ``split`` as in
    :func:`captioner.readers.read`. The ``val_…`` fields default to the training ones. Several
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
    vocabulary_size: int = _ranged(10_000, 5, 1_000_000)
    min_count: int = _ranged(3, 1, 1_000_000)
    tag_size: int = _ranged(1_000, 1, 1_000_000)
    tag_min_count: int = _ranged(10, 1, 1_000_000)
    max_words: int = _ranged(18, 1, 200)

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
class EncoderConfig(_Ranged):
    """The backbone: a torchvision name, and its weights.

    ``weights`` is "imagenet" (torchvision's download), "default" (the encoder of the embedded
    model), "random", or a file of torchvision's state dict. The first ``frozen_blocks`` modules of
    the backbone do not learn end to end either.
    """

    name: str = "mobilenet_v2"
    weights: str = "imagenet"
    frozen_blocks: int = _ranged(0, 0, 1_000)


@dataclass(frozen=True)
class DecoderConfig(_Ranged):
    """Sizes of one decoder: embedding E, hidden H, attention A; ``dropout`` in 0…1.

    ``attention = false`` is Show and Tell's plain form, ``tied`` shares the embedding with the
    output. ``cell`` is what recurs; the plain tanh "rnn" is there to compare with.
    """

    embedding: int = _ranged(512, 1, 8192)
    hidden: int = _ranged(512, 1, 8192)
    attention: bool = True
    attention_width: int = _ranged(256, 1, 8192)
    tied: bool = True
    dropout: float = _ranged(0.5, 0.0, 0.95)
    cell: Literal["lstm", "gru", "rnn"] = "lstm"


@dataclass(frozen=True)
class ModelConfig(_Ranged):
    """The grid width D that both decoders see, its dropout in 0…1, and the two decoders.

    ``init`` is a checkpoint to start from, or "default" for the one in the package. The sizes, the
    backbone and the preprocessing are then those of the checkpoint where the config does not say
    the same; only dropout and ``preprocessing.size`` may be others. Its words and tags are kept,
    and those of the data are added.
    """

    grid_width: int = _ranged(512, 1, 8192)
    grid_dropout: float = _ranged(0.2, 0.0, 0.95)
    caption: DecoderConfig = DecoderConfig()
    tags: DecoderConfig = DecoderConfig(embedding=256, hidden=256, attention_width=128)
    init: str = ""


@dataclass(frozen=True)
class OptimizerConfig(_Ranged):
    """AdamW; learning rates rise over ``warmup_steps``, then fall.

    Either as a "cosine" to 0, or on a "plateau": by ``plateau_decay`` after each
    ``plateau_patience`` evaluations of a stage without a better CIDEr-D. ``clip_norm`` bounds the
    gradient's norm at each step; where ``clip_value`` is not 0, each of its entries is bounded
    instead.
    """

    lr: float = _ranged(1e-3, 0.0, 1.0)
    encoder_lr: float = _ranged(1e-4, 0.0, 1.0)
    weight_decay: float = _ranged(1e-4, 0.0, 1.0)
    clip_norm: float = _ranged(5.0, 1e-6, 1e6)
    clip_value: float = _ranged(0.0, 0.0, 1e6)
    warmup_steps: int = _ranged(100, 0, 10_000_000)
    schedule: Literal["cosine", "plateau"] = "cosine"
    plateau_patience: int = _ranged(2, 1, 1_000)
    plateau_decay: float = _ranged(0.5, 0.0, 1.0)


@dataclass(frozen=True)
class TrainingConfig(_Ranged):
    """Epochs and batches; the encoder stays frozen for the first ``frozen_epochs``.

    While it is frozen its features are computed once and kept, in the folder ``features``, which
    several runs may share, or in the run folder if that is empty. ``batch_size`` counts the
    photographs of a step, each with all its captions, over all processes; ``accumulation`` is in
    how many parts, one after the other, each process reads its share. ``augment`` shows each
    photograph in another view and light every epoch (:func:`captioner.images.augment`) once the
    encoder learns. ``ema`` is the share that the moving average of the weights keeps of itself at
    each step; where it is not 0, the average is what is validated and saved.

    ``own_words`` is the share of words that the decoder reads from itself at the end of teacher
    forcing, rising from 0 (scheduled sampling: Bengio et al. 2015). ``attention_penalty`` weighs
    the doubly stochastic term of Xu et al. (2015), equation 14. ``truncation`` is after how many
    positions gradients stop going back through the state, 0 for never.

    The validation split is captioned every ``validate_every`` steps, or, at 0, after each epoch;
    after ``patience`` times without a better CIDEr-D a stage ends early (0: never). ``precision``
    is that of the forward pass. ``tensorboard`` also writes what is logged for TensorBoard, which
    the extra of that name installs.
    """

    epochs: int = _ranged(15, 0, 100_000)
    frozen_epochs: int = _ranged(5, 0, 100_000)
    batch_size: int = _ranged(32, 1, 100_000)
    accumulation: int = _ranged(1, 1, 100_000)
    label_smoothing: float = _ranged(0.1, 0.0, 0.9)
    own_words: float = _ranged(0.0, 0.0, 1.0)
    attention_penalty: float = _ranged(0.0, 0.0, 1e3)
    truncation: int = _ranged(0, 0, 1_000)
    tag_weight: float = _ranged(0.5, 0.0, 100.0)
    augment: bool = True
    ema: float = _ranged(0.0, 0.0, 0.99999)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    features: str = ""
    seed: int = _ranged(0, 0, 2**31 - 1)
    save_every: int = _ranged(100, 1, 10_000_000)
    validate_every: int = _ranged(0, 0, 10_000_000)
    patience: int = _ranged(0, 0, 100_000)
    beam_size: int = _ranged(3, 1, 100)
    tensorboard: bool = False


@dataclass(frozen=True)
class SelfCriticalConfig(_Ranged):
    """The last stage: the caption decoder learns from the scores of captions that it draws.

    It comes after teacher forcing, on features of the encoder as it then is, for ``epochs``.
    ``samples`` captions a photograph are drawn from the logits over ``temperature``, which is part
    of what is learnt. The reward is CIDEr-D, and for ``bleu_weight`` of it BLEU-4.
    """

    epochs: int = _ranged(0, 0, 100_000)
    samples: int = _ranged(5, 2, 1_000)
    temperature: float = _ranged(0.4, 0.01, 100.0)
    lr: float = _ranged(5e-5, 0.0, 1.0)
    bleu_weight: float = _ranged(0.0, 0.0, 1.0)


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


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and values."""
    return asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass; ``ConfigError`` names an unknown key or a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a table of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {where + key!r}; known here: {', '.join(known)}")
    converted = {key: _convert(hints[key], value, where + key) for key, value in values.items()}
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}{error}") from None


class _Text(str):
    """A value as it stands on the command line."""

    def parsed(self, hint: Any) -> Any:
        """Return it as TOML, or as it is where a string is wanted or it is no TOML."""
        try:
            value = tomllib.loads(f"x = {self}")["x"]
        except tomllib.TOMLDecodeError:
            return str(self)
        return str(self) if hint is str and not isinstance(value, str) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, _Text):
        value = value.parsed(hint)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a table of keys, not {value!r}")
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            allowed = ", ".join(map(repr, typing.get_args(hint)))
            raise ConfigError(f"{where!r} is {value!r}; it takes {allowed}")
        return value
    if typing.get_origin(hint) is tuple:
        return _convert_list(typing.get_args(hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where!r} is {value!r}; it takes a value of type {hint.__name__}")
    return value


def _convert_list(inner: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if inner[-1] is Ellipsis:
        if not is_list:
            raise ConfigError(f"{where!r} is {value!r}; it takes a list")
        inner = [inner[0]] * len(value)
    elif not is_list or len(value) != len(inner):
        raise ConfigError(f"{where!r} is {value!r}; it takes {len(inner)} values")
    return tuple(
        _convert(hint, item, f"{where}.{index}")
        for index, (hint, item) in enumerate(zip(inner, value, strict=True))
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML config; each override is ``section.key=value`` as on the command line.

    A table of a list is named by its place from 0: ``data.sources.0.images=…``. The value of an
    override is TOML where it parses as TOML, otherwise a string. Raises
    ``ConfigError`` for a file that is not TOML, an unknown key or a wrong type.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return from_dict(Config, values)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes section.key=value, not {override!r}")
    *sections, name = key.split(".")
    for section in sections:
        values = _enter(values, section, key)
    if not isinstance(values, dict):
        raise ConfigError(f"unknown key {key!r}: {name!r} is a table; set one of its keys")
    values[name] = _Text(text)


def _enter(values: Any, section: str, key: str) -> Any:
    if isinstance(values, list):
        if not section.isdecimal() or int(section) >= len(values):
            raise ConfigError(f"unknown key {key!r}: the list has {len(values)} tables, from 0 on")
        inner = values[int(section)]
    else:
        inner = values.setdefault(section, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"unknown key {key!r}: {section!r} is not a section")
    return inner
