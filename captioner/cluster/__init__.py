"""Runs over many photographs on a Ray cluster. Ray is imported when a name here is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captioner.cluster.run import ClusterError, describe_dataset

__all__ = ["ClusterError", "describe_dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.run"), name)
    except ModuleNotFoundError as error:
        needed = 'a run on a cluster needs an extra: pip install "captioner[ray]"'
        raise ImportError(f"{needed} ({error})") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
