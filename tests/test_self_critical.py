"""Self-critical training: the policy is what is drawn, and the gradient is the reward's."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captioner.config import DecoderConfig
from captioner.decoder import Decoder
from captioner.metrics import References
from captioner.readers import Example
from captioner.self_critical import Reward, advantages, draw, policy_gradient_loss, policy_log_probs
from captioner.vocabulary import SPECIAL, Vocabulary

WORDS = [4, 5]
MAX_WORDS = 2
CAPTIONS = [list(ids) for length in range(3) for ids in product(WORDS, repeat=length)]


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(3)
    config = DecoderConfig(embedding=7, hidden=5, attention_width=3, dropout=0.5)
    return Decoder(config, 11, len(SPECIAL) + len(WORDS)).double().eval()


@pytest.fixture
def grid() -> Tensor:
    return torch.randn(1, 4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def log_probs(decoder: Decoder, grid: Tensor, temperature: float) -> Tensor:
    rows = policy_log_probs(decoder, grid, CAPTIONS, temperature, MAX_WORDS)
    return rows.double()


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_policy_is_a_distribution_over_captions(
    decoder: Decoder, grid: Tensor, temperature: float
) -> None:
    assert log_probs(decoder, grid, temperature).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.4, 1.0])
def test_captions_are_drawn_by_the_policy(
    decoder: Decoder, grid: Tensor, temperature: float
) -> None:
    draws, generator = 4000, torch.Generator().manual_seed(0)
    images = grid.expand(draws // 100, -1, -1)
    found = draw(decoder, images, 100, temperature, MAX_WORDS, generator)
    counts = Counter(map(tuple, found))
    expected = log_probs(decoder, grid, temperature).exp() * draws
    squares = [
        (counts[tuple(caption)] - wanted) ** 2 / wanted
        for caption, wanted in zip(CAPTIONS, expected.tolist(), strict=True)
    ]
    assert sum(squares) < 22.5  # chi squared, six degrees of freedom, p = 0.001
    assert counts.keys() <= set(map(tuple, CAPTIONS))


def test_the_expected_gradient_is_the_expected_rewards(decoder: Decoder, grid: Tensor) -> None:
    """Equal when every pair of samples is weighted by its probability."""
    rewards = torch.tensor([0.1, 0.9, 0.3, 0.0, 1.4, 0.2, 0.7], dtype=torch.float64)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    policy = log_probs(decoder, grid, 0.4)
    wanted = torch.autograd.grad(-(policy.exp() * rewards).sum(), parameters, retain_graph=True)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    weights = policy.detach().exp()[pairs].prod(dim=1)
    losses = torch.stack([policy_gradient_loss(policy[p][None], rewards[p][None]) for p in pairs])
    found = torch.autograd.grad((weights * losses).sum(), parameters)
    for ours, exact in zip(found, wanted, strict=True):
        assert torch.allclose(ours, exact, atol=1e-6)
    assert any(exact.abs().max() > 1e-3 for exact in wanted)


def test_advantages_are_over_the_other_samples() -> None:
    found = advantages(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]]))
    assert found.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


def test_the_reward_counts_the_end() -> None:
    captions = [["a dog runs on grass", "the dog runs on the grass"], ["a cat sleeps"]]
    vocabulary = Vocabulary(
        sorted({word for texts in captions for t in texts for word in t.split()})
    )
    examples = [Example(Path(f"{n}.jpg"), tuple(texts)) for n, texts in enumerate(captions)]
    ids = [vocabulary.encode(text.split())[:-1] for text in ("a cat sleeps", "a dog runs on")]
    reward = Reward(examples, vocabulary, bleu_weight=0.0)
    whole, broken = reward(ids, [1, 0]).tolist()
    plain = References([[text.split() for text in texts] for texts in captions])
    assert whole == pytest.approx(10.0)  # with the end it has a 4-gram
    assert plain.cider_d([["a", "cat", "sleeps"]], [1])[0] == pytest.approx(7.5)
    assert broken < plain.cider_d([["a", "dog", "runs", "on"]], [0])[0]
    assert reward([ids[1]], [1]).item() < 0.1
    mixed = Reward(examples, vocabulary, bleu_weight=0.25)
    assert mixed([ids[0]], [1]).item() == pytest.approx(0.75 * 10.0 + 0.25, abs=1e-6)
