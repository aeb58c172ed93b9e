"""Where and how exactly a model computes: the device, and the precision of its products."""

from __future__ import annotations

import torch

from captioner.settings import ConfigError

__all__ = ["autocast", "choose_device", "choose_precision"]


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
