"""One safetensors file that is a whole captioner: tensors, config, vocabularies, provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captioner.config import Config, from_stored
from captioner.data.calibration import Calibration, Confidence, TagScoring
from captioner.data.tags import TagSet
from captioner.data.vocabulary import SPECIAL, Vocabulary
from captioner.files import as_json, from_json, replacing
from captioner.model.device import own_settings
from captioner.model.encoder import Encoder
from captioner.model.model import CaptionModel
from captioner.model.quantization import Ranges, int8_rows
from captioner.settings import to_dict

__all__ = [
    "SCALE",
    "Checkpoint",
    "CheckpointError",
    "build_model",
    "default_path",
    "load_checkpoint",
    "save_checkpoint",
    "stored_tensors",
    "write_tensors",
]

_FORMAT = "captioner 1"

SCALE = ".scale"
"""The name of an int8 tensor's scales is the tensor's and this."""

# No trained weight comes near it; what is multiplied with a larger one soon is infinite.
_LARGEST_WEIGHT = 1e9

# What a person has to say of a model is a few kB; `captioner info` shows all of it.
_MOST_PROVENANCE = 1 << 20
_MOST_METADATA = 64 << 20


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
    scoring: TagScoring | None = None
    """How tags get scores; ``None`` for a model that has only the calibration of version 0.1."""
    confidence: Confidence | None = None
    """How sure a caption is; ``None`` for a model that was not validated with it."""
    ranges: Ranges | None = None
    """The ranges of the encoder's activations that int8 takes; ``None`` before a calibration."""
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
        "tag_frequencies": checkpoint.tags.frequencies,
        "calibration": [checkpoint.calibration.slope, checkpoint.calibration.offset],
        "provenance": checkpoint.provenance,
    }
    if checkpoint.tags.forms is not None:
        metadata["tag_forms"] = [checkpoint.tags.forms[name] for name in checkpoint.tags.names]
    if checkpoint.scoring is not None:
        metadata["tag_scoring"] = asdict(checkpoint.scoring)
    if checkpoint.confidence is not None:
        metadata["confidence"] = checkpoint.confidence.weights
    if checkpoint.ranges is not None:
        metadata["activation_ranges"] = checkpoint.ranges
    tensors = stored_tensors(checkpoint.model, storage)
    write_tensors(tensors, path, {"format": _FORMAT, "captioner": json.dumps(metadata)})


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file whole or not at all; the same gives the same, byte for byte."""
    content = save(tensors, metadata)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # safetensors writes metadata in an order of chance.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(str(path)) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[8 + length :])


def stored_tensors(model: CaptionModel, storage: str) -> dict[str, Tensor]:
    """Return a model's tensors by name, as a file of a storage holds them."""
    tensors: Mapping[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if storage == "int8" and tensor.ndim > 1:
            stored[name], stored[name + SCALE] = int8_rows(tensor)
        elif storage != "float32" and tensor.is_floating_point():
            stored[name] = tensor.half()
        else:
            stored[name] = tensor
    return stored


@own_settings()
def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; ``CheckpointError`` for anything that is not one. Nothing is executed."""
    metadata, tensors = _read(path)
    try:
        checkpoint = _from_metadata(metadata)
        _assign(checkpoint.model, _restored(tensors))
    except (
        ArithmeticError,
        AttributeError,
        KeyError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = f"it has no {reason}" if isinstance(error, KeyError) else reason
        raise CheckpointError(f"{path}: not a checkpoint of captioner's: {reason}") from error
    return checkpoint


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            if stored.get("format") != _FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of captioner's")
            if len(stored["captioner"]) > _MOST_METADATA:
                raise ValueError(f"its metadata has more than {_MOST_METADATA:,} bytes")
            metadata = from_json(stored["captioner"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a safetensors file: {reason}") from error
    return metadata, tensors


def _from_metadata(metadata: dict[str, Any]) -> Checkpoint:
    config = from_stored(metadata["config"])
    frequencies = [float(share) for share in metadata["tag_frequencies"]]
    names = _strings(metadata["tags"])
    tags = TagSet(names, frequencies, _forms(names, metadata.get("tag_forms")))
    vocabulary = Vocabulary(_strings(metadata["vocabulary"]))
    slope, offset = map(float, metadata["calibration"])
    provenance = dict(metadata["provenance"])
    if len(as_json(provenance)) > _MOST_PROVENANCE:
        raise ValueError(f"its provenance has more than {_MOST_PROVENANCE:,} bytes")
    model = _without_weights(config, vocabulary, tags)
    calibration = Calibration(slope, offset)
    scoring = TagScoring.of(metadata.get("tag_scoring"))
    weights = metadata.get("confidence")
    confidence = None if weights is None else Confidence(tuple(map(float, weights)))
    return Checkpoint(
        model.eval(),
        config,
        vocabulary,
        tags,
        calibration,
        scoring,
        confidence,
        _ranges(metadata.get("activation_ranges")),
        provenance,
    )


def _ranges(stored: Any) -> Ranges | None:
    if stored is None:
        return None
    ranges = {name: (float(low), float(high)) for name, (low, high) in stored.items()}
    for name, (low, high) in ranges.items():
        if not -_LARGEST_WEIGHT < low <= 0.0 < high < _LARGEST_WEIGHT:
            raise ValueError(f"the activations of {name!r} range from {low:g} to {high:g}")
    return ranges


def _forms(names: Sequence[str], stored: Any) -> dict[str, list[str]] | None:
    if stored is None:
        return None
    return {name: _strings(forms) for name, forms in zip(names, stored, strict=True)}


class _Undrawn(TorchFunctionMode):
    """A context in which no weights are drawn from a normal distribution.

    The meta device holds no numbers, but there ``normal_`` would import torch's compiler, which
    takes as long as importing torch.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch, unless it is that one."""
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def _without_weights(config: Config, vocabulary: Vocabulary, tags: TagSet) -> CaptionModel:
    """Return a model whose every tensor is still to be assigned."""
    try:
        with torch.device("meta"), _Undrawn():  # no time is spent on random weights
            return build_model(config, vocabulary, tags)
    except NotImplementedError:
        # RegNet computes how wide it is with tensors, which must then have values.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return build_model(config, vocabulary, tags)


def _strings(values: object) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError("its vocabulary is not a list of words")
    for value in values:
        if not value.strip():
            raise ValueError(f"its vocabulary has {value!r}, which is no word")
    return values


def _restored(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are computed with: int8 times its scales, halves as floats."""
    tensors = {name: t for name, t in stored.items() if not name.endswith(SCALE)}
    for name, tensor in tensors.items():
        scale = stored.get(name + SCALE)
        if scale is not None:
            if scale.shape != tensor.shape[:1] or tensor.dtype != torch.int8:
                raise ValueError(f"the scale of {name!r} does not fit it")
            tensors[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1)).float()
        elif tensor.dtype in (torch.float16, torch.float32):
            # A product is rounded by where its weights begin in memory, and a file aligns nothing.
            tensors[name] = tensor.to(torch.float32, copy=True)
        _check_values(name, tensors[name])
    return tensors


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"the tensor {name!r} holds numbers that are not finite")
    if tensor.is_floating_point() and tensor.numel() > 0:
        smallest, largest = (float(extreme) for extreme in tensor.aminmax())
        if max(-smallest, largest) > _LARGEST_WEIGHT:
            raise ValueError(f"the tensor {name!r} holds numbers up to {max(-smallest, largest):g}")
        if name.endswith("running_var") and smallest < 0.0:
            raise ValueError(f"the tensor {name!r} holds a negative variance, {smallest:g}")


def _assign(model: CaptionModel, tensors: dict[str, Tensor]) -> None:
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if name in expected else "has no place in the model"
        raise ValueError(f"the tensor {name!r} {problem}")
    for name, tensor in tensors.items():
        wanted = expected[name]
        if (tensor.shape, tensor.dtype) != (wanted.shape, wanted.dtype):
            found, needed = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, wanted))
            raise ValueError(f"the tensor {name!r} is {found}, not {needed}")
    # Not strict: a tensor that two modules share has one name here, and two in a state dict.
    model.load_state_dict(tensors, strict=False, assign=True)
    for decoder in (model.caption_decoder, model.tag_decoder):
        decoder.tie()
