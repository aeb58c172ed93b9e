"""The search against enumeration, a plain beam search, hand-worked numbers, and itself."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from captioner.data.vocabulary import BOS, EOS, PAD, UNK
from captioner.generation import search as search_room
from captioner.generation.beams import Collector, Hypothesis
from captioner.generation.options import SearchOptions
from captioner.generation.rules import Forbid, NoEnding, TokenRule, number_rules
from captioner.generation.search import draw_noise, search
from captioner.settings import ConfigError

V, MOST = 7, 3
NEVER = Forbid((PAD, BOS, UNK))
Words = tuple[int, ...]
Scored = list[list[tuple[Words, float]]]


class Prefix(NamedTuple):
    """A state that carries what its row has written, so that a misplaced row shows."""

    image: Tensor  # (R,)
    written: Tensor  # (R, L)

    def select(self, rows: Tensor) -> Prefix:
        return Prefix(self.image[rows.flatten()], self.written[rows.flatten()])


class Toy:
    """Log-probabilities that depend on the image and on the whole prefix."""

    def __init__(self, seed: int, words: int = V, scale: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(997, words, generator=generator)
        self.table = torch.log_softmax(logits, dim=-1)

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

    def follow(self, image: int, words: Words) -> Tensor:
        """Return the log-probabilities ``(V,)`` of what follows some words."""
        tokens, state = self.start([image])
        log_probs, state = self(tokens, state)
        for word in words:
            log_probs, state = self(torch.tensor([word]), state)
        return log_probs[0]

    def log_prob(self, image: int, words: Words) -> float:
        return sum(
            float(self.follow(image, words[:place])[token])
            for place, token in enumerate((*words, EOS))
        )


class Control(NamedTuple):
    """What a search may be told, in tokens."""

    options: SearchOptions
    forbidden: Words = ()
    no_ending: Words = ()
    required: Words = ()

    def rules(self) -> list[TokenRule]:
        most = self.options.max_words
        return [NEVER, Forbid(self.forbidden), NoEnding(self.no_ending, most)]

    def allows(self, words: Words) -> bool:
        """Whether a whole caption is as it was asked for."""
        n = self.options.no_repeat
        runs = [words[i : i + n] for i in range(len(words) - n + 1)] if n else []
        return (
            self.options.min_words <= len(words) <= self.options.max_words
            and not {PAD, BOS, UNK, *self.forbidden} & {*words}
            and words[-1:] not in [(token,) for token in self.no_ending]
            and {*self.required} <= {*words}
            and len({*runs}) == len(runs)
        )

    def norm(self, words: int) -> float:
        average = self.options.length_norm == "average"
        return float(((words + 1) if average else (words + 6) / 6) ** self.options.length_penalty)

    def search(self, toy: Toy, images: list[int], **more: Any) -> list[list[Hypothesis]]:
        return search(toy, *toy.start(images), self.options, self.rules(), self.required, **more)

    def found(self, toy: Toy, images: list[int]) -> Scored:
        return [[(h.tokens, h.log_prob) for h in found] for found in self.search(toy, images)]


@st.composite
def controls(draw: st.DrawFn, beams: st.SearchStrategy[int], most: int = MOST) -> Control:
    words = st.lists(st.integers(4, V - 1), unique=True, max_size=2).map(tuple)
    beam, required = draw(beams), draw(words)
    options = SearchOptions(
        beam_size=beam,
        num_captions=draw(st.integers(1, min(beam, 5))),
        length_penalty=draw(st.sampled_from([0.0, 0.6, 1.0, 1.7])),
        max_words=most,
        min_words=draw(st.integers(0, most)),
        length_norm=draw(st.sampled_from(["average", "gnmt"])),
        no_repeat=draw(st.integers(0, 2)),
        groups=draw(st.sampled_from([g for g in (1, 2, 3) if beam % g == 0])),
        diversity=draw(st.sampled_from([0.0, 0.5, 3.0])),
    )
    forbidden = tuple({*draw(words)} - {*required})
    return Control(options, forbidden, draw(words), required)


def plain(beam: int, num_captions: int, penalty: float, most: int) -> Control:
    return Control(SearchOptions(beam, num_captions, penalty, most, no_repeat=0))


def enumerate_all(toy: Toy, image: int, control: Control) -> list[tuple[Words, float]]:
    sequences = [
        words
        for length in range(control.options.max_words + 1)
        for words in itertools.product(range(4, V), repeat=length)
        if control.allows(words)
    ]
    scored = [(words, toy.log_prob(image, words)) for words in sequences]
    scored.sort(key=lambda pair: -pair[1] / control.norm(len(pair[0])))
    return scored


def assert_same(found: Scored, expected: Scored) -> None:
    assert [[words for words, _ in image] for image in found] == [
        [words for words, _ in image] for image in expected
    ]
    for (_, ours), (_, theirs) in zip(chain(*found), chain(*expected), strict=True):
        assert math.isclose(ours, theirs, abs_tol=1e-4)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.0, 0.6, 1.0, 1.7]))
def test_full_width_equals_enumeration(seed: int, penalty: float) -> None:
    toy, control = Toy(seed), plain(100, 5, penalty, MOST)
    expected = [enumerate_all(toy, image, control)[:5] for image in (2, 3)]
    assert_same(control.found(toy, [2, 3]), expected)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), control=controls(st.sampled_from([96, 100])))
def test_full_width_equals_enumeration_with_controls(seed: int, control: Control) -> None:
    toy = Toy(seed)
    expected = enumerate_all(toy, 5, control)[: control.options.num_captions]
    found = control.search(toy, [5])[0]
    if expected:
        assert all(hypothesis.finished for hypothesis in found)
        assert_same([[(h.tokens, h.log_prob) for h in found]], [expected])
    else:
        assert [hypothesis.finished for hypothesis in found] == [False]


class Row(NamedTuple):
    """A hypothesis of the plain beam search."""

    words: Words
    total: float
    finished: bool = False


def plain_beam_search(toy: Toy, image: int, control: Control) -> list[tuple[Words, float]]:
    """Search with lists and loops, group by group, and with no early exit."""
    options, banks = control.options, len(control.required) + 1
    size = options.beam_size // options.groups
    beams = [[Row((), 0.0)] for _ in range(options.groups)]
    ended: list[dict[Words, float]] = [{} for _ in beams]
    for position in range(options.max_words + 1):
        said: Counter[int] = Counter()
        for group, beam in enumerate(beams):
            scored = list(continuations(toy, image, beam, control, said, position))
            kept: list[Row] = []
            for bank in range(banks):
                own = [pair for pair in scored if written(pair[1], control) == bank]
                kept += [row for _, row in sorted(own, key=lambda pair: -pair[0])[:size]]
            new = [row for row in kept if row not in beam]
            ended[group] |= {row.words: row.total for row in new if row.finished}
            said.update(EOS if row.finished else row.words[-1] for row in new)
            beams[group] = kept
    ranked = [
        sorted(found.items(), key=lambda pair: -pair[1] / control.norm(len(pair[0])))[:size]
        for found in ended
    ]
    unlike: dict[Words, float] = {}
    for words, total in filter(None, chain(*itertools.zip_longest(*ranked))):
        if len(unlike) < options.num_captions:
            unlike.setdefault(words, total)
    return sorted(unlike.items(), key=lambda pair: -pair[1] / control.norm(len(pair[0])))


def written(row: Row, control: Control) -> int:
    return len({*control.required} & {*row.words})


def continuations(
    toy: Toy, image: int, beam: list[Row], control: Control, said: Counter[int], position: int
) -> Iterator[tuple[float, Row]]:
    options = control.options
    for row in beam:
        if row.finished:
            yield row.total / control.norm(len(row.words)), row
            continue
        log_probs = toy.follow(image, row.words)
        rules = [*control.rules(), *number_rules(options)]
        for rule in rules:
            log_probs = rule(torch.tensor([row.words], dtype=torch.long), log_probs[None])[0]
        for token in range(V):
            term, closes = float(log_probs[token]), token == EOS
            unready = closes and written(row, control) < len(control.required)
            if term == -math.inf or unready or (position == options.max_words and not closes):
                continue
            words = row.words if closes else (*row.words, token)
            score = row.total + term - options.diversity * said[token]
            yield score / control.norm(position), Row(words, row.total + term, closes)


@settings(max_examples=250, deadline=None)
@given(seed=st.integers(0, 10**6), control=controls(st.integers(1, 6), most=5))
def test_any_width_equals_a_plain_beam_search(seed: int, control: Control) -> None:
    toy = Toy(seed)
    expected = plain_beam_search(toy, 5, control)
    found = control.search(toy, [5])[0]
    if expected:
        assert_same([[(h.tokens, h.log_prob) for h in found]], [expected])
    else:
        assert [hypothesis.finished for hypothesis in found] == [False]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), penalty=st.sampled_from([0.0, 1.0, 4.0]))
def test_width_one_is_greedy(seed: int, penalty: float) -> None:
    toy = Toy(seed)
    words: Words = ()
    while len(words) < MOST:
        log_probs = toy.follow(11, words)
        log_probs[[PAD, BOS, UNK]] = -math.inf
        if log_probs.argmax() == EOS:
            break
        words = (*words, int(log_probs.argmax()))
    assert plain(1, 1, penalty, MOST).found(toy, [11])[0][0][0] == words


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    control=controls(st.integers(1, 6), most=6),
    sample=st.booleans(),
)
def test_neighbours_change_nothing(
    seed: int, images: list[int], control: Control, sample: bool
) -> None:
    toy = Toy(seed)
    if sample:
        options = replace(control.options, sample=True, groups=1)
        control = control._replace(options=options, required=())
    together = control.search(toy, images)
    assert together == [control.search(toy, [image])[0] for image in images]
    assert control.search(toy, images[::-1]) == together[::-1]


def test_hand_worked_matrix() -> None:
    """Greedy takes word 4 (0.6) and ends at 0.24; a beam of two finds word 5 at 0.36."""
    table = torch.zeros(V, V)
    table[BOS, 4], table[BOS, 5] = 0.6, 0.4
    table[4, EOS], table[4, 6] = 0.4, 0.6
    table[5, EOS], table[5, 4] = 0.9, 0.1
    table[6, EOS], table[6, 6] = 0.1, 0.9

    def step(tokens: Tensor, state: Prefix) -> tuple[Tensor, Prefix]:
        return table[tokens].log(), state

    def found(beam: int, words: int, required: Words = (), **more: Any) -> list[Any]:
        options = SearchOptions(beam, min(beam, 2), 0.0, words, **more)
        hypotheses = search(step, *Toy(0).start([0]), options, [NEVER], required)[0]
        return [(h.tokens, round(math.exp(h.log_prob), 6)) for h in hypotheses]

    assert found(1, 2) == [((4, 6), 0.036)]
    assert found(2, 2)[0] == ((5,), 0.36)
    assert found(1, 2, required=(5,)) == [((5,), 0.36)]
    assert found(1, 3, required=(6,)) == [((4, 6, 6), 0.0324)]
    # The second of two greedy groups is made to begin with the other word.
    assert found(2, 2, groups=2, diversity=0.0) == [((4, 6), 0.036)]
    assert found(2, 2, groups=2, diversity=1.0) == [((5,), 0.36), ((4, 6), 0.036)]


def test_a_finished_hypothesis_is_never_lost() -> None:
    """Two beams that look better while they are written do not push out the one that wins."""
    table = torch.full((V, V), 1e-9)
    table[BOS, 4], table[BOS, EOS] = 0.55, 0.40
    table[4, 4], table[4, 5], table[4, EOS] = 0.5, 0.49, 1e-9
    table[5] = table[4]

    def step(tokens: Tensor, state: Prefix) -> tuple[Tensor, Prefix]:
        return table[tokens].log(), state

    found = search(step, *Toy(0).start([0]), SearchOptions(2, 1, 1.0, 3), [NEVER])[0]
    assert found[0].tokens == ()
    assert math.isclose(found[0].log_prob, math.log(0.40), abs_tol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), control=controls(st.integers(1, 6), most=5))
def test_terms_add_up_to_the_log_prob(seed: int, control: Control) -> None:
    toy = Toy(seed)
    for h in control.search(toy, [1])[0]:
        assert len(h.token_log_probs) == len(h.tokens) + h.finished
        assert math.isclose(sum(h.token_log_probs), h.log_prob, abs_tol=1e-4)
        terms = [float(toy.follow(1, h.tokens[:i])[t]) for i, t in enumerate(h.tokens)]
        assert h.token_log_probs[: len(h.tokens)] == pytest.approx(terms, abs=1e-4)


@pytest.mark.parametrize("sample", [False, True])
def test_what_cannot_be_finished_is_marked(sample: bool) -> None:
    toy, options = Toy(3), SearchOptions(2, 1, 0.0, 3, sample=sample)
    for rule, length in ((Forbid([EOS]), 3), (Forbid(range(V)), 0)):
        ((found,), (again,)) = search(toy, *toy.start([1, 1]), options, [NEVER, rule])
        assert found == again
        assert not found.finished
        assert len(found.tokens) == len(found.token_log_probs) == length
        assert math.isclose(sum(found.token_log_probs), found.log_prob, abs_tol=1e-5)


def test_as_many_required_tokens_as_can_be_are_written() -> None:
    toy, options = Toy(3), SearchOptions(2, 1, 0.0, 5)
    (found,) = search(toy, *toy.start([1]), options, [NEVER, Forbid([6])], required=(4, 5, 6))[0]
    assert not found.finished
    assert {4, 5} <= {*found.tokens}


def test_a_wide_vocabulary_is_searched_whole() -> None:
    """The quick look at blocks of scores finds what sorting all finds, ties and edges included."""
    generator = torch.Generator().manual_seed(0)
    for words in (7, 64, 65, 640, 700, 1999, 2048):
        scores = torch.randn(3, 5, words, generator=generator)
        scores[0, 0] = scores[0, 0].round()
        scores[0, 1, : words // 2] = -torch.inf
        for count in (1, 5, 7):
            values, places = search_room._top(scores, count)
            assert torch.equal(values, scores.topk(count).values)
            assert torch.equal(values, scores.gather(2, places))


SAMPLED = SearchOptions(num_captions=50, max_words=2, sample=True)


def sampled(toy: Toy, options: SearchOptions, images: int, most: int) -> Counter[Words]:
    options = replace(options, max_words=most)
    noise = draw_noise(images, options, torch.Generator().manual_seed(5))
    control = Control(options)
    return Counter(h.tokens for f in control.search(toy, [11] * images, noise=noise) for h in f)


def drawable(toy: Toy, words: Words, options: SearchOptions, most: int) -> dict[int, float]:
    """Return what may follow, and how probably, in plain arithmetic."""
    if len(words) == most:
        return {EOS: 1.0}
    allowed = [EOS, *range(4, V)]
    weights = {t: math.exp(float(toy.follow(11, words)[t]) / options.temperature) for t in allowed}
    order = sorted(allowed, key=lambda token: -weights[token])[: options.top_k or None]
    total, reached = sum(weights[t] for t in order), 0.0
    kept: list[int] = []
    for token in order:
        if kept and reached >= options.top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    return {token: weights[token] / sum(weights[t] for t in kept) for token in kept}


def expected(
    toy: Toy, options: SearchOptions, most: int, words: Words = ()
) -> Iterator[tuple[Words, float]]:
    for token, share in drawable(toy, words, options, most).items():
        if token == EOS:
            yield words, share
        else:
            for longer, inner in expected(toy, options, most, (*words, token)):
                yield longer, share * inner


@pytest.mark.parametrize(
    "options",
    [
        SAMPLED,
        replace(SAMPLED, temperature=2.5),
        replace(SAMPLED, temperature=0.4),
        replace(SAMPLED, top_k=2),
        replace(SAMPLED, top_p=0.7),
        replace(SAMPLED, top_k=3, top_p=0.8, temperature=1.5),
        replace(SAMPLED, top_p=0.0),
    ],
)
def test_samples_come_as_often_as_they_are_probable(options: SearchOptions) -> None:
    toy = Toy(8, scale=1.0)
    counts = sampled(toy, options, 400, 2)
    probable = dict(expected(toy, options, 2))
    assert math.isclose(sum(probable.values()), 1.0, abs_tol=1e-6)
    assert set(counts) <= set(probable)
    drawn = counts.total()
    common = {words: p * drawn for words, p in probable.items() if p * drawn >= 5.0}
    assert set(common) <= set(counts)
    chi_square = sum((counts[words] - e) ** 2 / e for words, e in common.items())
    # The 99.99 % point of the distribution, by Wilson and Hilferty.
    freedom = max(len(common) - 1, 1)
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square <= bound


def test_the_seed_repeats_samples() -> None:
    toy, control = Toy(8), Control(replace(SAMPLED, num_captions=5, max_words=6))
    other = control._replace(options=replace(control.options, seed=1))
    assert control.search(toy, [1, 2]) == control.search(toy, [1, 2])
    assert control.search(toy, [1, 2]) != other.search(toy, [1, 2])


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what would make the host wait for a device."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in {"index", "index_put_"} and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self.waits += masked or name in {"_local_scalar_dense", "nonzero", "masked_select"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", [False, True])
def test_a_step_never_waits_for_the_device(sample: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the search does off the CPU: it asks only now and then, and finds the same."""
    toy, control = (
        Toy(4),
        Control(SearchOptions(6, 2, 0.7, 12, groups=1 if sample else 3), (), (5,)),
    )
    options = replace(control.options, sample=sample, no_repeat=2)
    control = control._replace(options=options, required=() if sample else (4, 6))
    images = [1, 2, 3, 4, 5]
    expected, counted = control.search(toy, images), []
    for every in (1, 100):
        monkeypatch.setattr(
            search_room, "_asks", lambda position, _, every=every: position % every == 0
        )
        monkeypatch.setattr(Collector, "collect", lambda self: [])
        with Waits() as waits:  # type: ignore[no-untyped-call]
            control.search(toy, images)
        counted.append(waits.waits)
        monkeypatch.undo()
    assert counted[0] >= 7
    assert counted[1] == 1
    monkeypatch.setattr(search_room, "_asks", lambda position, _: position % 4 == 0)
    assert control.search(toy, images) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_size": 0}, "beam_size is 0; it takes 1 to 100"),
        ({"beam_size": 2.5}, "beam_size is 2.5; it takes whole numbers, 1 to 100"),
        ({"length_penalty": -1.0}, "length_penalty is -1.0; it takes 0.0 to 4.0"),
        ({"length_penalty": math.nan}, "length_penalty is nan; it takes 0.0 to 4.0"),
        ({"temperature": 0.0}, "temperature is 0.0; it takes 0.01 to 100.0"),
        ({"top_p": 1.5}, "top_p is 1.5; it takes 0.0 to 1.0"),
        ({"num_captions": 4}, "num_captions is 4; it takes at most beam_size, 3"),
        ({"groups": 2}, "groups is 2; it takes a number that divides beam_size, 3"),
        ({"min_words": 21}, "min_words is 21; it takes at most max_words, 20"),
        ({"length_norm": "none"}, "length_norm is 'none'; it takes average or gnmt"),
        ({"forbidden": "dog"}, "forbidden is 'dog'; it takes a list of words"),
        ({"required": ["a", "dog"], "forbidden": ["Dog"]}, "both required and forbidden: dog"),
        ({"required": ["a", "b"], "max_words": 1}, "required has 2 words; it takes at most max"),
        ({"required": ["a"], "sample": True}, "goes with neither required words nor groups"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SearchOptions(**values)


def test_words_are_kept_in_lower_case_and_once() -> None:
    assert SearchOptions(forbidden=("Dog", "dog", "a")).forbidden == ("dog", "a")
