"""How a run behaves: killed, interrupted, poisoned, out of memory, stalled; and in parts."""

from __future__ import annotations

import gc
import os
import signal
import time
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SCORES, Moment, script, scripted_scores, settings, struck
from torch import nn

from captioner.config import Config, EncoderConfig, ExperimentalConfig, SelfCriticalConfig
from captioner.data.dataset import Features
from captioner.data.sources import read_data
from captioner.evaluation import Evaluation
from captioner.model.checkpoint import load_checkpoint
from captioner.photos.images import Photograph, open_photograph
from captioner.settings import ConfigError
from captioner.training.advice import TrainingError
from captioner.training.distributed import Group
from captioner.training.fit import fit
from captioner.training.learner import Learner, Update
from captioner.training.runlog import read_log
from captioner.training.trainer import Trainer
from conftest import BACKBONE, COLOURS, drawn_run

# The runs that are killed have one thread, and sums depend on how many there are.
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")

STAGES = [stage for stage in ("frozen", "end to end", "self-critical") for _ in range(2)]


def quiet(_: str) -> None:
    """Say nothing."""


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_log(run) if "epoch" in record]


def remains(run: Path) -> dict[str, Any]:
    """Return what a run leaves, apart from the time that it took."""
    checkpoints = {name: (run / f"{name}.safetensors").read_bytes() for name in ("best", "last")}
    log = [{k: v for k, v in record.items() if k != "seconds"} for record in read_log(run)]
    return {**checkpoints, "log": log}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """Return the config of a run with all that has a state, and what it leaves undisturbed."""
    folder = tmp_path_factory.mktemp("drawn")
    drawn = drawn_run(folder)
    config = replace(
        drawn,
        optimizer=replace(drawn.optimizer, schedule="plateau"),
        experimental=ExperimentalConfig(plateau_patience=1),
        training=replace(
            drawn.training, batch_size=3, ema=0.9, validate_every=2, patience=3, save_every=100
        ),
        self_critical=SelfCriticalConfig(epochs=1, samples=2, lr=0.01),
    )
    with scripted_scores():
        fit(config, folder / "whole", CPU, quiet)
    found = [(record["stage"], record["step"]) for record in evaluations(folder / "whole")]
    assert found == list(zip(STAGES, SCORES, strict=True))
    return config, remains(folder / "whole")


@pytest.mark.slow
def test_killed_at_any_moment_and_continued_is_byte_for_byte_undisturbed(
    whole: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config, undisturbed = whole
    moments = [
        Moment("captioner.training.features.pixel_batches", 1),
        Moment("torch.optim.AdamW.step", 2),
        Moment("captioner.training.validation.judge", 1),
        Moment("captioner.training.trainer.save_checkpoint", 2),  # between last and best
        Moment("captioner.training.snapshot.torch.save", 2),
        Moment("captioner.training.validation.judge", 3),
        Moment("captioner.training.learner.load_checkpoint", 1),  # the best, to go on from
        Moment("captioner.training.self_critical.policy_gradient_loss", 2),
    ]
    for moment in moments:
        ended = struck(config, tmp_path / "run", moment, signal.SIGKILL)
        assert ended.status == -signal.SIGKILL, (moment, ended)
    with scripted_scores():
        fit(config, tmp_path / "run", CPU, quiet)
    assert remains(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_asked_to_stop_a_run_says_how_to_go_on(
    whole: tuple[Config, dict[str, Any]], tmp_path: Path
) -> None:
    config, undisturbed = whole
    moments = [
        (Moment("captioner.training.fit.read_data", 1), signal.SIGTERM),
        (Moment("captioner.training.features.pixel_batches", 1), signal.SIGINT),
        (Moment("captioner.model.encoder.Encoder.forward", 2), signal.SIGTERM),
        (Moment("captioner.training.learner.clip_gradients", 1), signal.SIGINT),
        (Moment("captioner.evaluation.write_captions", 1), signal.SIGTERM),
        (Moment("captioner.training.teacher_forcing.sequence_loss", 2), signal.SIGTERM),
        # Workers read pixels then.
        (Moment("captioner.evaluation.write_captions", 1), signal.SIGINT),
        (Moment("captioner.training.self_critical.draw", 2), signal.SIGINT),
    ]
    steps = []
    for moment, number in moments:
        ended = struck(config, tmp_path / "run", moment, number)
        assert ended.status == 128 + number, (moment, ended)
        assert "train.py: stopped; the same command continues the run" in ended.said
        for noise in ("Traceback", "Exception ignored", "KeyboardInterrupt", "Warning"):
            assert noise not in ended.said, (moment, ended)
        steps.append(state(config, tmp_path / "run"))
    assert steps == [0, 0, 0, 1, 2, 4, 4, 8]
    with scripted_scores():
        fit(config, tmp_path / "run", CPU, quiet)
    assert remains(tmp_path / "run") == undisturbed


def state(config: Config, run: Path) -> int:
    """Return the step that a run would continue from."""
    trainer = Trainer(config, read_data(config), run, CPU, quiet)
    trainer.progress = trainer.snapshot.read() or trainer.progress
    return trainer.step


@pytest.fixture
def drawn(tmp_path: Path) -> Config:
    """Return the config of a run on eight drawn pictures."""
    return drawn_run(tmp_path)


def test_what_nothing_learnt_depends_on_may_change(drawn: Config, tmp_path: Path) -> None:
    fit(drawn, tmp_path / "run", CPU, quiet)
    before = remains(tmp_path / "run")
    free: dict[str, Any] = {
        "accumulation": 2,
        "save_every": 7,
        "features": str(tmp_path / "elsewhere"),
    }
    said: list[str] = []
    other = replace(drawn, training=replace(drawn.training, **free))
    fit(other, tmp_path / "run", CPU, said.append)
    assert remains(tmp_path / "run") == before
    assert "the run is at its end" in said


def steps_taken(
    config: Config, run: Path, group: Group | None = None
) -> tuple[list[Update], list[dict[str, torch.Tensor]]]:
    """Return what the steps of an epoch did, and the gradients of each."""
    trainer = Trainer(config, read_data(config), run, CPU, quiet, group)
    smoothen(trainer.learner.model.encoder)
    trainer.begin_epoch()
    updates, gradients = [], []
    for parts in trainer.steps():
        update = trainer.learner.update(parts, trainer.stage, trainer.step, [])
        assert update is not None
        updates.append(update)
        named = trainer.learner.model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
    return updates, gradients


@pytest.mark.parametrize("frozen_epochs", [0, 1])
def test_parts_of_a_step_add_up_to_it(drawn: Config, tmp_path: Path, frozen_epochs: int) -> None:
    drawn = without_chance(drawn, frozen_epochs=frozen_epochs, batch_size=7)
    expected = steps_taken(drawn, tmp_path / "run")
    for parts in (2, 3):
        config = replace(drawn, training=replace(drawn.training, accumulation=parts))
        assert_same_steps(steps_taken(config, tmp_path / "run"), expected)


def without_chance(config: Config, **training: Any) -> Config:
    """Return a config whose steps all start at the same weights, without dropout."""
    model = replace(
        config.model,
        grid_dropout=0.0,
        caption=replace(config.model.caption, dropout=0.0),
        tags=replace(config.model.tags, dropout=0.0),
    )
    return replace(
        config,
        model=model,
        optimizer=replace(config.optimizer, lr=0.0, encoder_lr=0.0, clip_norm=1e6),
        training=replace(config.training, label_smoothing=0.1, augment=False, **training),
        experimental=replace(config.experimental, attention_penalty=1.0),
    )


def smoothen(module: nn.Module) -> None:
    """Take out what jumps: at a kink, a rounding error is enough for quite another gradient."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU | nn.Hardswish):
            setattr(module, name, nn.GELU())
        elif isinstance(child, nn.Hardsigmoid):
            setattr(module, name, nn.Sigmoid())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(2))
        smoothen(child)


def assert_same_steps(
    found: tuple[list[Update], list[dict[str, torch.Tensor]]],
    expected: tuple[list[Update], list[dict[str, torch.Tensor]]],
) -> None:
    """Compare losses and gradients, those of each parameter, to 1e-5."""
    for update, other in zip(found[0], expected[0], strict=True):
        assert update.figure == pytest.approx(other.figure, rel=1e-5)
        assert update.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
    for gradients, others in zip(found[1], expected[1], strict=True):
        assert gradients.keys() == others.keys()
        assert any(gradient.any() for gradient in others.values())
        for name, gradient in gradients.items():
            # What goes into a softmax has next to none, but for rounding errors.
            floor = 1e-6 * expected[0][0].gradient_norm
            gap = float((gradient - others[name]).norm())
            assert gap <= 1e-5 * float(others[name].norm()) + floor, name


def test_a_step_without_a_finite_gradient_changes_nothing(drawn: Config, tmp_path: Path) -> None:
    said: list[str] = []
    settings = replace(drawn.training, batch_size=1, ema=0.5, validate_every=8)
    config = replace(drawn, training=settings)
    trainer = Trainer(config, read_data(config), tmp_path, CPU, said.append)
    trainer.begin_epoch()
    assert trainer.dataset.features is not None
    rows = trainer.dataset.features.rows.copy()
    rows[COLOURS.index("blue")] = float("nan")
    trainer.dataset.features = Features(rows, {})
    average = trainer.learner.average
    assert average is not None
    skipped = []
    for parts in trainer.steps():
        before = {n: t.clone() for n, t in average.state_dict().items()}
        weights = [p.detach().clone() for p in trainer.learner.model.parameters()]
        trainer._take(parts)
        same = all(map(torch.equal, weights, trainer.learner.model.parameters()))
        now = average.state_dict()
        assert same == all(torch.equal(before[n], now[n]) for n in now)
        if same:
            skipped += [COLOURS[place] for place in parts[0].indices]
    assert skipped == ["blue"]
    assert trainer.progress.skipped == 1
    assert trainer.progress.updates == 7
    assert [line for line in said if "skipped: its loss or gradient is not finite" in line]
    assert all(state["step"] == 7 for state in trainer.learner.optimizer.state.values())


def test_ten_steps_without_a_finite_gradient_end_the_run(
    drawn: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Weights of an encoder that are no numbers: what a run that diverged leaves.
    trainer = Trainer(drawn, read_data(drawn), tmp_path / "first", CPU, quiet)
    state = {k: t.clone() for k, t in trainer.learner.model.encoder.backbone.state_dict().items()}
    state["features.12.1.weight"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    config = replace(
        drawn,
        encoder=replace(drawn.encoder, weights=str(tmp_path / "nan.pth")),
        training=replace(drawn.training, batch_size=1, frozen_epochs=2),
    )
    (tmp_path / "empty.toml").write_text("")
    command = [str(tmp_path / "empty.toml"), "--run", str(tmp_path / "run"), *settings(config)]
    assert script("train").main(command) == 1
    said = capsys.readouterr().err
    assert "no finite gradient in 10 steps in a row, up to step 10; try an optimizer.lr" in said
    assert "Traceback" not in said
    assert [record["loss"] for record in read_log(tmp_path / "run") if "rate" in record] == [None]
    assert [record["skipped"] for record in evaluations(tmp_path / "run")] == [8]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate "
                     "memory: you tried to allocate 9 bytes. Error code 12"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n can't allocate memory"),
    ],
)  # fmt: skip
def test_out_of_memory_saves_and_names_what_to_try(
    drawn: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    from captioner.training.teacher_forcing import TeacherForcing

    forward, room = TeacherForcing._loss, [3]

    def scarce(objective: TeacherForcing, batch: Any, totals: torch.Tensor) -> torch.Tensor:
        if len(batch.images) > 2:
            room[0] -= 1
            if room[0] < 0:
                raise error
        return forward(objective, batch, totals)

    monkeypatch.setattr(TeacherForcing, "_loss", scarce)
    advice = r"out of memory at step 3, with 4 photographs at a time; the run is saved: continue "
    with pytest.raises(TrainingError, match=advice + r"it with --set training.accumulation=2, or"):
        fit(drawn, tmp_path / "run", CPU, quiet)
    assert state(drawn, tmp_path / "run") == 3
    with pytest.raises(TrainingError, match="out of memory at step 3"):
        fit(drawn, tmp_path / "run", CPU, quiet)
    config = replace(drawn, training=replace(drawn.training, accumulation=2))
    fit(config, tmp_path / "run", CPU, quiet)
    assert [record["epoch"] for record in evaluations(tmp_path / "run")] == [1, 2]


def test_a_photograph_that_ends_its_reader_is_left_out_once_it_is_empty(
    drawn: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashing, reader = Path(drawn.data.images) / "red.png", open_photograph

    def read(path: str, size: int) -> Photograph:
        if path == str(crashing) and crashing.stat().st_size and parent_process():
            time.sleep(0.5)  # until all that was read before has arrived
            os.kill(os.getpid(), signal.SIGKILL)
        return reader(path, size)

    monkeypatch.setattr("captioner.data.dataset.open_photograph", read)
    advice = "process that reads photographs has ended: .*(killed|exited).*check_data.* Empty that"
    with pytest.raises(TrainingError, match=advice):
        fit(drawn, tmp_path / "run", CPU, quiet)
    gc.collect()  # or torch, at any later signal, would raise the end of that reader again
    crashing.write_bytes(b"")
    said: list[str] = []
    fit(drawn, tmp_path / "run", CPU, said.append)
    assert any(line.startswith("continuing at epoch 2") for line in said)
    assert any(line.startswith(f"left out {crashing}") for line in said)
    assert [record["epoch"] for record in evaluations(tmp_path / "run")] == [1, 2]


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of the CIDEr-D that the next evaluations find, to be filled."""
    given: list[float] = []
    from captioner.evaluation import judge

    def scored(*args: Any) -> Evaluation:
        result = judge(*args)
        return replace(result, scores=replace(result.scores, cider_d=given.pop(0)))

    monkeypatch.setattr("captioner.training.validation.judge", scored)
    return given


@pytest.mark.slow
def test_a_stage_that_stalls_ends_early(drawn: Config, tmp_path: Path, scores: list[float]) -> None:
    config = replace(
        drawn,
        training=replace(drawn.training, epochs=9, frozen_epochs=5, patience=2),
        self_critical=SelfCriticalConfig(epochs=7, samples=2),
    )
    scores += [0.1, 0.3, 0.3, 0.2, 0.25, 0.4, 0.35, 0.1, 0.2, 0.5, 0.1, 0.2]
    fit(config, tmp_path / "run", CPU, quiet)
    found = [(record["stage"], record["epoch"]) for record in evaluations(tmp_path / "run")]
    assert found == [
        *(("frozen", epoch) for epoch in (1, 2, 3, 4)),
        *(("end to end", epoch) for epoch in (6, 7, 8, 9)),
        *(("self-critical", epoch) for epoch in (10, 11, 12, 13)),
    ]
    figures = [
        load_checkpoint(tmp_path / "run" / f"{name}.safetensors").provenance["figures"]
        for name in ("best", "last")
    ]
    assert [(figure["epoch"], figure["cider_d"]) for figure in figures] == [(11, 0.5), (13, 0.2)]


@pytest.mark.slow
def test_checkpoints_are_written_when_they_happen_and_a_plateau_lowers_the_rate(
    drawn: Config, tmp_path: Path, scores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = replace(drawn.optimizer, schedule="plateau", warmup_steps=0)
    experimental = ExperimentalConfig(plateau_patience=1, plateau_decay=0.5)
    training = replace(drawn.training, epochs=3, frozen_epochs=3, validate_every=1, batch_size=4)
    config = replace(drawn, optimizer=optimizer, training=training, experimental=experimental)
    scores += [0.3, 0.2, 0.4, 0.1, 0.3, 0.2]
    run, rates, update = tmp_path / "run", [], Learner.update
    best: list[int] = []

    def recorded(learner: Learner, parts: Any, stage: Any, step: int, past: Any) -> Update | None:
        if step:
            of = [load_checkpoint(run / f"{n}.safetensors").provenance["figures"]["step"]
                  for n in ("last", "best")]  # fmt: skip
            assert of[0] == step
            best.append(of[1])
        done = update(learner, parts, stage, step, past)
        assert done is not None
        rates.append(done.rate / 0.02)
        return done

    monkeypatch.setattr(Learner, "update", recorded)
    fit(config, run, CPU, quiet)
    assert best == [1, 1, 3, 3, 3]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 0.5, 0.25, 0.125])


def test_a_stall_in_the_middle_of_an_epoch_ends_it(
    drawn: Config, tmp_path: Path, scores: list[float]
) -> None:
    settings = replace(
        drawn.training, epochs=2, frozen_epochs=2, validate_every=1, batch_size=2, patience=1
    )
    scores += [0.3, 0.4, 0.1]
    fit(replace(drawn, training=settings), tmp_path / "run", CPU, quiet)
    assert [record["step"] for record in evaluations(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_may_be_self_critical_alone(drawn: Config, tmp_path: Path) -> None:
    first = fit(drawn, tmp_path / "first", CPU, quiet)
    config = replace(
        drawn,
        encoder=EncoderConfig(BACKBONE),
        model=replace(drawn.model, init=str(first)),
        training=replace(drawn.training, epochs=0),
        self_critical=SelfCriticalConfig(epochs=2, samples=2, lr=0.001),
    )
    fit(config, tmp_path / "run", CPU, quiet)
    found = [(record["stage"], record["epoch"]) for record in evaluations(tmp_path / "run")]
    assert found == [("self-critical", 1), ("self-critical", 2)]
    nothing = replace(config, self_critical=SelfCriticalConfig(epochs=0))
    with pytest.raises(
        ConfigError, match=r"training.epochs, self_critical.epochs and tags.epochs are all 0"
    ):
        fit(nothing, tmp_path / "nothing", CPU, quiet)
