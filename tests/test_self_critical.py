"""Self-critical training: the policy is what is drawn, and the gradient is the reward's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captioner.config import DecoderConfig, SelfCriticalConfig
from captioner.data.dataset import Batch
from captioner.data.example import Example
from captioner.data.vocabulary import SPECIAL, Vocabulary
from captioner.generation.options import SearchOptions
from captioner.metrics import References
from captioner.model.checkpoint import Checkpoint
from captioner.model.decoder import Decoder
from captioner.training import self_critical
from captioner.training.self_critical import (
    Reward,
    SelfCritical,
    advantages,
    draw,
    policy_gradient_loss,
    policy_log_probs,
)

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
    draws = 4000
    images = grid.expand(draws // 100, -1, -1)
    found = draw(decoder, images, 100, temperature, MAX_WORDS, range(draws // 100))
    counts = Counter(map(tuple, found))
    expected = log_probs(decoder, grid, temperature).exp() * draws
    squares = [
        (counts[tuple(caption)] - wanted) ** 2 / wanted
        for caption, wanted in zip(CAPTIONS, expected.tolist(), strict=True)
    ]
    assert sum(squares) < 22.5  # chi squared, six degrees of freedom, p = 0.001
    assert counts.keys() <= set(map(tuple, CAPTIONS))


def test_the_expected_gradient_is_the_expected_rewards(decoder: Decoder, grid: Tensor) -> None:
    """Equal when every pair of samples, whose loss is a sum, is weighted by its probability."""
    rewards = torch.tensor([0.1, 0.9, 0.3, 0.0, 1.4, 0.2, 0.7], dtype=torch.float64)
    parameters = [p for p in decoder.parameters() if p.requires_grad]
    policy = log_probs(decoder, grid, 0.4)
    wanted = torch.autograd.grad(-(policy.exp() * rewards).sum(), parameters, retain_graph=True)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    weights = policy.detach().exp()[pairs].prod(dim=1)
    losses = torch.stack([policy_gradient_loss(policy[p][None], rewards[p][None]) for p in pairs])
    found = torch.autograd.grad((weights * losses).sum() / 2, parameters)
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


S = 5
TOLD = ["a dog runs on grass", "a man 's red hat", "grass on grass"]
SETTINGS = SelfCriticalConfig(epochs=1, samples=S, temperature=0.7)


def photographs(places: Sequence[int]) -> Batch:
    """Return the features of photographs of the data; captions and tags are not looked at."""
    features = torch.randn(len(TOLD), 7, 512, generator=torch.Generator().manual_seed(6))
    nothing = torch.zeros(0, 1, dtype=torch.long)
    return Batch(list(places), features[list(places)].half(), nothing, nothing, {})


@pytest.fixture
def objective(small: Checkpoint) -> SelfCritical:
    examples = [Example(Path(f"{place}.jpg"), (text,)) for place, text in enumerate(TOLD)]
    reward = Reward(examples, small.vocabulary, 0.25)
    return SelfCritical(small.model, reward, SETTINGS, torch.float32)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Collect the captions that are drawn, in their order."""
    found: list[list[int]] = []

    def spy(*arguments: object) -> list[list[int]]:
        captions = draw(*arguments)  # type: ignore[arg-type]
        found.extend(captions)
        return captions

    monkeypatch.setattr(self_critical, "draw", spy)
    return found


def gradients(objective: SelfCritical, loss: Tensor) -> Tensor:
    """Return the gradients of the caption decoder in a row."""
    found = torch.autograd.grad(loss, list(objective.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def test_the_objective_is_the_rewards_of_what_was_drawn(
    objective: SelfCritical, small: Checkpoint, drawn: list[list[int]]
) -> None:
    """Caption by caption, each by the words of its own photograph."""
    places, limit = [2, 0], SearchOptions.max_words
    batch = photographs(places)
    torch.manual_seed(0)
    loss, figure = objective(batch, objective.counts(batch))
    assert len(drawn) == 2 * S
    reward, temperature = objective._reward, SETTINGS.temperature
    policy, rewards = [], []
    for row, caption in enumerate(drawn):
        grid = small.model.project(batch.images[row // S][None].float()).detach()
        policy.append(policy_log_probs(objective.decoder, grid, [caption], temperature, limit)[0])
        rewards.append(reward([caption], [places[row // S]])[0])
    earned = torch.stack(rewards).view(2, S)
    others = (earned.sum(dim=1, keepdim=True) - earned) / (S - 1)
    expected = -((earned - others) * torch.stack(policy).view(2, S)).sum() / (2 * S)
    assert figure.item() == pytest.approx(earned.mean().item())
    assert not figure.requires_grad
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-4)
    wanted = gradients(objective, expected)
    assert wanted.norm() > 1e-3
    assert (gradients(objective, loss) - wanted).norm() < 1e-4 * wanted.norm()


def test_parts_of_a_step_add_up(objective: SelfCritical) -> None:
    """One of them may have no photograph."""
    whole, parts = photographs([2, 0, 1]), [photographs(p) for p in ([2], [], [0, 1])]
    loss, figure = objective(whole, objective.counts(whole))
    totals = torch.stack([objective.counts(part) for part in parts]).sum(dim=0)
    assert totals.tolist() == objective.counts(whole).tolist() == [3.0 * S]
    losses, figures = zip(*(objective(part, totals) for part in parts), strict=True)
    assert torch.stack(figures).sum().item() == pytest.approx(figure.item())
    wanted = gradients(objective, loss)
    found = torch.stack([gradients(objective, part) for part in losses]).sum(dim=0)
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_an_empty_part_has_a_gradient_of_zero(objective: SelfCritical) -> None:
    loss, figure = objective(photographs([]), torch.tensor([3.0 * S]))
    assert loss.item() == figure.item() == 0.0
    assert not gradients(objective, loss).any()


def test_the_caption_decoder_learns_alone(objective: SelfCritical, small: Checkpoint) -> None:
    assert [*objective.parameters()] == [*small.model.caption_decoder.parameters()]
    batch = photographs([1, 2])
    loss, _ = objective(batch, objective.counts(batch))
    reached = torch.autograd.grad(loss, list(small.model.parameters()), allow_unused=True)
    names = [name for name, _ in small.model.named_parameters()]
    found = {name for name, g in zip(names, reached, strict=True) if g is not None}
    assert found == {name for name in names if name.startswith("caption_decoder.")}


def test_what_is_drawn_is_a_function_of_the_seed_and_the_photograph(
    objective: SelfCritical, drawn: list[list[int]]
) -> None:
    for seed, places in ((1, [1, 2]), (1, [2, 1]), (2, [1, 2])):
        objective.seed, batch = seed, photographs(places)
        objective(batch, objective.counts(batch))
    found = [drawn[start : start + S] for start in range(0, len(drawn), S)]
    assert found[:2] == found[3:1:-1]
    assert found[0] != found[4]
    assert found[1] != found[5]
