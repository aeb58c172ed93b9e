"""The decoder: teacher forcing is stepping, and padding and neighbours change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captioner.attention import Attention
from captioner.config import DecoderConfig
from captioner.decoder import Decoder
from captioner.losses import sequence_loss
from captioner.vocabulary import BOS, PAD

B, K, N, D, A, E, H, L, V = 2, 3, 5, 7, 11, 13, 17, 19, 23


def make(attention: bool, tied: bool = True) -> Decoder:
    torch.manual_seed(1)
    return Decoder(DecoderConfig(E, H, attention, A, tied, 0.5), D, V).eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, V, (B * K, L), generator=generator)
    tokens[:, 0] = BOS
    return torch.randn(B, N, D, generator=generator), tokens


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_teacher_forcing_is_stepping(attention: bool, tied: bool) -> None:
    decoder, (grid, tokens) = make(attention, tied), inputs()
    logits, weights = decoder(grid, tokens)
    assert logits.shape == (B * K, L, V)
    assert weights.shape == (B * K, L, N)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B * K, L))
    state = decoder.start(grid)
    assert state.hidden.shape == state.cell.shape == (B, H)
    state = state.select(torch.arange(B)[:, None].expand(B, K))
    for position in range(L):
        stepped, weight, state = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(stepped, logits[:, position])
        torch.testing.assert_close(weight, weights[:, position])


def test_select_moves_rows_and_drops_images() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    state = decoder.start(grid).select(torch.arange(B)[:, None].expand(B, K))
    _, _, state = decoder.step(tokens[:, 1], state)
    rows = torch.tensor([[5, 3, 5]])  # the first image is dropped
    kept = state.select(rows)
    assert torch.equal(kept.grid, grid[1:])
    assert torch.equal(kept.hidden, state.hidden[rows[0]])
    whole, _, _ = decoder.step(tokens[:, 2], state)
    part, _, _ = decoder.step(tokens[rows[0], 2], kept)
    torch.testing.assert_close(part, whole[rows[0]])


@pytest.mark.parametrize("attention", [True, False])
def test_neighbours_change_nothing(attention: bool) -> None:
    decoder, (grid, tokens) = make(attention), inputs()
    whole, _ = decoder(grid, tokens)
    alone, _ = decoder(grid[1:], tokens[K : K + 1])
    torch.testing.assert_close(alone[0], whole[K])


def test_what_follows_changes_nothing_before() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    changed = tokens.clone()
    changed[:, 7:] = PAD
    torch.testing.assert_close(decoder(grid, changed)[0][:, :7], decoder(grid, tokens)[0][:, :7])


def test_kept_positions_are_those_of_the_whole() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    keep = torch.rand(B * K, L) < 0.5
    torch.testing.assert_close(decoder(grid, tokens, keep)[0], decoder(grid, tokens)[0][keep])


def test_gradient_at_padding_is_zero() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    targets = tokens.clone()
    targets[:, 9:] = PAD
    targets[4] = PAD
    logits, _ = decoder(grid, tokens)
    logits.retain_grad()
    sequence_loss(logits, targets, 0.1).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.equal(logits.grad[targets == PAD], torch.zeros(int((targets == PAD).sum()), V))
    assert bool((logits.grad[targets != PAD] != 0).any(dim=-1).all())


def test_plain_form_sees_the_image_only_at_the_start() -> None:
    decoder, (grid, tokens) = make(False), inputs()
    start = decoder.start(grid)
    other = start._replace(grid=torch.randn(B, N, D))
    torch.testing.assert_close(
        decoder.step(tokens[:B, 0], start)[0], decoder.step(tokens[:B, 0], other)[0]
    )


def steep_attention(scale: float) -> tuple[Attention, Tensor, Tensor]:
    torch.manual_seed(3)
    attention, grid, hidden = Attention(D, H, A), torch.randn(B, N, D), torch.randn(B * K, H)
    with torch.no_grad():
        attention.keys.weight *= scale
        attention.query.weight *= scale
    return attention, grid, hidden


@pytest.mark.parametrize("scale", [1.0, 10.0, 30.0])
def test_attention_is_additive(scale: float) -> None:
    """Products of exponentials are the tanh of Bahdanau et al., also where it is steep."""
    attention, grid, hidden = steep_attention(scale)
    context, weights = attention(hidden, attention.project(grid), grid)
    keys = attention.keys(grid).repeat_interleave(K, dim=0)
    energy = attention.energy(torch.tanh(keys + attention.query(hidden)[:, None]))
    torch.testing.assert_close(weights, energy.squeeze(-1).softmax(dim=-1), atol=1e-4, rtol=1e-4)
    expected = (weights[:, :, None] * grid.repeat_interleave(K, dim=0)).sum(dim=1)
    torch.testing.assert_close(context, expected)


def test_attention_stays_finite() -> None:
    attention, grid, hidden = steep_attention(1e4)
    _, weights = attention(hidden, attention.project(grid), grid)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B * K))
    weights.square().sum().backward()
    for parameter in attention.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


def test_image_is_projected_once() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    assert decoder.attention is not None
    calls: list[int] = []
    decoder.attention.keys.register_forward_hook(lambda *_: calls.append(1))
    decoder(grid, tokens)
    assert len(calls) == 1


@pytest.mark.parametrize("attention", [True, False])
def test_gradients_in_float64(attention: bool) -> None:
    decoder = Decoder(DecoderConfig(3, 4, attention, 5, True, 0.0), 6, 7).double()
    grid = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[BOS, 4, 5], [BOS, 6, 4]])
    assert torch.autograd.gradcheck(lambda g: decoder(g, tokens)[0], (grid,))
