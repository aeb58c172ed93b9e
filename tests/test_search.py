"""Beam search against enumeration, hand-worked numbers, and itself."""

from __future__ import annotations

import itertools
import math
from itertools import chain
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from captioner.config import ConfigError, SearchOptions
from captioner.search import Forbid, NoRepeat, TokenRule, search
from captioner.vocabulary import BOS, EOS, PAD, UNK

V, MOST = 7, 3
NEVER = Forbid((PAD, BOS, UNK))
Scored = list[list[tuple[tuple[int, ...], float]]]


class Prefix(NamedTuple):
    """A state that carries what its row has written, so that a misplaced row shows."""

    image: Tensor  # (R,)
    written: Tensor  # (R, L)

    def select(self, rows: Tensor) -> Prefix:
        return Prefix(self.image[rows.flatten()], self.written[rows.flatten()])


class Toy:
    """Log-probabilities that depend on the image and on the whole prefix."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.log_softmax(2 * torch.randn(997, V, generator=generator), dim=-1)

    def __call__(self, tokens: Tensor, state: Prefix) -> tuple[Tensor, Prefix]:
        written = torch.cat([state.written, tokens[:, None]], dim=1)
        places = torch.arange(1, written.shape[1] + 1)
        rows = (state.image * 131 + (written * 7**places).sum(dim=1)) % len(self.table)
        return self.table[rows].clone(), Prefix(state.image, written)

    def start(self, images: list[int]) -> tuple[Tensor, Prefix]:
        count = len(images)
        return torch.full((count,), BOS), Prefix(
            torch.tensor(images), torch.empty((count, 0), dtype=torch.long)
        )

    def log_prob(self, image: int, words: tuple[int, ...]) -> float:
        _, state = self.start([image])
        total, last = 0.0, BOS
        for token in (*words, EOS):
            log_probs, state = self(torch.tensor([last]), state)
            total, last = total + float(log_probs[0, token]), token
        return total


def run(
    toy: Toy, images: list[int], options: SearchOptions, rules: tuple[TokenRule, ...] = (NEVER,)
) -> Scored:
    found = search(toy, *toy.start(images), options, rules)
    return [[(h.tokens, h.log_prob) for h in hypotheses] for hypotheses in found]


def enumerate_all(
    toy: Toy, image: int, penalty: float, repeat: bool = True
) -> list[tuple[tuple[int, ...], float]]:
    sequences = [
        words
        for length in range(MOST + 1)
        for words in itertools.product(range(4, V), repeat=length)
        if repeat or len(set(words)) == length
    ]
    scored = [(words, toy.log_prob(image, words)) for words in sequences]
    scored.sort(key=lambda pair: -pair[1] / (len(pair[0]) + 1) ** penalty)
    return scored


def assert_same(found: Scored, expected: Scored) -> None:
    assert [[words for words, _ in image] for image in found] == [
        [words for words, _ in image] for image in expected
    ]
    for (_, ours), (_, theirs) in zip(chain(*found), chain(*expected), strict=True):
        assert math.isclose(ours, theirs, abs_tol=1e-4)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.0, 0.6, 1.0, 1.7]))
def test_full_width_equals_enumeration(seed: int, penalty: float) -> None:
    toy = Toy(seed)
    options = SearchOptions(100, 5, penalty, MOST)
    assert_same(run(toy, [2, 3], options), [enumerate_all(toy, i, penalty)[:5] for i in (2, 3)])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_full_width_without_repeats_equals_enumeration(seed: int) -> None:
    toy = Toy(seed)
    options = SearchOptions(100, 3, 0.0, MOST)
    found = run(toy, [5], options, (NEVER, NoRepeat()))
    assert_same(found, [enumerate_all(toy, 5, 0.0, repeat=False)[:3]])


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_width_one_is_greedy(seed: int) -> None:
    toy = Toy(seed)
    tokens, state = toy.start([11])
    words: tuple[int, ...] = ()
    while len(words) < MOST:
        log_probs, state = toy(tokens, state)
        log_probs[:, [PAD, BOS, UNK]] = -math.inf
        tokens = log_probs.argmax(dim=-1)
        if tokens.item() == EOS:
            break
        words = (*words, int(tokens))
    assert run(toy, [11], SearchOptions(1, 1, 0.0, MOST))[0][0][0] == words


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    beam=st.integers(1, 5),
    penalty=st.sampled_from([0.0, 1.0]),
)
def test_neighbours_change_nothing(seed: int, images: list[int], beam: int, penalty: float) -> None:
    toy, options = Toy(seed), SearchOptions(beam, 1, penalty, 6)
    together = run(toy, images, options)
    assert_same(together, [run(toy, [image], options)[0] for image in images])
    assert_same(run(toy, images[::-1], options), together[::-1])


def test_hand_worked_matrix() -> None:
    """Greedy takes word 4 (0.6) and ends at 0.24; a beam of two finds word 5 at 0.36."""
    table = torch.zeros(V, V)
    table[BOS, 4], table[BOS, 5] = 0.6, 0.4
    table[4, EOS], table[4, 6] = 0.4, 0.6
    table[5, EOS], table[5, 4] = 0.9, 0.1
    table[6, EOS], table[6, 6] = 0.1, 0.9

    def step(tokens: Tensor, state: Prefix) -> tuple[Tensor, Prefix]:
        return table[tokens].log(), state

    def found(beam: int, words: int) -> list[tuple[tuple[int, ...], float]]:
        start = Toy(0).start([0])
        hypotheses = search(step, *start, SearchOptions(beam, 1, 0.0, words), [NEVER])[0]
        return [(h.tokens, round(math.exp(h.log_prob), 6)) for h in hypotheses]

    assert found(1, 2) == [((4, 6), 0.036)]
    assert found(2, 2) == [((5,), 0.36)]


def test_terms_add_up_to_the_log_prob() -> None:
    toy = Toy(3)
    for hypothesis in search(toy, *toy.start([1]), SearchOptions(5, 5, 0.5, 4), [NEVER])[0]:
        assert len(hypothesis.token_log_probs) == len(hypothesis.tokens) + 1
        assert math.isclose(sum(hypothesis.token_log_probs), hypothesis.log_prob, abs_tol=1e-5)
        assert math.isclose(toy.log_prob(1, hypothesis.tokens), hypothesis.log_prob, abs_tol=1e-5)


def test_impossible_rules_give_no_hypothesis() -> None:
    toy = Toy(3)
    assert search(toy, *toy.start([1]), SearchOptions(2, 1, 0.0, 3), [Forbid([EOS])]) == [[]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_size": 0}, "beam_size is 0; it takes 1 to 100"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0; it takes 0.0 to 4.0"),
        ({"num_captions": 4}, "num_captions is 4; it takes at most beam_size, 3"),
    ],
)
def test_options_out_of_range(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**values)
