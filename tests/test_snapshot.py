"""Snapshots: all comes back bit for bit, or the file is refused in a line that says what to do."""

from __future__ import annotations

import hashlib
import io
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from captioner.config import Config
from captioner.settings import ConfigError
from captioner.training.snapshot import Progress, Snapshot

PROGRESS = Progress(epoch=3, position=7, best=0.25, scores=[0.2, 0.25], seconds=1.5)
FLIPS = 2048


class Run:
    """A tiny model that has learnt a little, and its snapshot."""

    def __init__(self, folder: Path, config: Config | None = None, steps: int = 2) -> None:
        torch.manual_seed(steps)
        self.model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
        self.average = torch.optim.swa_utils.AveragedModel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        for _ in range(steps):
            self.step()
        modules = {"model": self.model, "average": self.average}
        self.snapshot = Snapshot(folder, modules, self.optimizer, config or Config(), "data")

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.ones(4, 3)).square().sum().backward()
        self.optimizer.step()
        self.average.update_parameters(self.model)

    def state(self) -> list[Any]:
        """Return all numbers of the run."""
        modules = [*self.model.state_dict().values(), *self.average.state_dict().values()]
        momenta = [x for s in self.optimizer.state_dict()["state"].values() for x in s.values()]
        return [tensor.tolist() for tensor in (*modules, *momenta)]


@pytest.fixture
def written(tmp_path: Path) -> Run:
    """Return a run whose snapshot is written."""
    run = Run(tmp_path)
    run.snapshot.write(PROGRESS)
    return run


def test_all_comes_back_and_goes_on_the_same(written: Run, tmp_path: Path) -> None:
    other = Run(tmp_path, steps=0)
    assert other.snapshot.read() == PROGRESS
    assert other.state() == written.state()
    for run in (written, other):
        run.step()
    assert other.state() == written.state()
    assert [path.name for path in tmp_path.iterdir()] == ["resume.snapshot"]


def test_without_a_file_there_is_no_progress(tmp_path: Path) -> None:
    assert Run(tmp_path).snapshot.read() is None


def refusal(run: Run) -> str:
    """Return the message of a snapshot that cannot be read."""
    with pytest.raises(ConfigError) as caught:
        run.snapshot.read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_any_flipped_bit_is_refused(written: Run, tmp_path: Path) -> None:
    whole, generator = written.snapshot.path.read_bytes(), random.Random(0)
    other = Run(tmp_path, steps=1)
    before = other.state()
    for _ in range(FLIPS):
        bit = generator.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        written.snapshot.path.write_bytes(damaged)
        message = refusal(other)
        assert "resume.snapshot is damaged; take another --run folder, or delete" in message
    assert other.state() == before


def with_checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + content


def holding(**changes: Any) -> Callable[[bytes], bytes]:
    """Return the change of a snapshot to one that holds something else."""

    def change(whole: bytes) -> bytes:
        content = torch.load(io.BytesIO(whole[32:]), weights_only=True) | changes
        stream = io.BytesIO()
        torch.save(content, stream)
        return with_checksum(stream.getvalue())

    return change


class Hostile:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code was run",))


def poisoned(_: bytes) -> bytes:
    stream = io.BytesIO()
    torch.save({"progress": Hostile()}, stream)
    return with_checksum(stream.getvalue())


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda whole: whole[:-1],
        lambda whole: whole + b"more",
        lambda _: with_checksum(b""),
        lambda _: with_checksum(b"no archive"),
        lambda _: with_checksum(pickle.dumps({"progress": {}})),
        poisoned,
        holding(progress={"epoch": 1, "unknown": 2}),
        holding(progress=7),
        holding(modules={}),
        holding(modules={"model": {}, "average": {}}),
        holding(optimizer={"state": {}, "param_groups": []}),
    ],
)
def test_what_is_no_snapshot_is_refused(
    written: Run, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = written.snapshot.path
    path.write_bytes(change(path.read_bytes()))
    (tmp_path / "best.safetensors").touch()
    message = refusal(Run(tmp_path, steps=1))
    assert message.startswith(str(path))
    assert f"take another --run folder, from model.init = '{tmp_path}/best.safetensors'" in message


def test_another_config_is_refused_by_its_keys(written: Run, tmp_path: Path) -> None:
    default = Config()
    training = replace(default.training, seed=3, save_every=7)
    other = Run(tmp_path, replace(default, training=training))
    assert refusal(other).endswith("holds a run with another config: training.seed was 0, now 3")


def test_a_snapshot_of_an_earlier_version_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "resume.safetensors").touch()
    message = refusal(Run(tmp_path))
    assert "resume.safetensors is of an earlier version of captioner; take another" in message
