"""Two processes that train one model: the same as one, and together in everything they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import ROOT, Moment, settings, strike, together, train
from test_runs import (
    CPU,
    assert_same_steps,
    evaluations,
    quiet,
    remains,
    state,
    steps_taken,
    without_chance,
)

from captioner.config import Config, SelfCriticalConfig
from captioner.data.sources import read_data
from captioner.training.distributed import joined
from captioner.training.fit import fit
from captioner.training.trainer import Trainer
from conftest import drawn_run

pytestmark = pytest.mark.slow


@pytest.fixture
def drawn(tmp_path: Path) -> Config:
    """Return the config of a run on eight drawn pictures, one of which is none."""
    config = drawn_run(tmp_path)
    (tmp_path / "blue.png").write_bytes(b"no picture")
    return config


def cases(drawn: Config) -> list[Config]:
    """Return runs that share their steps out in different ways."""
    base = without_chance(drawn, frozen_epochs=0)
    plain = replace(base.model.caption, attention=False)
    return [
        without_chance(drawn, batch_size=7),  # the second process has none of the last step
        without_chance(drawn, batch_size=5, accumulation=2),
        base,
        replace(base, training=replace(base.training, batch_size=7, accumulation=3)),
        replace(
            base,
            model=replace(base.model, caption=plain, tags=plain),
            experimental=replace(base.experimental, attention_penalty=0.0),
        ),
        replace(
            base,
            training=replace(base.training, epochs=0, batch_size=7),
            self_critical=SelfCriticalConfig(epochs=1, samples=4, temperature=1.0, lr=0.0),
        ),
    ]


def take_steps(configs: list[Config], folder: Path) -> None:
    with joined(CPU) as group:
        for number, config in enumerate(configs):
            taken = steps_taken(config, folder / "run", group)
            torch.save(taken, folder / f"{number}.{group.rank}.pt")


def test_gradients_of_two_processes_are_those_of_one(drawn: Config, tmp_path: Path) -> None:
    configs = cases(drawn)
    ended = together(tmp_path, take_steps, configs, tmp_path)
    assert [process.status for process in ended] == [0, 0], ended
    for number, config in enumerate(configs):
        expected = steps_taken(config, tmp_path / "run")
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{number}.{rank}.pt", weights_only=False)
            assert_same_steps(found, expected)


def long_run(drawn: Config) -> Config:
    """Return a run of three stages, with chance, and states of all kinds."""
    return replace(
        drawn,
        training=replace(
            drawn.training, batch_size=3, ema=0.9, validate_every=2, accumulation=2, save_every=1
        ),
        self_critical=SelfCriticalConfig(epochs=1, samples=2, lr=0.01),
    )


def fit_as_one_of_two(config: Config, run: Path, dies: Moment | None = None) -> None:
    """Train; only the first process may write, and both die at a moment."""
    if os.environ["RANK"] != "0":
        for writer in ("training.snapshot.replacing", "model.checkpoint.replacing",
                       "training.reporter.RunLog"):  # fmt: skip
            strike(Moment(f"captioner.{writer}", 1), fail)
    if dies is not None:
        strike(dies, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(config, run, CPU)


def fail() -> None:
    raise AssertionError


def test_two_processes_go_through_all_stages_and_a_kill(drawn: Config, tmp_path: Path) -> None:
    config = long_run(drawn)
    ended = together(tmp_path, fit_as_one_of_two, config, tmp_path / "whole")
    assert [process.status for process in ended] == [0, 0], ended
    assert ended[1].said == ""
    assert ended[0].said.count("blue.png: not a picture") == 1
    found = [(record["stage"], record["step"]) for record in evaluations(tmp_path / "whole")]
    assert found[-1] == ("self-critical", 9)

    dies = Moment("captioner.training.learner.clip_gradients", 5)
    killed = together(tmp_path, fit_as_one_of_two, config, tmp_path / "cut", dies)
    assert [process.status for process in killed] == [-signal.SIGKILL] * 2, killed
    assert state(config, tmp_path / "cut") == 4
    ended = together(tmp_path, fit_as_one_of_two, config, tmp_path / "cut")
    assert [process.status for process in ended] == [0, 0], ended
    assert remains(tmp_path / "cut") == remains(tmp_path / "whole")

    trainer = Trainer(config, read_data(config), tmp_path / "whole", CPU, quiet)
    trainer.progress = trainer.snapshot.read() or trainer.progress
    alone = trainer.evaluate().as_dict()
    last = evaluations(tmp_path / "whole")[-1]
    assert {name: last[name] for name in alone} == pytest.approx(alone)


def test_a_run_of_one_process_goes_on_with_two(drawn: Config, tmp_path: Path) -> None:
    config = long_run(without_chance(drawn))
    config = replace(config, optimizer=drawn.optimizer)
    fit(config, tmp_path / "alone", CPU, quiet)
    begun = tmp_path / "run"
    stop_after(3, config, begun)
    assert state(config, begun) == 3
    ended = together(tmp_path, fit_as_one_of_two, config, begun)
    assert [process.status for process in ended] == [0, 0], ended
    assert "continuing at epoch 2, step 0 of 3" in ended[0].said
    logs = [
        [(record["stage"], record["step"]) for record in evaluations(tmp_path / name)]
        for name in ("alone", "run")
    ]
    assert logs[0] == logs[1]


def stop_after(step: int, config: Config, run: Path) -> None:
    """Train with one process, up to the end of an epoch's last step."""

    class EnoughError(Exception):
        pass

    class Stopping(Trainer):
        def begin_epoch(self) -> None:
            if self.step == step:
                raise EnoughError
            super().begin_epoch()

    run.mkdir()
    with pytest.raises(EnoughError):
        Stopping(config, read_data(config), run, CPU, quiet).train()


def starve(config: Config, run: Path) -> None:
    """Train, with no memory left in the second process at its third step."""
    if os.environ["RANK"] == "1":
        strike(Moment("captioner.training.teacher_forcing.TeacherForcing._loss", 3), out_of_memory)
    train(config, run)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_where_one_process_fails_none_hangs(drawn: Config, tmp_path: Path) -> None:
    ended = together(tmp_path, starve, drawn, tmp_path / "run")
    assert ended[1].status == 1
    assert "out of memory at step 2, with 2 photographs at a time" in ended[1].said
    assert ended[0].status not in (0, None)
    assert state(drawn, tmp_path / "run") == 2


def test_torchrun_is_stopped_and_continued(drawn: Config, tmp_path: Path) -> None:
    config = replace(drawn, training=replace(drawn.training, epochs=3, frozen_epochs=2))
    (tmp_path / "empty.toml").write_text("")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("--", str(ROOT / "scripts" / "train.py"), str(tmp_path / "empty.toml")),
        *("--run", str(tmp_path / "run"), *settings(config)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    while "epoch 1, frozen" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert said.count("train.py: stopped; the same command continues the run") == 1, said
    assert (tmp_path / "run" / "resume.snapshot").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.count("continuing at epoch") == 1
    assert done.stdout.count("best checkpoint: ") == 1
    assert [record["epoch"] for record in evaluations(tmp_path / "run")] == [1, 2, 3]
