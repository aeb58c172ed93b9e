"""Teacher forcing as a whole: padding counts nothing, and the parts of a step add up to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from captioner.config import Config, ExperimentalConfig, TagsConfig, TrainingConfig
from captioner.data.dataset import Batch
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from captioner.model.checkpoint import build_model
from captioner.model.decoder import Decoder
from captioner.model.model import CaptionModel
from captioner.model.recurrence import pack
from captioner.training.teacher_forcing import TeacherForcing
from conftest import TAGS, WORDS, tiny_config

N, WIDTH = 7, 512
# The last caption was cut: it has no end.
CAPTIONS = [
    [[4, 5, 6, EOS], [7, EOS], [8, 9, 10, 11, 12, EOS]],
    [[5, 5, EOS]],
    [[12, 4, EOS], [EOS]],
    [[9, 8, 7, 6, 5, 4, 12]],
]
SPOKEN = [[4], [5, 6, 8], [], [7, 8]]
SETTINGS = Config(
    training=TrainingConfig(label_smoothing=0.2, tag_weight=0.3),
    experimental=ExperimentalConfig(attention_penalty=0.7),
    tags=TagsConfig(order="frequent"),
)
EVERYONE = range(len(CAPTIONS))


def make(tied: bool = True) -> CaptionModel:
    """Return a model without dropout whose encoder takes next to no time."""
    torch.manual_seed(0)
    config = tiny_config()
    caption, tags = (replace(d, tied=tied) for d in (config.model.caption, config.model.tags))
    config = replace(
        config,
        encoder=replace(config.encoder, name="squeezenet1_1"),
        model=replace(config.model, caption=caption, tags=tags),
    )
    return build_model(config, Vocabulary(WORDS), TagSet(TAGS)).eval()


def objective_of(
    model: CaptionModel, settings: Config = SETTINGS, dtype: torch.dtype = torch.float32
) -> TeacherForcing:
    return TeacherForcing(model, TagSet(TAGS), settings, dtype)


def features() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(CAPTIONS), N, WIDTH, generator=generator).half()


def padded(rows: Sequence[Sequence[int]], length: int) -> Tensor:
    tokens = torch.full((len(rows), length), PAD)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids) + 1] = torch.tensor([BOS, *ids])
    return tokens


def labels(spoken: Sequence[Sequence[int]]) -> Tensor:
    """Return labels ``(B, V)``; all but what is spoken is absent."""
    rows = torch.zeros(len(spoken), 4 + len(TAGS), dtype=torch.int8)
    rows[:, [PAD, BOS, UNK]] = -1
    for row, ids in zip(rows, spoken, strict=True):
        row[ids] = 1
    return rows


def batch(photographs: Sequence[int] = EVERYONE, more: int = 0) -> Batch:
    """Return photographs with as much padding as they need, and some ``more`` of each kind."""
    spoken = [SPOKEN[place] for place in photographs]
    captions = [CAPTIONS[place] for place in photographs]
    most = max(map(len, captions), default=0) + more
    rows = [ids for found in captions for ids in [*found, *[[]] * (most - len(found))]]
    longest = 1 + more + max(map(len, rows), default=0)
    places = list(photographs)
    return Batch(places, features()[places], padded(rows, longest), labels(spoken), {})


def gradients(objective: TeacherForcing, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each weight that learns."""
    learning = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(
        loss, list(learning.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(learning, found, strict=True))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare each gradient in its own measure; not all may be zero."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert sum(bool(gradient.any()) for gradient in expected.values()) > 20


def run(objective: TeacherForcing, whole: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of a batch that is a whole step."""
    loss, _ = objective(whole, objective.counts(whole))
    return loss, gradients(objective, loss)


def spelt_out(decoder: Decoder, grid: Tensor, ids: list[int], smoothing: float) -> list[Tensor]:
    """Return the sum of one sequence's cross-entropy, and how unevenly it looked."""
    logits, weights = decoder(grid, torch.tensor([[BOS, *ids[:-1]]]))
    log_probs = logits[0].log_softmax(dim=-1)
    right = log_probs[range(len(ids)), ids].sum()
    nats = -(1 - smoothing) * right - smoothing * log_probs.mean(dim=-1).sum()
    return [nats, (1.0 - weights[0].sum(dim=0)).square().mean()]


def tags_spelt_out(model: CaptionModel, grid: Tensor, ids: Sequence[int]) -> Tensor:
    """Return the loss of one photograph's tags, in the order of their ids: all are as frequent."""
    state, token, closed, nats = model.tag_decoder.start(grid), BOS, [PAD, BOS, UNK], grid.sum() * 0
    for target in [*ids, EOS]:
        logits, _, state = model.tag_decoder.step(torch.tensor([token]), state)
        logits[:, closed] = -torch.inf
        nats = nats - logits.log_softmax(dim=-1)[0, target]
        closed, token = [*closed, target], target
    assert model.tag_head is not None
    right = labels([ids])[:, 4:].float()
    logits = model.tag_head(grid)[:, 4:]
    return nats + F.binary_cross_entropy_with_logits(logits, right, reduction="sum")


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_is_that_of_the_captions_one_by_one(tied: bool) -> None:
    """Without any padding: its mean over 26 words, 7 captions, and 10 tags of all photographs."""
    model = make(tied)
    objective = objective_of(model)
    captions, tags = [], []
    for place in EVERYONE:
        grid = model.project(features()[place : place + 1].float())
        captions += [spelt_out(model.caption_decoder, grid, c, 0.2) for c in CAPTIONS[place]]
        tags.append(tags_spelt_out(model, grid, SPOKEN[place]))
    nats, uneven = (torch.stack(found).sum() for found in zip(*captions, strict=True))
    expected = nats / 26 + 0.7 * uneven / 7 + 0.3 * torch.stack(tags).sum() / 10
    loss, found = run(objective, batch())
    torch.testing.assert_close(loss, expected)
    assert_near(found, gradients(objective, expected))


def test_words_tags_and_captions_are_counted() -> None:
    objective = objective_of(make())
    assert objective.counts(batch()).tolist() == [26.0, 10.0, 7.0]
    assert objective.counts(batch(more=3)).tolist() == [26.0, 10.0, 7.0]
    assert objective.counts(batch([1, 2])).tolist() == [7.0, 5.0, 3.0]
    assert objective.counts(batch([])).tolist() == [0.0, 0.0, 0.0]


def test_the_figure_is_the_loss_without_gradient() -> None:
    objective, whole = objective_of(make()), batch()
    loss, figure = objective(whole, objective.counts(whole))
    assert torch.equal(loss, figure)
    assert loss.requires_grad
    assert not figure.requires_grad


@pytest.mark.parametrize("tied", [True, False])
def test_more_padding_changes_nothing(tied: bool) -> None:
    """Longer rows, and rows of nothing but padding."""
    objective = objective_of(make(tied))
    loss, expected = run(objective, batch())
    longer, found = run(objective, batch(more=3))
    torch.testing.assert_close(longer, loss)
    assert_near(found, expected)


def test_what_stands_after_the_end_is_not_learnt_from() -> None:
    """What EOS and PAD would say as inputs changes nothing, and has no gradient at all."""
    model = make(tied=False)
    objective = objective_of(model)
    loss, expected = run(objective, batch())
    embeddings = [d.embedding.weight for d in (model.caption_decoder, model.tag_decoder)]
    for weight in embeddings:
        with torch.no_grad():
            weight[[PAD, EOS]] = torch.randn(2, weight.shape[1])
    other, found = run(objective, batch())
    assert torch.equal(other, loss)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    for decoder in ("caption_decoder", "tag_decoder"):
        gradient = found[f"model.{decoder}.embedding.weight"]
        assert not gradient[[PAD, EOS]].any()
        assert bool(gradient[BOS].any())


@contextmanager
def embedded(decoder: Decoder) -> Iterator[list[Tensor]]:
    """Collect the embeddings that a decoder reads; they keep their gradient."""
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, found: Tensor) -> None:
        found.retain_grad()
        seen.append(found)

    handle = decoder.embedding.register_forward_hook(note)
    yield seen
    handle.remove()


def test_gradients_at_padding_are_zero() -> None:
    """Of the words as they were read: none from where a caption has ended."""
    model, whole = make(), batch(more=2)
    objective = objective_of(model)
    with embedded(model.caption_decoder) as words:
        loss, _ = objective(whole, objective.counts(whole))
    loss.backward()
    (gradient,) = (found.grad for found in words)
    assert gradient is not None
    keep = whole.words[:, 1:] != PAD
    packed = pack(keep, len(whole.images))
    moved = (gradient.abs().sum(dim=-1) > 0)[packed.packed_index] & packed.mask
    assert torch.equal(moved, keep)


def test_captions_of_padding_alone_teach_nothing() -> None:
    """The tags of such photographs do: without them, nothing does."""
    model = make()
    silent = batch()._replace(words=padded([[]] * 8, 5))
    training = replace(SETTINGS.training, tag_weight=0.0)
    objective = objective_of(model, replace(SETTINGS, training=training))
    loss, found = run(objective, silent)
    assert loss.item() == 0.0
    assert not any(bool(gradient.any()) for gradient in found.values())
    tags, found = run(objective_of(model), silent)
    assert tags.item() > 0.0
    assert not any(g.any() for n, g in found.items() if n.startswith("model.caption_decoder."))


@pytest.mark.parametrize("shares", [[[0], [1, 2, 3]], [[3, 0], [], [2], [1]]])
def test_parts_add_up_to_the_whole(shares: list[list[int]]) -> None:
    """Each has its own padding; one may have no photograph."""
    objective, whole = objective_of(make()), batch()
    expected, wanted = run(objective, whole)
    parts = [batch(share) for share in shares]
    totals = torch.stack([objective.counts(part) for part in parts]).sum(dim=0)
    assert torch.equal(totals, objective.counts(whole))
    losses, figures = zip(*(objective(part, totals) for part in parts), strict=True)
    torch.testing.assert_close(sum(figures), expected.detach())
    each = [gradients(objective, loss) for loss in losses]
    summed = {name: torch.stack([found[name] for found in each]).sum(dim=0) for name in wanted}
    assert_near(summed, wanted)


def test_parts_of_pixels_add_up_in_the_encoder_too() -> None:
    objective = objective_of(make())
    pixels = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)

    def photographs(places: Sequence[int]) -> Batch:
        return batch(places)._replace(images=pixels[list(places)])

    whole = photographs(EVERYONE)
    totals = objective.counts(whole)
    expected = gradients(objective, objective(whole, totals)[0])
    assert any(name.startswith("model.encoder.") and g.any() for name, g in expected.items())
    each = [gradients(objective, objective(photographs(p), totals)[0]) for p in ([0, 1], [2, 3])]
    assert_near({name: each[0][name] + each[1][name] for name in expected}, expected)


def test_an_empty_part_has_a_gradient_of_zero_where_something_learns() -> None:
    model = make()
    model.encoder.freeze()
    objective = objective_of(model)
    empty = batch([])._replace(images=torch.empty(0, 3, 1, 1, dtype=torch.uint8))
    loss, figure = objective(empty, torch.tensor([26.0, 10.0, 7.0]))
    loss.backward()
    assert figure.item() == 0.0
    for name, parameter in model.named_parameters():
        if name.startswith("encoder."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_settings_reach_the_decoder() -> None:
    objective, whole = objective_of(make()), batch()
    loss, expected = run(objective, whole)
    experimental = replace(SETTINGS.experimental, truncation=1)
    other = replace(SETTINGS, experimental=experimental)
    truncated, found = run(objective_of(objective.model, other), whole)
    assert torch.equal(truncated, loss)
    weight = "model.caption_decoder.initial.weight"
    assert not torch.allclose(found[weight], expected[weight], rtol=1e-2)
    objective.own_words = 1.0
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(run(objective, whole)[0].item())
    assert losses[0] == losses[1]
    assert len({*losses, loss.item()}) == 3


def test_in_bfloat16_the_loss_is_near() -> None:
    model, whole = make(), batch()
    exact, _ = run(objective_of(model), whole)
    rough, found = run(objective_of(model, dtype=torch.bfloat16), whole)
    assert rough.dtype == torch.float32
    assert rough.item() != exact.item()
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
