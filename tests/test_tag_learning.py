"""Learning tags: no order is punished, what is not known competes with nothing."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.config import DecoderConfig, TagsConfig
from captioner.data.dataset import Batch
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import Decoder
from captioner.training.tag_learning import TagLearning, decoder_loss, head_loss, tag_priorities

B, N, D, V = 5, 7, 11, 13
TAGGED = [[4, 9, 12], [5], [], [4, 5, 6, 7], [12, 8]]


def decoder() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(embedding=3, hidden=17, attention_width=2, dropout=0.0), D, V)
    with torch.no_grad():
        made.output.bias.normal_(std=2.0)  # or all orders would cost the same
    return made


def grids() -> Tensor:
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(1))


def labels(unknown: int | None = None) -> Tensor:
    rows = torch.zeros(B, V, dtype=torch.int8)
    rows[:, [PAD, BOS, UNK]] = -1
    for row, ids in zip(rows, TAGGED, strict=True):
        row[ids] = 1
        if unknown is not None and unknown not in ids:
            row[unknown] = -1
    return rows


def cost(
    made: Decoder, grid: Tensor, ids: tuple[int, ...], never: tuple[int, ...] = ()
) -> list[Tensor]:
    """Return what each tag of a list costs, and its end."""
    state, token, closed, terms = made.start(grid), BOS, [PAD, BOS, UNK, *never], []
    for target in (*ids, EOS):
        logits, _, state = made.step(torch.tensor([token]), state)
        logits[:, closed] = -torch.inf
        terms.append(-logits.log_softmax(dim=-1)[0, target])
        closed, token = [*closed, target], target
    return terms


@torch.no_grad()
def greedy(made: Decoder, grid: Tensor, ids: list[int]) -> Tensor:
    """Return the cost of the order that takes the likeliest next tag at each step."""
    done: tuple[int, ...] = ()
    while left := [token for token in ids if token not in done]:
        done += (min(left, key=lambda token: float(cost(made, grid, (*done, token))[len(done)])),)
    return torch.stack(cost(made, grid, done)).sum()


def test_the_order_is_the_models_own() -> None:
    made, grid = decoder(), grids()
    expected = [greedy(made, grid[i : i + 1], ids) for i, ids in enumerate(TAGGED)]
    found = decoder_loss(made, grid, labels()).detach()
    torch.testing.assert_close(found, torch.stack(expected).sum())
    with torch.no_grad():
        worst = [
            max(float(sum(cost(made, grid[i : i + 1], order))) for order in permutations(ids))
            for i, ids in enumerate(TAGGED)
        ]
    assert float(found) < sum(worst) - 0.1


@pytest.mark.parametrize("order", ["frequent", "rare"])
def test_the_order_may_be_of_frequencies(order: str) -> None:
    made, grid = decoder(), grids()
    shares = [0.5, 0.2, 0.9, 0.3, 0.6, 0.7, 0.1, 0.8, 0.4]
    priorities = tag_priorities(TagSet([f"tag{n}" for n in range(9)], shares), order)
    sign = -1 if order == "frequent" else 1
    expected = [
        torch.stack(
            cost(made, grid[i : i + 1], tuple(sorted(ids, key=lambda t: sign * shares[t - 4])))
        ).sum()
        for i, ids in enumerate(TAGGED)
    ]
    found = decoder_loss(made, grid, labels(), priorities)
    torch.testing.assert_close(found, torch.stack(expected).sum())


def test_what_is_not_known_is_not_counted_as_absent() -> None:
    """The logits of such tags have no influence and no gradient, in the decoder and in the head."""
    made, grid = decoder(), grids()
    decoder_loss(made, grid[2:3], labels(unknown=10)[2:3]).backward()  # type: ignore[no-untyped-call]
    assert made.output.bias.grad is not None
    assert made.output.bias.grad[10] == 0.0
    assert made.output.bias.grad[11] > 0.0
    logits = torch.randn(B, V, requires_grad=True)
    head_loss(logits, labels(unknown=10)).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    known = labels(unknown=10) >= 0
    known[:, EOS] = False
    assert torch.equal(logits.grad != 0, known)


def test_the_head_has_the_binary_cross_entropy_of_each_tag() -> None:
    logits = torch.randn(B, V, generator=torch.Generator().manual_seed(2))
    right = (labels()[:, 4:] > 0).float()
    expected = F.binary_cross_entropy_with_logits(logits[:, 4:], right, reduction="sum")
    torch.testing.assert_close(head_loss(logits, labels()), expected)


def test_the_tags_alone_learn(tiny: Checkpoint) -> None:
    """The loss of their stage has a gradient at every weight of the two, and at no other."""
    model = tiny.model
    model.requires_grad_(True)
    objective = TagLearning(model, tiny.tags, TagsConfig(), torch.float32)
    rows = torch.zeros(2, len(tiny.tags.vocabulary), dtype=torch.int8)
    rows[:, [PAD, BOS, UNK]] = -1
    rows[0, [4, 6]] = 1
    features = torch.randn(2, N, model.encoder.width).half()
    batch = Batch([0, 1], features, torch.full((2, 1), BOS), rows, {})
    assert objective.counts(batch).tolist() == [4.0]
    loss, figure = objective(batch, objective.counts(batch))
    assert torch.equal(loss.detach(), figure)
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {
        n for n, _ in model.named_parameters() if n.startswith(("tag_decoder.", "tag_head."))
    }
    nothing = Batch([], torch.empty(0, 3, 1, 1), torch.empty(0, 1), torch.empty(0, 0), {})
    assert objective(nothing, objective.counts(batch))[0] == 0.0
