"""Where and how exactly a model computes: the device, and the precision of its products."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from captioner.held import Held
from captioner.model.quantization import has_int8_products
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


def choose_precision(name: str, device: torch.device, calibrated: bool = False) -> torch.dtype:
    """Return the number type of a precision.

    "auto" is bfloat16 where the processor has instructions for it, else int8 if it has those and
    the model was calibrated for it, else float32.

    Args:
        name: "auto", "float32" or "bfloat16" and, for inference, "int8".
        device: Where the model computes.
        calibrated: Whether the model has the ranges that int8 takes.

    Raises:
        ConfigError: There is no such precision, or not with this device, processor or model.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    if name not in {"auto", *named}:
        raise ConfigError(f"precision is {name!r}; it takes auto, {', '.join(named)}")
    if name == "int8":
        _need_int8(device, calibrated)
    if name != "auto":
        return named[name]
    if device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        gains = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    if gains:
        return torch.bfloat16
    return torch.int8 if calibrated and _lacks_for_int8(device) is None else torch.float32


def _need_int8(device: torch.device, calibrated: bool) -> None:
    lack = _lacks_for_int8(device)
    if lack is None and not calibrated:
        lack = (
            "the model has no ranges for it: make a copy that has, export.py --calibration PHOTOS"
        )
    if lack is not None:
        raise ConfigError(f"precision is 'int8', but {lack}")


def _lacks_for_int8(device: torch.device) -> str | None:
    """Return what a machine lacks to compute in int8, if anything."""
    if device.type != "cpu":
        return f"a {device.type} device computes in bfloat16 or float32 here"
    if not has_int8_products():
        return "this processor has no exact products of int8 (VNNI)"
    return None


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
