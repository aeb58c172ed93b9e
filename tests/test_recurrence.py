"""Packing: rows from the longest to the shortest, each position at its place."""

from __future__ import annotations

import torch

from captioner.model.recurrence import pack


def test_rows_are_packed_from_the_longest_to_the_shortest() -> None:
    mask = torch.tensor(
        [
            [1, 1, 0, 1, 0],  # to the fourth
            [1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0],  # still reads the first
            [1, 1, 1, 0, 0],
        ]
    ).bool()
    packed = pack(mask, images=2)
    assert packed.order.tolist() == [0, 3, 1, 2]
    assert packed.sizes == [4, 3, 2, 1]
    assert packed.rows_per_image == [2, 2, 2, 1]
    assert [index.tolist() for index in packed.padded_index] == [
        [0, 3, 1, 2],
        [0, 3, 1],
        [0, 3],
        [0],
    ]
    assert packed.mask.sum(dim=1).tolist() == [4, 2, 1, 3]
    assert packed.packed_index.tolist() == [
        [0, 4, 7, 9, 0],
        [2, 6, 0, 0, 0],
        [3, 0, 0, 0, 0],
        [1, 5, 8, 0, 0],
    ]
