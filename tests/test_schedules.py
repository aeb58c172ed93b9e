"""Schedules against their closed forms, by hand and by torch's own."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from captioner.training.optimization import cosine, drops, ramp, rise


def test_the_rate_rises_as_a_line_and_stays() -> None:
    assert [rise(step, 5) for step in range(7)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]
    assert [rise(step, 0) for step in range(3)] == [1.0, 1.0, 1.0]


def test_the_cosine_falls_from_one_to_zero() -> None:
    shares = [cosine(step, 12) for step in range(13)]
    assert shares[0] == 1.0
    by_hand = {2: 0.5 + math.sqrt(3) / 4, 3: 0.5 + math.sqrt(2) / 4, 4: 0.75, 6: 0.5, 8: 0.25}
    assert {step: shares[step] for step in by_hand} == pytest.approx(by_hand)
    assert shares[12] == pytest.approx(0.0, abs=1e-12)
    assert shares == sorted(shares, reverse=True)
    assert cosine(17, 12) == shares[12]
    assert cosine(0, 0) == 1.0


@pytest.mark.parametrize(
    ("scores", "patience", "count"),
    [
        ([], 1, 0),
        ([7.0], 1, 0),
        ([1.0, 2.0, 3.0], 1, 0),
        ([2.0, 1.0], 1, 1),
        ([2.0, 2.0], 1, 1),  # as good is not better
        ([3.0, 1.0], 2, 0),
        ([3.0, 1.0, 2.0], 2, 1),  # better than the one before, but not than the best
        ([3.0, 1.0, 2.0, 2.5], 2, 1),
        ([3.0, 1.0, 2.0, 2.5, 2.9], 2, 2),
        ([3.0, 1.0, 4.0, 1.0, 1.0], 2, 1),  # a best one begins the waiting anew
        ([0.0, -1.0, -1.0], 2, 1),
    ],
)
def test_a_plateau_is_so_many_scores_without_a_best(
    scores: list[float], patience: int, count: int
) -> None:
    assert drops(scores, patience) == count


@pytest.mark.parametrize("seed", range(7))
def test_plateaus_are_where_torch_sees_them(seed: int) -> None:
    """Torch's patience counts the scores that are let pass, ours the one that drops as well."""
    generator = random.Random(seed)
    patience = generator.randint(1, 4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = ReduceLROnPlateau(optimizer, "max", 0.5, patience - 1, threshold=0.0, eps=0.0)
    scores: list[float] = []
    for _ in range(37):
        scores.append(float(generator.randint(0, 7)))
        theirs.step(scores[-1])
        assert optimizer.param_groups[0]["lr"] == 0.5 ** drops(scores, patience)


def test_the_ramp_is_a_line_from_zero() -> None:
    assert [ramp(step, 4, 0.5) for step in range(6)] == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert ramp(0, 0, 0.5) == 0.0
