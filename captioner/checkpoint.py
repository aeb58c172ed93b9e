"""One safetensors file that is a whole captioner: tensors, config, vocabularies, provenance."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from captioner.config import Config, ConfigError, from_dict, to_dict
from captioner.encoder import Encoder
from captioner.model import CaptionModel
from captioner.tags import Calibration, TagSet
from captioner.vocabulary import SPECIAL, Vocabulary

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "build_model",
    "default_path",
    "load_checkpoint",
    "save_checkpoint",
    "write_tensors",
]

_FORMAT = "captioner 1"
_SCALE = ".scale"


def default_path() -> Path:
    """Return the file of the model inside the package."""
    return Path(str(files("captioner") / "weights" / "default.safetensors"))


class CheckpointError(ValueError):
    """A file that is no captioner checkpoint; the message names the file and what is wrong."""


@dataclass
class Checkpoint:
    """A model with all it needs to be used, and where it comes from."""

    model: CaptionModel
    config: Config
    vocabulary: Vocabulary
    tags: TagSet
    calibration: Calibration = field(default_factory=Calibration)
    provenance: dict[str, Any] = field(default_factory=dict)


def build_model(config: Config, vocabulary: Vocabulary, tags: TagSet) -> CaptionModel:
    """Return the model of a config, at random weights."""
    encoder = Encoder(config.encoder.name, config.preprocessing)
    return CaptionModel(config.model, encoder, len(vocabulary), len(tags.vocabulary))


def save_checkpoint(checkpoint: Checkpoint, path: Path, storage: str = "float32") -> None:
    """Write a checkpoint to a temporary name, then move it into place.

    ``storage`` is "float32", "float16" or "int8": matrices and convolutions as int8 with one
    float32 scale an output row, the rest in float16.
    """
    metadata = {
        "config": to_dict(checkpoint.config),
        "vocabulary": checkpoint.vocabulary.words[len(SPECIAL) :],
        "tags": checkpoint.tags.vocabulary.words[len(SPECIAL) :],
        "calibration": [checkpoint.calibration.slope, checkpoint.calibration.offset],
        "provenance": checkpoint.provenance,
    }
    tensors = _stored(dict(checkpoint.model.named_parameters()), storage)
    tensors |= _stored(dict(checkpoint.model.named_buffers()), storage)
    write_tensors(tensors, path, {"format": _FORMAT, "captioner": json.dumps(metadata)})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stored(tensors: Mapping[str, Tensor], storage: str) -> dict[str, Tensor]:
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if storage == "int8" and tensor.ndim > 1:
            rows = tensor.flatten(1)
            scale = rows.abs().amax(dim=1).clamp(min=1e-12) / 127.0
            stored[name] = (rows / scale[:, None]).round().to(torch.int8).view(tensor.shape)
            stored[name + _SCALE] = scale
        elif storage != "float32" and tensor.is_floating_point():
            stored[name] = tensor.half()
        else:
            stored[name] = tensor
    return stored


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; ``CheckpointError`` for anything that is not one. Nothing is executed."""
    metadata, tensors = _read(path)
    try:
        config = from_dict(Config, metadata["config"])
        vocabulary, tags = Vocabulary(metadata["vocabulary"]), TagSet(metadata["tags"])
        calibration = Calibration(*map(float, metadata["calibration"]))
        provenance = dict(metadata["provenance"])
        with torch.device("meta"):  # no time is spent on random weights
            model = build_model(config, vocabulary, tags)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: its metadata is not captioner's: {error}") from error
    _assign(model, tensors, path)
    return Checkpoint(model.eval(), config, vocabulary, tags, calibration, provenance)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            if stored.get("format") != _FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of captioner's")
            metadata = json.loads(stored["captioner"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    return metadata, tensors


def _assign(model: CaptionModel, tensors: dict[str, Tensor], path: Path) -> None:
    for name in [name for name in tensors if name.endswith(_SCALE)]:
        scale = tensors.pop(name)
        weight = tensors[name.removesuffix(_SCALE)].float()
        tensors[name.removesuffix(_SCALE)] = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if name in expected else "has no place in the model"
        raise CheckpointError(f"{path}: the tensor {name!r} {problem}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise CheckpointError(f"{path}: the tensor {name!r} has the shape {shapes}")
        if tensor.dtype == torch.float16:
            tensors[name] = tensor.float()
    model.load_state_dict(tensors, strict=False, assign=True)
    for decoder in (model.caption_decoder, model.tag_decoder):
        decoder.tie()
