"""Learning: where it starts, what it can learn by heart, and how it goes on after a kill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from captioner.config import Config, SelfCriticalConfig, TagsConfig
from captioner.data.dataset import Batch, batches
from captioner.data.sources import read_data
from captioner.inference import Captioner
from captioner.model.checkpoint import Checkpoint, load_checkpoint
from captioner.settings import ConfigError
from captioner.training.fit import fit
from captioner.training.learner import Update
from captioner.training.losses import sequence_loss
from captioner.training.runlog import read_log
from captioner.training.trainer import Trainer
from conftest import COLOURS, drawn_run

CPU = torch.device("cpu")


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture
def drawn(tmp_path: Path) -> Config:
    """Return the config of a run on eight drawn pictures, each with its own caption."""
    return drawn_run(tmp_path)


def begun(config: Config, run: Path) -> Trainer:
    """Return a run that is ready for the first step of its first epoch."""
    trainer = Trainer(config, read_data(config), run, CPU, quiet)
    trainer.begin_epoch()
    return trainer


def loss_of(trainer: Trainer, batch: Batch) -> Tensor:
    """Return the loss of a batch that is a whole step."""
    loss: Tensor = trainer.learner.objective(batch, trainer.learner.objective.counts(batch))[0]
    return loss


def step(trainer: Trainer, micro_batches: Sequence[Batch]) -> Update | None:
    """Do one step, wherever the trainer stands."""
    return trainer.learner.update(micro_batches, trainer.stage, trainer.step, [])


def test_untrained_loss_is_log_v() -> None:
    v = 23
    logits, targets = torch.zeros(2, 3, v), torch.full((2, 3), 5)
    assert float(sequence_loss(logits, targets)) == pytest.approx(6 * math.log(v))


def test_untrained_model_starts_near_log_v(drawn: Config, tmp_path: Path) -> None:
    trainer = begun(drawn, tmp_path / "run")
    batch = next(batches(trainer.dataset, 8, 0, 0, 0, 0))
    words, tags = (
        len(trainer.learner.checkpoint.vocabulary),
        len(trainer.learner.checkpoint.tags.vocabulary),
    )
    # Each photograph has one tag of eight, so that the decoder writes two tokens of it; the head
    # begins with a logit of -4 everywhere.
    head = (math.log1p(math.exp(4.0)) + 7 * math.log1p(math.exp(-4.0))) / 2
    expected = math.log(words) + drawn.training.tag_weight * (math.log(tags) + head)
    assert loss_of(trainer, batch).item() == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_learns_eight_pictures_by_heart(drawn: Config, tmp_path: Path) -> None:
    caption = replace(drawn.model.caption, dropout=0.0)
    tags = replace(drawn.model.tags, dropout=0.0, embedding=29)
    config = replace(
        drawn,
        model=replace(drawn.model, grid_width=31, grid_dropout=0.0, caption=caption, tags=tags),
        optimizer=replace(drawn.optimizer, lr=0.004),
        training=replace(
            drawn.training, epochs=400, frozen_epochs=400, batch_size=8, tag_weight=2.0
        ),
    )
    trainer = begun(config, tmp_path / "run")
    for epoch in range(400):
        trainer.progress.epoch = epoch
        step(trainer, [next(batches(trainer.dataset, 8, 0, epoch, 0, 0))])
    described = Captioner(trainer.learner.checkpoint).describe(
        [tmp_path / f"{c}.png" for c in COLOURS]
    )
    assert [d.caption.text for d in described] == [f"a {c} disc on grey paper" for c in COLOURS]
    assert [[tag.name for tag in d.tags] for d in described] == [[c] for c in COLOURS]


def parameters(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(run) if "epoch" in entry]


class KilledError(Exception):
    """Stands for SIGKILL: nothing of the run gets a chance to tidy up."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Tensor]]:
    """Return the config of a run in four stages, and what it has learnt at its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    drawn = drawn_run(folder)
    config = replace(
        drawn,
        training=replace(drawn.training, save_every=1, ema=0.9),
        self_critical=SelfCriticalConfig(epochs=1, samples=2, lr=0.01),
        tags=TagsConfig(epochs=1),
    )
    fit(config, folder / "whole", CPU, quiet)
    return config, parameters(load_checkpoint(folder / "whole" / "last.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [1, 3, 4, 6, 7, 10])
def test_killed_and_continued_is_bit_for_bit_undisturbed(
    undisturbed: tuple[Config, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_after: int,
) -> None:
    config, whole = undisturbed
    save, saves = Trainer.save, []

    def save_then_die(trainer: Trainer) -> None:
        save(trainer)
        saves.append(trainer.step)
        if len(saves) == kill_after:
            raise KilledError

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", save_then_die)
        with pytest.raises(KilledError):
            fit(config, tmp_path / "cut", CPU, quiet)
    fit(config, tmp_path / "cut", CPU, quiet)
    cut = parameters(load_checkpoint(tmp_path / "cut" / "last.safetensors"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert [entry["stage"] for entry in evaluations(tmp_path / "cut")] == [
        "frozen",
        "end to end",
        "self-critical",
        "tags",
    ]


@pytest.mark.slow
def test_self_critical_training_raises_the_reward(drawn: Config, tmp_path: Path) -> None:
    stage = SelfCriticalConfig(epochs=60, samples=8, temperature=1.0, lr=0.01)
    settings = replace(drawn.training, epochs=15, frozen_epochs=15, batch_size=8)
    config = replace(drawn, training=settings, self_critical=stage)
    trainer = Trainer(config, read_data(config), tmp_path / "run", CPU, quiet)
    trainer.workers = 0  # a process an epoch would take longer than to learn
    rewards = []
    for epoch in range(75):
        trainer.progress.epoch = epoch
        trainer.begin_epoch()
        update = step(trainer, next(trainer.steps()))
        assert update is not None
        if trainer.stage.name == "self-critical":
            rewards.append(update.figure)
    assert len(rewards) == 60
    assert sum(rewards[-10:]) > 1.4 * sum(rewards[:10])


def test_the_last_stage_changes_tags_alone(drawn: Config, tmp_path: Path) -> None:
    """From a checkpoint, with nothing else to do: other tags, the same captions, the same words."""
    fit(drawn, tmp_path / "run", CPU, quiet)
    source = tmp_path / "run" / "best.safetensors"
    names = tmp_path / "tags.tsv"
    names.write_text("# mine\nred\t1\tred\nblau\t1\tblue\tnavy\nheron\t0\theron\n")
    config = replace(
        drawn,
        data=replace(drawn.data, tags=str(names)),
        model=replace(drawn.model, init=str(source)),
        encoder=replace(drawn.encoder, weights="imagenet"),  # the default: it is the source's
        training=replace(drawn.training, epochs=0, ema=0.5),
        tags=TagsConfig(epochs=3, lr=0.02),
    )
    fit(config, tmp_path / "tags", CPU, quiet)
    found = evaluations(tmp_path / "tags")
    assert [entry["stage"] for entry in found] == ["tags"] * 3
    assert len({entry["cider_d"] for entry in found}) == 1
    before, after = load_checkpoint(source), load_checkpoint(tmp_path / "tags/best.safetensors")
    assert after.tags.names == ("red", "blau")
    assert after.tags.forms == {"red": ("red",), "blau": ("blue", "navy")}
    assert after.scoring is not None
    assert after.vocabulary.words == before.vocabulary.words
    for name, tensor in parameters(before).items():
        if not name.startswith("tag_"):
            assert torch.equal(parameters(after)[name], tensor), name


def test_in_bfloat16_too_the_reward_reaches_every_weight(drawn: Config, tmp_path: Path) -> None:
    settings = replace(drawn.training, epochs=1, frozen_epochs=1, precision="bfloat16")
    stage = SelfCriticalConfig(epochs=1, samples=4, temperature=3.0)
    config = replace(drawn, training=settings, self_critical=stage)
    trainer = Trainer(config, read_data(config), tmp_path / "run", CPU, quiet)
    trainer.progress.epoch = 1
    trainer.begin_epoch()
    loss_of(trainer, *next(trainer.steps())).backward()  # type: ignore[no-untyped-call]
    for name, parameter in trainer.learner.model.caption_decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0.0, name


def test_another_config_or_other_data_is_refused(drawn: Config, tmp_path: Path) -> None:
    fit(drawn, tmp_path / "run", CPU, quiet)
    other = replace(drawn, optimizer=replace(drawn.optimizer, lr=0.1))
    with pytest.raises(ConfigError, match=r"optimizer.lr was 0.02, now 0.1"):
        fit(other, tmp_path / "run", CPU, quiet)
    captions = tmp_path / "data.jsonl"
    captions.write_text(captions.read_text().replace("grey paper", "grey card"))
    with pytest.raises(ConfigError, match="other photographs or captions"):
        fit(drawn, tmp_path / "run", CPU, quiet)
    (tmp_path / "run" / "resume.snapshot").write_bytes(b"cut off")
    with pytest.raises(
        ConfigError, match=r"resume\.snapshot is damaged; take another --run folder"
    ):
        fit(drawn, tmp_path / "run", CPU, quiet)


def test_encoder_learns_only_end_to_end(drawn: Config, tmp_path: Path) -> None:
    trainer = Trainer(drawn, read_data(drawn), tmp_path / "run", CPU, quiet)
    start = parameters(trainer.learner.checkpoint)
    trainer.begin_epoch()
    step(trainer, next(trainer.steps()))
    frozen = parameters(trainer.learner.checkpoint)
    encoder = [name for name in start if name.startswith("encoder.")]
    assert all(torch.equal(start[name], frozen[name]) for name in encoder)
    assert not torch.equal(start["projection.0.weight"], frozen["projection.0.weight"])
    trainer.progress.epoch = 1
    trainer.begin_epoch()
    step(trainer, next(trainer.steps()))
    free = parameters(trainer.learner.checkpoint)
    changed = {name for name in encoder if not torch.equal(frozen[name], free[name])}
    assert "encoder.backbone.features.0.0.weight" in changed
    assert not any("running" in name for name in changed)


def test_broken_photograph_is_named_and_skipped(drawn: Config, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(b"no picture")
    (tmp_path / "green.png").unlink()
    said: list[str] = []
    fit(drawn, tmp_path / "run", CPU, said.append)
    assert sum("red.png: not a picture" in line for line in said) == 1
    assert sum("green.png: it is missing" in line for line in said) == 2  # once a split
    assert [entry["epoch"] for entry in evaluations(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_features_are_shared_until_the_encoder_learns(drawn: Config, tmp_path: Path) -> None:
    settings = replace(drawn.training, features=str(tmp_path / "shared"))
    stage = SelfCriticalConfig(epochs=1, samples=2)
    config = replace(drawn, training=settings, self_critical=stage)
    said: dict[str, list[str]] = {"first": [], "second": []}
    for run, lines in said.items():
        fit(config, tmp_path / run, CPU, lines.append)
    written = [[line for line in lines if "MB to write" in line] for lines in said.values()]
    assert [len(lines) for lines in written] == [2, 1]
    assert str(tmp_path / "shared") in written[0][0]
    assert str(tmp_path / "second/features") in written[1][0]
    assert len(list(tmp_path.glob("shared/*/*/rows"))) == 1


def test_batches_are_a_function_of_the_epoch(drawn: Config, tmp_path: Path) -> None:
    dataset = Trainer(drawn, read_data(drawn), tmp_path / "run", CPU, quiet).dataset
    dataset.augmentation = "0/1"
    whole = list(batches(dataset, 3, 0, 1, 0, 0))
    rest = list(batches(dataset, 3, 0, 1, 1, 0))
    assert len(whole) == 3
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.words, b.words)
        for a, b in zip(whole[1:], rest, strict=True)
    )
    assert not torch.equal(next(batches(dataset, 3, 0, 2, 0, 0)).words, whole[0].words)


def test_what_the_config_lacks_is_named(drawn: Config) -> None:
    with pytest.raises(ConfigError, match=r"data.images is not set"):
        read_data(replace(drawn, data=replace(drawn.data, images="")))
    with pytest.raises(ConfigError, match="what to validate on"):
        read_data(replace(drawn, data=replace(drawn.data, val_captions="")))
