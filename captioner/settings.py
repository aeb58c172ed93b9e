"""From TOML and the command line to dataclasses whose every mistake is named.

Nothing here imports more than the standard library, so that ``--help`` is quick.
"""

from __future__ import annotations

import reprlib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "ConfigError",
    "Ranged",
    "choice",
    "from_dict",
    "from_overrides",
    "load_config",
    "ranged",
    "shown",
    "to_dict",
]

T = TypeVar("T")


class ConfigError(ValueError):
    """An unknown key, a wrong type or a value out of range; the message names the key."""


class _Short(reprlib.Repr):
    """The short forms of :func:`shown`."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out an integer of more than 4,300 digits.
        return repr(x) if x.bit_length() <= 64 else f"a number of {x.bit_length():,} bits"


_SHORT = _Short()


def shown(value: object) -> str:
    """Return a wrong value as a message shows it: short, however long, deep or large it is."""
    return _SHORT.repr(value)


def ranged(default: Any, low: float, high: float, help: str = "") -> Any:
    """Return a field that takes ``low`` to ``high``; ``help`` is what it means."""
    return field(default=default, metadata={"low": low, "high": high, "help": help})


def choice(default: Any, help: str) -> Any:
    """Return a field without a range; ``help`` is what it means."""
    return field(default=default, metadata={"help": help})


class Ranged:
    """A dataclass whose fields made by :func:`ranged` are checked."""

    def __post_init__(self) -> None:
        """Check every range."""
        for option in fields(self):  # type: ignore[arg-type]
            if "low" not in option.metadata:
                continue
            value: Any = getattr(self, option.name)
            low, high = option.metadata["low"], option.metadata["high"]
            number = Integral if isinstance(option.default, int) else Real
            if not isinstance(value, number):
                kind = "whole numbers" if number is Integral else "numbers"
                raise ConfigError(
                    f"{option.name} is {shown(value)}; it takes {kind}, {low} to {high}"
                )
            if not low <= value <= high:
                raise ConfigError(f"{option.name} is {shown(value)}; it takes {low} to {high}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain dicts, lists and values."""
    return asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass; ``ConfigError`` names an unknown key or a wrong type."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a table of keys, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            now = getattr(cls, "MOVED", {}).get(key)
            hint = f"it is {now!r} now" if now else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown key {where + key!r}; {hint}")
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
            value = _from_toml(f"x = {self}")["x"]
        except ValueError:
            return str(self)
        return str(self) if hint is str and not isinstance(value, str) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, _Text):
        value = value.parsed(hint)
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where!r} is a table of keys, not {shown(value)}")
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            allowed = ", ".join(map(repr, typing.get_args(hint)))
            raise ConfigError(f"{where!r} is {shown(value)}; it takes {allowed}")
        return value
    if typing.get_origin(hint) is tuple:
        return _convert_list(typing.get_args(hint), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where!r} is {shown(value)}; no float is so large") from None
    if type(value) is not hint:
        raise ConfigError(f"{where!r} is {shown(value)}; it takes a value of type {hint.__name__}")
    return value


def _convert_list(inner: Sequence[Any], value: Any, where: str) -> tuple[Any, ...]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if inner[-1] is Ellipsis:
        if not is_list:
            raise ConfigError(f"{where!r} is {shown(value)}; it takes a list")
        inner = [inner[0]] * len(value)
    elif not is_list or len(value) != len(inner):
        raise ConfigError(f"{where!r} is {shown(value)}; it takes {len(inner)} values")
    return tuple(
        _convert(hint, item, f"{where}.{index}")
        for index, (hint, item) in enumerate(zip(inner, value, strict=True))
    )


def _from_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text; raises ``ValueError``, also for deep nesting."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def load_config(cls: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """Build a config dataclass from TOML; each override is a ``section.key=value``.

    A table of a list is named by its place from 0: ``data.sources.0.images=…``. The value of an
    override is TOML where it parses as TOML, otherwise a string. Raises
    ``ConfigError`` for a file that is not TOML, an unknown key or a wrong type.
    """
    try:
        values = _from_toml(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    for override in overrides:
        _override(values, override)
    return from_dict(cls, values)


def from_overrides(cls: type[T], overrides: Sequence[str]) -> T:
    """Build a config dataclass from overrides alone, as :func:`load_config` takes them."""
    values: dict[str, Any] = {}
    for override in overrides:
        _override(values, override)
    return from_dict(cls, values)


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
