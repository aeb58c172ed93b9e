"""The options of a search: what a person may say about captions.

Nothing here imports more than the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from captioner.settings import ConfigError, Ranged, choice, ranged

__all__ = ["SearchOptions", "TagOptions", "meaning", "with_options"]

T = TypeVar("T")


def meaning(option: Field[Any]) -> str:
    """Return what a field of options means, with its range and its source."""
    said: str = option.metadata["help"]
    low, high = option.metadata.get("low"), option.metadata.get("high")
    return said if low is None else f"{said}; {low} to {high}"


def _with_meanings(cls: type[T]) -> type[T]:
    lines = (f"\n    {f.name}: {meaning(f)}" for f in fields(cls))  # type: ignore[arg-type]
    cls.__doc__ = f"{cls.__doc__}{''.join(lines)}\n    "
    return cls


@_with_meanings
@dataclass(frozen=True)
class SearchOptions(Ranged):
    """The options of a search; the command line's flags are made from these fields.

    Words are taken in lower case, and a caption's length counts its words and its end. A value
    out of range is a ``ConfigError`` that names the range, and so are values that contradict each
    other. Each field's meaning, range and source:
    """

    beam_size: int = ranged(
        3, 1, 100, "hypotheses kept at each step; 1 is greedy search (Graves 2012, section 3.2)"
    )
    num_captions: int = ranged(
        1,
        1,
        100,
        "captions for each photograph, at most the beam size unless sampled; fewer if groups agree",
    )
    length_penalty: float = ranged(
        0.7, 0.0, 4.0, "power of the length that a log-probability is divided by"
    )
    max_words: int = ranged(20, 1, 200, "longest caption, in words")
    min_words: int = ranged(0, 0, 200, "shortest caption, in words")
    length_norm: Literal["average", "gnmt"] = choice(
        "average",
        "the length: words + 1, so that penalty 1 gives the average; or (words + 6) / 6 "
        "(Wu et al. 2016, equation 14)",
    )
    no_repeat: int = ranged(
        2, 0, 20, "no run of so many words twice; 0 allows all (Paulus et al. 2018, section 2.5)"
    )
    forbidden: tuple[str, ...] = choice((), "a word that no caption has")
    no_ending: tuple[str, ...] = choice((), "a word that no caption ends on")
    required: tuple[str, ...] = choice(
        (),
        "a word that every caption has; the beam is kept once for each number of them written "
        "(Anderson et al. 2017; Post and Vilar 2018)",
    )
    unknown: bool = choice(False, "let captions have <unk>, which stands for any rare word")
    groups: int = ranged(
        1, 1, 100, "parts of the beam that shun each other's words (Vijayakumar et al. 2016)"
    )
    diversity: float = ranged(
        0.5, 0.0, 100.0, "what a word costs for each time an earlier group says it at that place"
    )
    sample: bool = choice(False, "draw captions by their probability instead of searching")
    temperature: float = ranged(
        1.0, 0.01, 100.0, "of sampling: log-probabilities are divided by it"
    )
    top_k: int = ranged(
        0, 0, 1_000_000, "of sampling: so many words to draw from (Fan et al. 2018); 0 is all"
    )
    top_p: float = ranged(
        1.0,
        0.0,
        1.0,
        "of sampling: draw from the fewest words that reach it (Holtzman et al. 2020)",
    )
    seed: int = ranged(
        0, 0, 2**31 - 1, "of sampling: the same number gives the same captions, in any batch"
    )

    def __post_init__(self) -> None:
        """Check every range, and that the values fit each other."""
        super().__post_init__()
        for option in fields(self):
            if isinstance(option.default, tuple):
                words = _words(option.name, getattr(self, option.name))
                object.__setattr__(self, option.name, words)
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


@_with_meanings
@dataclass(frozen=True)
class TagOptions(Ranged):
    """What a person may say about which tags are given; flags are made from it.

    Names are those of the model's tags. A value out of range is a ``ConfigError``. Each field's
    meaning and range:
    """

    threshold: float | None = choice(
        None, "lowest score of a tag; by default that of the best F1 on the validation photographs"
    )
    min_precision: float | None = choice(
        None, "share of the tags that is to be right, 0 to 1: it sets the lowest score"
    )
    max_tags: int = ranged(
        0, 0, 100_000, "most tags of a photograph, those that say most of it; 0 is all"
    )
    only: tuple[str, ...] = choice((), "a tag to give, and no other")
    exclude: tuple[str, ...] = choice((), "a tag not to give")

    def __post_init__(self) -> None:
        """Check every range, and that the values fit each other."""
        super().__post_init__()
        if self.min_precision is not None and not 0.0 <= self.min_precision <= 1.0:
            raise ConfigError(f"min_precision is {self.min_precision}; it takes 0 to 1")
        if self.threshold is not None and self.min_precision is not None:
            raise ConfigError("threshold and min_precision both set the lowest score; take one")
        for name in ("only", "exclude"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(n, str) for n in value):
                raise ConfigError(f"{name} is {value!r}; it takes a list of names of tags")
            object.__setattr__(self, name, tuple(dict.fromkeys(value)))


def with_options(options: SearchOptions | None, search: Mapping[str, Any]) -> SearchOptions | None:
    """Return search options with single ones of them replaced; ``None`` and nothing is ``None``.

    Raises ``TypeError`` for one that does not exist.
    """
    known = [field.name for field in fields(SearchOptions)]
    if strange := [name for name in search if name not in known]:
        raise TypeError(f"there is no option {', '.join(strange)}; there are {', '.join(known)}")
    return replace(options or SearchOptions(), **search) if search else options
