"""Losses against computations by hand; what is padding counts nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from captioner.data.vocabulary import PAD
from captioner.training.losses import attention_penalty, no_loss, sequence_loss

R, L, N, V = 3, 5, 7, 11
EIGHTHS = [4, 2, 1, 1]  # the probabilities 1/2, 1/4, 1/8 and 1/8


def test_the_loss_is_a_sum_of_nats() -> None:
    logits = torch.tensor([EIGHTHS, EIGHTHS, EIGHTHS]).log()
    targets = torch.tensor([1, PAD, 3])
    assert sequence_loss(logits, targets).item() == pytest.approx(math.log(4) + math.log(8))


def test_label_smoothing_by_hand() -> None:
    """Of 0.2, each of four words has 0.05; the right one has 0.8 more."""
    logits = torch.tensor([EIGHTHS, EIGHTHS]).log() + 7.0
    all_words = math.log(2) + math.log(4) + 2 * math.log(8)
    expected = 0.8 * math.log(4) + 0.05 * all_words
    found = sequence_loss(logits, torch.tensor([1, PAD]), 0.2)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_its_gradient_is_probability_less_target(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(R, L, V, generator=generator, requires_grad=True)
    targets = torch.randint(1, V, (R, L), generator=generator)
    targets[0, 3:] = targets[2] = PAD
    (found,) = torch.autograd.grad(sequence_loss(logits, targets, smoothing), logits)
    wanted = (1 - smoothing) * nn.functional.one_hot(targets, V) + smoothing / V
    expected = (logits.softmax(dim=-1) - wanted) * (targets != PAD)[:, :, None]
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[2], torch.zeros(L, V))


def test_nothing_to_say_costs_nothing() -> None:
    logits = torch.randn(0, V, requires_grad=True)
    loss = sequence_loss(logits, torch.zeros(0, dtype=torch.long), 0.1)
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, V)


def test_the_penalty_by_hand() -> None:
    """The first looks 1.25 and 0.75 at the two cells, the second 0 and 1, the third is padding."""
    weights = torch.tensor(
        [
            [[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]],
            [[0.0, 1.0], [0.3, 0.7], [0.4, 0.6]],
            [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]],
        ]
    )
    keep = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    expected = (0.25**2 + 0.25**2) / 2 + (1.0 + 0.0) / 2
    assert attention_penalty(weights, keep).item() == pytest.approx(expected)
    finer = weights.repeat_interleave(3, dim=-1)
    assert attention_penalty(finer, keep).item() == pytest.approx(expected)


def test_who_looks_everywhere_once_is_not_fined() -> None:
    weights = torch.eye(N)[torch.randperm(N)][None]
    assert attention_penalty(weights, torch.ones(1, N, dtype=torch.bool)).item() == 0.0
    assert attention_penalty(weights.roll(1, dims=1)[:, 1:], torch.ones(1, N - 1) > 0).item() > 0.0


def test_the_penalty_passes_over_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(R, L, N, generator=generator, requires_grad=True)
    keep = torch.arange(L) < torch.tensor([2, 5, 0])[:, None]
    loss = attention_penalty(weights, keep)
    (found,) = torch.autograd.grad(loss, weights)
    assert bool((found[keep] != 0).all())
    assert torch.equal(found[~keep], torch.zeros_like(found[~keep]))
    other = torch.where(keep[:, :, None], weights, torch.rand(R, L, N, generator=generator))
    assert torch.equal(attention_penalty(other, keep), loss)


def test_no_loss_has_a_gradient_of_zero_where_something_learns() -> None:
    layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 7)])
    layers[0].weight.requires_grad_(False)
    loss = no_loss(layers.parameters())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    gradients = {name: parameter.grad for name, parameter in layers.named_parameters()}
    assert gradients.pop("0.weight") is None
    for gradient in gradients.values():
        assert gradient is not None
        assert not gradient.any()
