"""Checkpoints: what is saved comes back, and what is no checkpoint is refused."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from captioner.data.calibration import Calibration, TagScoring
from captioner.data.tags import TagSet
from captioner.inference import Captioner
from captioner.model.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_model,
    load_checkpoint,
    save_checkpoint,
)
from conftest import TAGS

BIAS, VARIANCE = "projection.0.bias", "encoder.backbone.bn1.running_var"


def test_reload_gives_the_same(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tiny.calibration, tiny.provenance = Calibration(0.7, -0.3), {"data": "drawn"}
    tiny.scoring = TagScoring((0.5, 0.25, -0.1, 0.0), 0.25, ((0.5, 0.2), (0.9, 0.8)))
    tiny.tags = TagSet(TAGS, [0.1] * len(TAGS), {name: [name, f"{name}s"] for name in TAGS})
    save_checkpoint(tiny, path)
    loaded = load_checkpoint(path)
    assert loaded.config == tiny.config
    assert loaded.vocabulary.words == tiny.vocabulary.words
    assert loaded.tags.vocabulary.words == tiny.tags.vocabulary.words
    assert loaded.tags.forms == tiny.tags.forms
    assert loaded.scoring == tiny.scoring
    assert (loaded.calibration.slope, loaded.calibration.offset) == (0.7, -0.3)
    assert loaded.provenance == tiny.provenance
    state = tiny.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in loaded.model.state_dict().items())
    picture = Image.new("RGB", (90, 50), "red")
    assert Captioner(loaded).describe([picture]) == Captioner(tiny).describe([picture])
    tied = loaded.model.caption_decoder
    assert tied.output.weight is tied.embedding.weight
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_an_earlier_version_is_loaded(tiny: Checkpoint, tmp_path: Path) -> None:
    """Its config has keys that were moved since, and none of those that were added."""
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, path)

    def as_before(content: dict[str, Any]) -> None:
        experimental = content["config"].pop("experimental")
        for section, keys in {
            "training": ("own_words", "attention_penalty", "truncation"),
            "optimizer": ("clip_value", "plateau_patience", "plateau_decay"),
            "self_critical": ("bleu_weight",),
        }.items():
            content["config"][section] |= {key: experimental.pop(key) for key in keys}
        assert not experimental

    _metadata(as_before)(path)
    assert load_checkpoint(path).config == tiny.config


def test_a_model_of_version_0_1_still_loads(tiny: Checkpoint, tmp_path: Path) -> None:
    """It has no tag head, no forms and no scoring, and its config says nothing of a head."""
    path = tmp_path / "model.safetensors"
    config = replace(tiny.config, model=replace(tiny.config.model, tag_head="none"))
    old = replace(tiny, config=config, model=build_model(config, tiny.vocabulary, tiny.tags))
    save_checkpoint(old, path)
    _metadata(lambda m: m["config"]["model"].pop("tag_head"))(path)
    loaded = load_checkpoint(path)
    assert loaded.config.model.tag_head == "none"
    assert loaded.model.tag_head is None
    assert loaded.scoring is None
    assert loaded.tags.forms is None


@pytest.mark.parametrize(("storage", "error"), [("float16", 1e-3), ("int8", 1 / 127)])
def test_smaller_storage_is_near(
    tiny: Checkpoint, tmp_path: Path, storage: str, error: float
) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, tmp_path / "whole.safetensors")
    save_checkpoint(tiny, path, storage)
    assert path.stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    state = tiny.model.state_dict()
    for name, tensor in load_checkpoint(path).model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            assert (tensor - state[name]).abs().max() <= error * state[name].abs().max() + 1e-6


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def _zip(path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, path)


def _absurd_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _missing(path: Path) -> None:
    _rewrite(path, lambda tensors: tensors.pop("projection.0.bias"))


def _deep(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "captioner": "[" * 200_000})


def _large(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "captioner": " " * 70_000_000})


def _absurd_scale(path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        weight = tensors["projection.0.weight"]
        tensors["projection.0.weight"] = torch.full_like(weight, 127, dtype=torch.int8)
        tensors["projection.0.weight.scale"] = torch.full((len(weight),), 1e30)

    _rewrite(path, change)


def _foreign(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path)


def _metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        content = json.loads(metadata["captioner"])
        change(content)
        save_file(load_file(path), path, {**metadata, "captioner": json.dumps(content)})

    return spoil


def _tensor(name: str, value: Tensor) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda tensors: tensors.update({name: value}))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_pickle, "not a safetensors file"),
        (_zip, "not a safetensors file"),
        (_absurd_header, "not a safetensors file"),
        (_cut_off, "not a safetensors file"),
        (_foreign, "not a checkpoint of captioner's"),
        (_tensor(BIAS, torch.zeros(3)), r"'projection.0.bias' is \(3,\) .*, not \(11,\)"),
        (_tensor(BIAS, torch.zeros(11, dtype=torch.complex64)), "complex64"),
        (_tensor(BIAS, torch.full((11,), torch.nan)), "not finite"),
        (_tensor(BIAS + ".scale", torch.ones(11)), "the scale of 'projection.0.bias'"),
        (_tensor("extra", torch.ones(1)), "'extra' has no place in the model"),
        (_missing, "'projection.0.bias' is missing"),
        (_metadata(lambda m: m["config"]["model"]["caption"].update(hidden=10**12)), "hidden is"),
        (_metadata(lambda m: m["config"]["preprocessing"].update(size=10**6)), "size is"),
        (_metadata(lambda m: m["config"]["preprocessing"].update(std=[0, 0, 0])), "std is"),
        (_metadata(lambda m: m["config"]["encoder"].update(name="vit_b_16")), "no spatial grid"),
        (_metadata(lambda m: m.update(config=[])), "expected a table"),
        (_metadata(lambda m: m.update(vocabulary=[1, 2])), "not a list of words"),
        (_metadata(lambda m: m.update(calibration=[math.nan, 0])), "calibration"),
        (_metadata(lambda m: m.update(tag_frequencies=[0.0] * 5)), "frequency"),
        (_metadata(lambda m: m.pop("provenance")), "provenance"),
        (_metadata(lambda m: m.update(provenance={"a": "b" * 2_000_000})), "provenance has more"),
        (_metadata(lambda m: m.update(calibration=[10**400, 0])), "too large"),
        (_metadata(lambda m: m["vocabulary"].__setitem__(0, "")), "vocabulary has '', .* no word"),
        (_metadata(lambda m: m["tags"].__setitem__(1, " ")), "vocabulary has ' ', .* no word"),
        (_deep, "nested too deeply"),
        (_large, "metadata has more than 67,108,864 bytes"),
        (_tensor(BIAS, torch.full((11,), 1e30)), r"'projection.0.bias' holds numbers up to 1e\+30"),
        (_tensor(BIAS, torch.full((11,), -1e30)), "holds numbers up to"),
        (_absurd_scale, r"'projection.0.weight' holds numbers up to 1.27e\+32"),
        (_tensor(VARIANCE, torch.full((64,), -1.0)), "holds a negative variance, -1"),
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b""), "not a safetensors file"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    tiny: Checkpoint, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, path)
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_failed_write_leaves_the_old_file(tiny: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, path)
    before = path.read_bytes()
    tiny.provenance = {"unwritable": object()}
    with pytest.raises(TypeError):
        save_checkpoint(tiny, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
