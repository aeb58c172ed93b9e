"""Where and how exactly a model computes: the device, and the precision of its products."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from captioner.held import Held
from captioner.settings import ConfigError

__all__ = ["autocast", "choose_device", "choose_precision", "own_settings"]

_FLOAT32 = Held(torch.get_default_dtype, torch.set_default_dtype, torch.float32)

# The process that computed last: this one, or the one that it was forked from.
_computing: int | None = None


def choose_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the best there is.

    Raises ``ConfigError`` for a device that this machine does not have.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, is_there in there.items() if is_there)
    if name not in there:
        raise ConfigError(f"device is {name!r}; it takes auto, {', '.join(there)}")
    if not there[name]:
        raise ConfigError(f"this machine has no {name} device that torch can use")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the number type of a precision; "auto" is bfloat16 where the processor gains by it.

    Raises ``ConfigError`` for another name.
    """
    if name not in {"auto", "float32", "bfloat16"}:
        raise ConfigError(f"precision is {name!r}; it takes auto, float32 or bfloat16")
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if gains else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which products are computed in a precision; float32 changes nothing."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def own_settings() -> Iterator[None]:
    """Build and compute under our own settings of torch, whatever those of the caller are.

    The default dtype is float32 (in all threads of the process, as torch has one for all), the
    default device is the CPU, and autocast is off. In a process that was forked from one that
    computed, torch has one thread from then on. A fork has none of its parent's threads, and
    OpenMP would wait for them for ever.
    """
    global _computing
    if _computing not in (None, os.getpid()):
        torch.set_num_threads(1)
    _computing = os.getpid()
    with ExitStack() as stack:
        stack.enter_context(_FLOAT32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
