"""The decoder: teacher forcing is stepping, and padding and neighbours change nothing."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from captioner.config import DecoderConfig
from captioner.data.tags import TagSet
from captioner.data.vocabulary import BOS, PAD, UNK, Vocabulary
from captioner.generation.captions import write_captions
from captioner.generation.options import SearchOptions
from captioner.model.attention import Attention
from captioner.model.checkpoint import Checkpoint, build_model, load_checkpoint, save_checkpoint
from captioner.model.decoder import Decoder, DecoderState
from captioner.training.losses import sequence_loss
from conftest import TAGS, WORDS, tiny_config

Cell = Literal["lstm", "gru", "rnn"]

B, K, N, D, A, E, H, L, V = 2, 3, 5, 7, 11, 13, 17, 19, 23

each_cell = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])


def make(attention: bool, tied: bool = True, cell: Cell = "lstm") -> Decoder:
    torch.manual_seed(1)
    return Decoder(DecoderConfig(E, H, attention, A, tied, 0.5, cell), D, V).eval()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(4, V, (B * K, L), generator=generator)
    tokens[:, 0] = BOS
    return torch.randn(B, N, D, generator=generator), tokens


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@each_cell
def test_teacher_forcing_is_stepping(attention: bool, tied: bool, cell: Cell) -> None:
    decoder, (grid, tokens) = make(attention, tied, cell), inputs()
    logits, weights = decoder(grid, tokens)
    assert logits.shape == (B * K, L, V)
    assert weights.shape == (B * K, L, N)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B * K, L))
    state = decoder.start(grid)
    assert state.hidden.shape == (B, H)
    assert state.cell.shape == (B, H if cell == "lstm" else 0)
    state = state.select(torch.arange(B)[:, None].expand(B, K))
    for position in range(L):
        stepped, weight, state = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(stepped, logits[:, position])
        torch.testing.assert_close(weight, weights[:, position])


@each_cell
def test_select_moves_rows_and_drops_images(cell: Cell) -> None:
    decoder, (grid, tokens) = make(True, cell=cell), inputs()
    state = decoder.start(grid).select(torch.arange(B)[:, None].expand(B, K))
    _, _, state = decoder.step(tokens[:, 1], state)
    rows = torch.tensor([[5, 3, 5]])  # the first image is dropped
    kept = state.select(rows)
    assert torch.equal(kept.grid, grid[1:])
    assert torch.equal(kept.hidden, state.hidden[rows[0]])
    assert torch.equal(kept.cell, state.cell[rows[0]])
    whole, _, _ = decoder.step(tokens[:, 2], state)
    part, _, _ = decoder.step(tokens[rows[0], 2], kept)
    torch.testing.assert_close(part, whole[rows[0]])


def test_dropout_keeps_the_mean_and_follows_the_seed() -> None:
    decoder, x = make(True).train(), torch.ones(300, 400)
    decoder.dropout.p = 0.2
    torch.manual_seed(3)
    found = decoder.dropout(x)
    assert found.unique().tolist() == [0.0, 1.25]
    assert abs(found.mean().item() - 1.0) < 4.0 * 0.5 / x.numel() ** 0.5
    assert abs(found[:, 1:].mul(found[:, :-1]).mean().item() - 1.0) < 0.01  # no pattern
    assert not torch.equal(decoder.dropout(x), found)
    torch.manual_seed(3)
    assert torch.equal(decoder.dropout(x), found)
    assert torch.equal(decoder.eval().dropout(x), x)


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


def test_captions_that_have_ended_are_left_out() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    lengths = torch.tensor([9, 7, 2, 5, 8, 3])[: B * K]
    keep = torch.arange(L) < lengths[:, None]
    rows: list[int] = []
    assert decoder.attention is not None
    handle = decoder.attention.register_forward_hook(lambda _, read, __: rows.append(len(read[0])))
    decoder(grid, tokens, keep)
    handle.remove()
    ranks = lengths.view(B, K).amax(dim=0).tolist()
    left = [max(k for k, rank in enumerate(ranks, 1) if rank > t) for t in range(max(ranks))]
    assert rows == [B * captions for captions in left]
    assert min(left) < max(left)


@pytest.mark.parametrize("truncation", [0, 4])
@pytest.mark.parametrize("attention", [True, False])
@each_cell
def test_the_rest_is_as_if_nothing_were_left_out(
    attention: bool, cell: Cell, truncation: int
) -> None:
    """Captions of all lengths, one with a hole, one without a word."""
    decoder, (grid, tokens) = make(attention, cell=cell).double(), inputs()
    grid = grid.double().requires_grad_()
    lengths = torch.tensor([9, 7, 2, 0, 8, 3])
    keep = torch.arange(L) < lengths[:, None]
    keep[1, 3] = False
    logits, weights = decoder(grid, tokens, keep, truncation=truncation)
    expected, looked = decoder(grid, tokens, truncation=truncation)
    torch.testing.assert_close(logits, expected[keep])
    torch.testing.assert_close(weights[keep], looked[keep])
    assert not weights[torch.arange(L) >= lengths.clamp(min=1)[:, None]].any()
    found, wanted = (
        gradients(decoder, (x.square().sum() + (w * w).sum()), grid)
        for x, w in ((logits, weights[keep]), (expected[keep], looked[keep]))
    )
    assert close(found, wanted)


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
    weights = attention(attention.query(hidden), attention.project(grid))
    keys, query = attention.keys(grid)[:, None], attention.query(hidden).view(B, K, 1, A)
    energy = attention.energy(torch.tanh(keys + query))
    torch.testing.assert_close(weights, energy.squeeze(-1).softmax(dim=-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_gradients_of_attention_are_those_of_the_plain_formula(scale: float) -> None:
    """Autograd through Bahdanau's formula, for the grid, the states and every weight."""
    attention, grid, hidden = steep_attention(scale)
    attention, grid, hidden = attention.double(), grid.double(), hidden.double()
    grid.requires_grad_(), hidden.requires_grad_()
    keys, query = attention.keys(grid)[:, None], attention.query(hidden).view(B, K, 1, A)
    plain = attention.energy(torch.tanh(keys + query)).squeeze(-1).softmax(dim=-1)
    found = attention(attention.query(hidden), attention.project(grid))
    torch.testing.assert_close(found, plain)
    sign = torch.randn(B, K, N, dtype=torch.float64)
    learning = [grid, hidden, *attention.parameters()]
    ours, expected = (torch.autograd.grad((w * sign).sum(), learning) for w in (found, plain))
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
        assert wanted.any()


def test_energies_are_of_float32_in_bfloat16_too() -> None:
    attention, grid, hidden = steep_attention(1.0)
    query, keys = attention.query(hidden), attention.project(grid)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(query, keys)
    assert torch.equal(found, attention(query, keys))


def test_attention_stays_finite() -> None:
    attention, grid, hidden = steep_attention(1e4)
    weights = attention(attention.query(hidden), attention.project(grid))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(B, K))
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
@pytest.mark.parametrize("tied", [True, False])
@each_cell
def test_gradients_in_float64(attention: bool, tied: bool, cell: Cell) -> None:
    """Of logits and weights, with respect to the grid and to every weight, by differences."""
    torch.manual_seed(1)
    decoder = Decoder(DecoderConfig(3, 2, attention, 2, tied, 0.0, cell), 3, 7).double()
    names, values = zip(*decoder.named_parameters(), strict=True)
    grid = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[BOS, 4, 5], [BOS, 6, 4]])

    def run(grid: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = functional_call(
            decoder, dict(zip(names, weights, strict=True)), (grid, tokens)
        )
        return found

    assert torch.autograd.gradcheck(run, (grid, *values))


class Attending(nn.Module):
    """Attention with its projection, as one function of the grid and the states."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(3, 5, 2)

    def forward(self, grid: Tensor, hidden: Tensor) -> Tensor:
        query, keys = self.attention.query(hidden), self.attention.project(grid)
        weights: Tensor = self.attention(query, keys)
        return weights


@pytest.mark.parametrize("cached", [1, 2**18])
def test_gradients_of_attention_in_float64(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the images are taken one by one."""
    monkeypatch.setattr("captioner.model.attention._CACHED", cached)
    torch.manual_seed(1)
    attending = Attending().double()
    names, values = zip(*attending.named_parameters(), strict=True)
    grid = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(grid: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        found: Tensor = functional_call(attending, named, (grid, hidden))
        return found

    assert torch.autograd.gradcheck(run, (grid, hidden, *values))


def next_state(decoder: Decoder, x: Tensor, state: DecoderState) -> tuple[Tensor, Tensor]:
    """Return the next hidden state and cell as torch has them."""
    if isinstance(decoder.cell, nn.LSTMCell):
        hidden, kept = decoder.cell(x, (state.hidden, state.cell))
        return hidden, kept
    return decoder.cell(x, state.hidden), state.cell


@pytest.mark.parametrize("attention", [True, False])
@each_cell
def test_two_steps_by_hand(attention: bool, cell: Cell) -> None:
    """The second begins from a cell that is not the first's hidden state."""
    decoder, (grid, tokens) = make(attention, cell=cell), inputs()
    nn.init.normal_(decoder.output.bias)
    state = decoder.start(grid)
    seeds = torch.tanh(grid.mean(dim=1) @ decoder.initial.weight.T + decoder.initial.bias)
    torch.testing.assert_close(torch.cat([state.hidden, state.cell], dim=-1), seeds)
    for position in range(2):
        logits, weights, after = decoder.step(tokens[:B, position], state)
        context = torch.empty(B, 0)
        if attention:
            context = torch.einsum("bn,bnd->bd", weights, grid)
            context = context * torch.sigmoid(decoder.gate(state.hidden))
        x = decoder.embedding.weight[tokens[:B, position]] * E**0.5
        hidden, kept = next_state(decoder, torch.cat([x, context], dim=-1), state)
        torch.testing.assert_close(after.hidden, hidden)
        torch.testing.assert_close(after.cell, kept)
        fused = torch.tanh(decoder.fuse(torch.cat([hidden, context], dim=-1)))
        expected = fused @ decoder.embedding.weight.T + decoder.output.bias
        torch.testing.assert_close(logits, expected)
        state = after


@each_cell
def test_each_cell_learns_in_bfloat16(cell: Cell) -> None:
    decoder, (grid, tokens) = make(True, cell=cell), inputs()
    exact, _ = decoder(grid, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = decoder(grid, tokens)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), exact, atol=0.1, rtol=0.0)
    sequence_loss(logits, tokens).backward()  # type: ignore[no-untyped-call]
    for parameter in decoder.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert bool(parameter.grad.any())


def captioner_of(cell: Cell) -> Checkpoint:
    """Return a tiny captioner whose captions depend on the photograph."""
    torch.manual_seed(4)
    config = tiny_config()
    caption, tagger = (replace(d, cell=cell) for d in (config.model.caption, config.model.tags))
    config = replace(
        config,
        encoder=replace(config.encoder, name="squeezenet1_1"),
        model=replace(config.model, caption=caption, tags=tagger),
    )
    words, tags = Vocabulary(WORDS), TagSet(TAGS)
    model = build_model(config, words, tags).eval()
    with torch.no_grad():
        model.caption_decoder.initial.weight *= 30.0
    return Checkpoint(model, config, words, tags)


def greedy(decoder: Decoder, grid: Tensor, words: int) -> list[int]:
    """Return the likeliest words of one photograph, one after the other, special ones excepted."""
    state, token, found = decoder.start(grid), torch.tensor([BOS]), []
    for _ in range(words):
        logits, _, state = decoder.step(token, state)
        logits[:, [PAD, BOS, UNK]] = -torch.inf
        token = logits.argmax(dim=-1)
        found.append(int(token))
    return found


@each_cell
def test_each_cell_is_searched_and_comes_back_from_a_file(cell: Cell, tmp_path: Path) -> None:
    made = captioner_of(cell)
    grids = torch.randn(7, N, 11, generator=torch.Generator().manual_seed(5))
    save_checkpoint(made, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert loaded.config.model.caption.cell == loaded.config.model.tags.cell == cell
    assert type(loaded.model.tag_decoder.cell) is type(made.model.tag_decoder.cell)
    for beam_size in (1, 3):
        options = SearchOptions(beam_size=beam_size, max_words=6, no_repeat=0)
        found = [
            write_captions([c.model.caption_decoder], made.vocabulary, [grids], options)
            for c in (made, loaded)
        ]
        assert found[0] == found[1]
        assert len({image[0].text for image in found[0]}) > 1
        if options.beam_size == 1:
            for grid, (caption,) in zip(grids, found[0], strict=True):
                expected = greedy(made.model.caption_decoder, grid[None], 6)
                assert list(caption.words) == made.vocabulary.decode(expected)


def gradients(decoder: Decoder, loss: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a loss with respect to the grid and each weight."""
    learning = {"grid": grid, **dict(decoder.named_parameters())}
    found = torch.autograd.grad(
        loss, list(learning.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(learning, found, strict=True))


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether all gradients are the same up to rounding."""
    return all(torch.allclose(found[n], expected[n], atol=1e-9, rtol=1e-7) for n in expected)


@pytest.mark.parametrize("attention", [True, False])
@each_cell
def test_truncated_gradients_are_those_of_the_segments(attention: bool, cell: Cell) -> None:
    """Each segment alone, from the state in which the one before left off: L = 5 + 5 + 5 + 4."""
    decoder = make(attention, cell=cell).double()
    grid, tokens = inputs()
    grid = grid.double().requires_grad_()
    sign = torch.randn(B * K, L, V, dtype=torch.float64)
    whole, _ = decoder(grid, tokens)
    truncated, _ = decoder(grid, tokens, truncation=5)
    assert torch.equal(whole, truncated)
    rows = torch.arange(B)[:, None].expand(B, K)
    hidden, kept = decoder.start(grid).select(rows)[2:]
    total: dict[str, Tensor] = {}
    for first in range(0, L, 5):
        state = decoder.start(grid)._replace(hidden=hidden, cell=kept)
        loss = torch.zeros((), dtype=torch.float64)
        for position in range(first, min(first + 5, L)):
            logits, _, state = decoder.step(tokens[:, position], state)
            loss = loss + (logits * sign[:, position]).sum()
        found = gradients(decoder, loss, grid)
        total = {name: total.get(name, 0) + gradient for name, gradient in found.items()}
        hidden, kept = state.hidden.detach(), state.cell.detach()
    assert close(gradients(decoder, (truncated * sign).sum(), grid), total)
    assert not close(gradients(decoder, (whole * sign).sum(), grid), total)
    for truncation in (L, L + 1):
        same, _ = decoder(grid, tokens, truncation=truncation)
        full = gradients(decoder, (whole * sign).sum(), grid)
        assert close(gradients(decoder, (same * sign).sum(), grid), full)


@contextmanager
def reading(decoder: Decoder) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect what the decoder reads: tokens, and their embeddings, which keep their gradient."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, read: tuple[Tensor], embedded: Tensor) -> None:
        embedded.retain_grad()
        seen.append((read[0], embedded))

    handle = decoder.embedding.register_forward_hook(note)
    yield seen
    handle.remove()


@each_cell
def test_gradients_go_back_to_the_start_of_their_segment(cell: Cell) -> None:
    decoder, (grid, tokens) = make(True, tied=False, cell=cell), inputs()
    for position, first in ((4, 0), (5, 5), (7, 5), (9, 5), (10, 10)):
        with reading(decoder) as seen:
            logits, _ = decoder(grid, tokens, truncation=5)
        logits[:, position].square().sum().backward()
        reached = seen[0][1].grad
        assert reached is not None
        moved = reached.view(L, B * K, E).abs().sum(dim=(1, 2)) > 0
        assert moved.tolist() == [first <= place <= position for place in range(L)]


def test_without_own_words_no_chance_is_used() -> None:
    decoder, (grid, tokens) = make(True), inputs()
    before = torch.get_rng_state()
    assert torch.equal(decoder(grid, tokens, own_words=0.0)[0], decoder(grid, tokens)[0])
    assert torch.equal(torch.get_rng_state(), before)
    decoder(grid, tokens, own_words=0.1)
    assert not torch.equal(torch.get_rng_state(), before)


@each_cell
def test_a_sure_decoder_reads_its_own_likeliest_words(cell: Cell) -> None:
    decoder, (grid, tokens) = make(True, tied=False, cell=cell), inputs()
    with torch.no_grad():
        decoder.output.weight *= 1e7  # no two words are near each other
        decoder.initial.weight *= 30.0
    unread = tokens.clone()
    unread[:, 1:] = PAD
    logits, weights = decoder(grid, unread, own_words=1.0)
    state = decoder.start(grid).select(torch.arange(B)[:, None].expand(B, K))
    token = tokens[:, 0]
    said = []
    for position in range(L):
        stepped, weight, state = decoder.step(token, state)
        assert torch.equal(logits[:, position].argmax(dim=-1), stepped.argmax(dim=-1))
        torch.testing.assert_close(weights[:, position], weight)
        token = stepped.argmax(dim=-1)
        said.append(token)
    assert len(set(torch.cat(said).tolist())) > 3


def words_read(seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the words ``(R, L)`` that a decoder with words of its own has read."""
    return torch.stack([words for words, _ in seen], dim=1)


def mixed(decoder: Decoder, rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Return the words ``(R, L)`` that were read where all given ones are 4, and the logits."""
    grid = inputs()[0][:1]
    tokens = torch.full((rows, L), 4)
    tokens[:, 0] = BOS
    with reading(decoder) as seen:
        logits, _ = decoder(grid, tokens, own_words=share)
    return words_read(seen), logits


@pytest.mark.parametrize("share", [0.25, 0.7])
def test_as_many_words_are_its_own_as_is_said(share: float) -> None:
    decoder = make(True)
    with torch.no_grad():
        decoder.output.bias[4] = -1e4  # so that it never says what it is given
    torch.manual_seed(6)
    read, _ = mixed(decoder, 600, share)
    assert bool((read[:, 0] == BOS).all())
    own = (read[:, 1:] != 4).double()
    sigma = (share * (1.0 - share) / own.numel()) ** 0.5
    assert abs(own.mean().item() - share) < 4.0 * sigma
    worst = (own.mean(dim=0) - share).abs().max().item()
    assert worst < 5.0 * sigma * (L - 1) ** 0.5


def test_its_own_words_come_as_often_as_they_are_probable() -> None:
    """The second word is drawn from what the decoder says after BOS: chi squared."""
    decoder, rows = make(True), 3000
    with torch.no_grad():
        decoder.output.weight *= 3.0
    torch.manual_seed(7)
    read, logits = mixed(decoder, rows, 1.0)
    expected = logits[0, 0].softmax(dim=-1) * rows
    counts = torch.bincount(read[:, 1], minlength=V)
    assert ((counts - expected).square() / expected).sum().item() < 48.3  # 22 degrees, p = 0.001
    elsewhere = logits[0, 1].softmax(dim=-1) * rows
    assert ((counts - elsewhere).square() / elsewhere).sum().item() > 48.3


def test_own_words_are_a_function_of_the_seed() -> None:
    decoder = make(True)
    reads = []
    for seed in (8, 8, 9):
        torch.manual_seed(seed)
        reads.append(mixed(decoder, 5, 0.5)[0])
    assert torch.equal(reads[0], reads[1])
    assert not torch.equal(reads[0], reads[2])


@each_cell
def test_own_words_are_read_as_if_they_were_given(cell: Cell) -> None:
    """Also by the gradient: none goes through the drawing."""
    decoder = make(True, cell=cell).double()
    grid, tokens = inputs()
    grid = grid.double().requires_grad_()
    torch.manual_seed(10)
    with reading(decoder) as seen:
        logits, weights = decoder(grid, tokens, own_words=0.5, truncation=7)
    read = words_read(seen)
    assert 0.3 < (read != tokens).double().mean().item() < 0.7
    given, looked = decoder(grid, read, truncation=7)
    torch.testing.assert_close(logits, given)
    torch.testing.assert_close(weights, looked)
    found, expected = (gradients(decoder, x.square().sum(), grid) for x in (logits, given))
    assert close(found, expected)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("attention", [False, True])
def test_packed_weights_compute_the_same(cell: Cell, attention: bool) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(cell=cell, attention=attention, hidden=23, embedding=19)
    decoder = Decoder(config, 29, 31).eval()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    packed, grid = pickle.loads(pickle.dumps(decoder.packed())), torch.randn(3, 5, 29)
    assert packed is not decoder
    with torch.inference_mode():
        ours, theirs = decoder.start(grid), packed.start(grid)
        for tokens in torch.randint(31, (4, 3)):
            logits, _, ours = decoder.step(tokens, ours)
            again, _, theirs = packed.step(tokens, theirs)
            assert torch.allclose(logits, again, atol=1e-5)
    assert all(torch.equal(before[name], x) for name, x in decoder.state_dict().items())
    assert decoder.double().packed() is decoder
