"""What a caller does with torch's settings and with processes changes nothing."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from captioner.folder import describe_folder
from captioner.generation.description import Description
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioner.model.device import own_settings
from captioner.training.fit import fit
from conftest import draw_picture, drawn_run
from test_inference import pictures


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], Any]] = {
    "default dtype": default_dtype,
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def described(path: Path) -> list[Description]:
    captioner = Captioner.load(path, device="cpu", precision="float32")
    return captioner.describe(pictures(3), attention=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_change_nothing(tiny: Checkpoint, tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(tiny, path)
    captioner = Captioner.load(path, device="cpu", precision="float32")
    expected = captioner.describe(pictures(3), attention=True)
    photograph = str(draw_picture(tmp_path / "x.png", "red"))
    records = list(describe_folder(captioner, [photograph], attention=True))
    with SETTINGS[name]():
        assert described(path) == expected  # set before loading
        found = captioner.describe(pictures(3), attention=True)  # and after
        assert found == expected
        assert list(describe_folder(captioner, [photograph], attention=True)) == records
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.caption.word_log_probs == theirs.caption.word_log_probs
        # They are the caller's again.
        assert torch.zeros(()).dtype == torch.get_default_dtype()
        assert (torch.get_default_dtype() == torch.float64) == (name == "default dtype")
        assert (torch.zeros(()).device.type == "meta") == (name == "default device")
        assert torch.is_autocast_enabled("cpu") == (name == "autocast")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_torch_change_no_training(tmp_path: Path, name: str) -> None:
    (tmp_path / "drawn").mkdir()
    config = drawn_run(tmp_path / "drawn")
    with SETTINGS[name]():
        best = fit(config, tmp_path / "run", torch.device("cpu"), lambda _: None)
    expected = fit(config, tmp_path / "plain", torch.device("cpu"), lambda _: None)
    ours, theirs = (load_checkpoint(path).model.state_dict() for path in (best, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_two_threads_that_compute_give_the_dtype_back_once() -> None:
    with default_dtype():
        first, second = own_settings(), own_settings()
        with first:
            with second:
                assert torch.get_default_dtype() == torch.float32
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64


def in_a_fork(act: Callable[[], object], seconds: float = 60.0) -> None:
    """Do something in a process that is forked here; it must succeed within so many seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail(f"a forked process hung for {seconds:g} seconds")


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_fork_captions_too(loaded: str) -> None:
    """As with gunicorn --preload, Celery's prefork and multiprocessing's fork."""
    captioner = Captioner.load(device="cpu", precision="float32")
    expected = captioner.describe(pictures(3))  # starts torch's threads, which a fork has not

    def describe() -> None:
        ours = captioner
        if loaded == "after":
            ours = Captioner.load(device="cpu", precision="float32")
        for found, theirs in zip(ours.describe(pictures(3)), expected, strict=True):
            assert found.caption.text == theirs.caption.text
            assert math.isclose(found.caption.log_prob, theirs.caption.log_prob, abs_tol=1e-3)
        assert torch.get_num_threads() == 1

    in_a_fork(describe)
    assert torch.get_num_threads() == 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_of_a_process_with_an_accelerator_is_told_what_to_do(tiny: Checkpoint) -> None:
    captioner = Captioner(tiny)
    pixels = [captioner.pixels(image) for image in pictures(2)]
    captioner.device = torch.device("cuda")  # as if it had been loaded onto one

    def encode() -> None:
        with pytest.raises(RuntimeError, match=r"onto cuda before .* load it in each process"):
            captioner.encode(pixels)

    in_a_fork(encode)


@pytest.mark.parametrize("part", ["projection.0", "caption_decoder.output"])
def test_numbers_that_are_not_finite_are_an_error(tiny: Checkpoint, part: str) -> None:
    """Weights within what is loaded may still overflow; "" with probability 1 is no caption."""
    model = tiny.model
    with torch.no_grad():
        model.get_submodule(part).weight.fill_(math.inf)  # type: ignore[operator]
    captioner = Captioner(replace(tiny, model=model))
    with pytest.raises(ValueError, match="numbers that are not finite; its file is damaged"):
        captioner.caption(pictures(2))
