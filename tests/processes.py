"""Calls in processes of their own that start warm: torch is imported once, for all of them.

Signals strike such a process at a moment that is known beforehand.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from multiprocessing import get_context, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from captioner.cli import main
from captioner.config import Config
from captioner.evaluation import Evaluation
from captioner.training.trainer import Trainer

ROOT = Path(__file__).parent.parent

# A process of it has all that takes long to import, and none of what pytest's own has begun.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "captioner.folder",
        "captioner.folder.outputs",
        "captioner.inference",
        "captioner.training.fit",
        "nltk.stem.snowball",
        "nltk.tokenize.treebank",
        "pytest",
    ]
)


# The best is neither the first nor the last, so that it is a state of its own.
SCORES = {2: 0.2, 3: 0.1, 4: 0.3, 6: 0.5, 8: 0.4, 9: 0.45}


class Ended(NamedTuple):
    """How a process ended: its status, minus the signal that killed it, and what it said."""

    status: int | None
    said: str


class Moment(NamedTuple):
    """The n-th call of a function in a process, before anything of it is done."""

    function: str
    call: int


def strike(moment: Moment, act: Callable[[], object]) -> None:
    """Do something at a moment of this process."""
    place, _, name = moment.function.rpartition(".")
    owner = pkgutil.resolve_name(place)
    whole, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(whole)
    def struck(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == moment.call:
            act()
        return whole(*args, **kwargs)

    setattr(owner, name, struck)


def start(said: Path, function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Call a function in a process that leads a group of its own, and writes to a file."""
    process = CONTEXT.Process(target=_call, args=(said, function, *args))
    process.start()
    return process


def _call(said: Path, function: Callable[..., None], *args: Any) -> None:
    os.setsid()
    set_start_method("fork", force=True)  # of the workers that read photographs
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    function(*args)


def end(process: ForkServerProcess, said: Path, seconds: float = 300.0) -> Ended:
    """Wait for a process; one that hangs is killed, and its status is ``None``."""
    process.join(seconds)
    status = process.exitcode
    process.kill()
    return Ended(status, said.read_text() if said.exists() else "")


def settings(config: Config) -> list[str]:
    """Return the arguments of scripts/train.py that say what a config says."""
    return [argument for line in _lines(config, "") for argument in ("--set", line)]


def _lines(config: Any, where: str) -> list[str]:
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found += _lines(value, f"{where}{field.name}.")
        elif value != () and value != "":
            text = value if isinstance(value, str) else json.dumps(value)
            found.append(f"{where}{field.name}={text}")
    return found


def scripted_scores() -> AbstractContextManager[Any]:
    """Return where evaluations find the CIDEr-D that stands in SCORES for their step."""
    validate = Trainer._validate

    def scored(trainer: Trainer) -> Evaluation:
        result = validate(trainer)
        return replace(result, scores=replace(result.scores, cider_d=SCORES[trainer.step]))

    return patch.object(Trainer, "_validate", scored)


def train(config: Config, run: Path, moment: Moment | None = None, number: int = 0) -> None:
    """Be scripts/train.py; at the moment a signal comes to the process and all that it started."""
    if moment is not None:
        scripted_scores().__enter__()
        # Not its own doing: a worker obeys the process that it serves.
        command = ["kill", f"-{number}", "--", f"-{os.getpid()}"]
        strike(moment, lambda: subprocess.check_call(command, start_new_session=True))
    run.parent.mkdir(parents=True, exist_ok=True)
    empty = run.parent / f"{run.name}.toml"
    empty.write_text("")
    sys.exit(script("train").main([str(empty), "--run", str(run), *settings(config)]))


def script(name: str) -> Any:
    """Return a script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def struck(config: Config, run: Path, moment: Moment, number: signal.Signals) -> Ended:
    """Return how scripts/train.py ended that got a signal at a moment."""
    said = run.with_suffix(f".{moment.function}.{moment.call}.txt")
    return end(start(said, train, config, run, moment, int(number)), said)


def forked(function: Callable[..., None], *args: Any) -> Ended:
    """Return how a call in a process of its own ended."""
    with TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        return end(start(said, function, *args), said)


def captioner(arguments: list[str], records: str | None = None) -> None:
    """Be the command line; records go to a file of their own where there is one."""
    # Whoever started the tests in the background may have had Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if records is not None:
        os.dup2(os.open(records, os.O_WRONLY | os.O_CREAT), 1)
    sys.exit(main(arguments))


def run_script(name: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Be a script."""
    os.environ |= environment
    sys.path.insert(0, str(ROOT / "scripts"))
    sys.argv = [str(ROOT / "scripts" / f"{name}.py"), *arguments]
    sys.exit(script(name).main(arguments))


def together(folder: Path, function: Callable[..., None], *args: Any) -> list[Ended]:
    """Call a function in two processes, as torchrun would start them; return how each ended."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    files = [folder / f"{port}.{rank}.txt" for rank in range(2)]
    members = [start(said, _member, rank, port, function, *args) for rank, said in enumerate(files)]
    return [end(member, said) for member, said in zip(members, files, strict=True)]


def _member(rank: int, port: int, function: Callable[..., None], *args: Any) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    function(*args)
