"""Layers at many positions: what they give, and gradients that are one product for them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from captioner.model.recurrence import Products, layer, pack

SIZES = [5, 3, 3, 2]
ROWS, INPUTS, OUTPUTS = sum(SIZES), 7, 11

Learnt = dict[str, Tensor]


def made() -> Learnt:
    torch.manual_seed(0)
    shapes = {"weight": (OUTPUTS, INPUTS), "bias": (OUTPUTS,), "read": (ROWS, INPUTS)}
    return {name: torch.randn(s).double().requires_grad_() for name, s in shapes.items()}


def each_position(of: Learnt, width: int) -> Tensor:
    """Return what a layer gives when it reads all but ``width`` columns position by position."""
    product = layer(of["weight"], of["bias"], of["read"][:, :width], SIZES)
    return torch.cat([product(rows) for rows in torch.split(of["read"][:, width:], SIZES)])


def gradients(result: Tensor, of: Learnt, names: list[str]) -> tuple[Tensor, ...]:
    loss = (result * torch.arange(result.numel()).view_as(result)).sum()
    return torch.autograd.grad(loss, [of[name] for name in names], retain_graph=True)


@pytest.mark.parametrize("width", [0, 4, INPUTS])
def test_a_layer_is_linear_at_each_position(width: int) -> None:
    of = made()
    expected, found = F.linear(of["read"], of["weight"], of["bias"]), each_position(of, width)
    torch.testing.assert_close(found, expected)
    for wanted, gradient in zip(
        gradients(expected, of, list(of)), gradients(found, of, list(of)), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_one_gradient_does_not_change_the_next() -> None:
    """Neither another one through the same positions, nor one that the weight has no part in."""
    of = made()
    found = each_position(of, 4)
    whole = gradients(found, of, list(of))
    gradients(found, of, ["read"])
    for once, again in zip(whole, gradients(found, of, list(of)), strict=True):
        assert torch.equal(once, again)


def test_positions_that_nothing_depends_on_count_nothing() -> None:
    of = made()
    found = each_position(of, 4)[: sum(SIZES[:2])]
    weight, bias, read = gradients(found, of, list(of))
    expected = F.linear(of["read"][: len(found)], of["weight"], of["bias"])
    wanted = gradients(expected, of, list(of))
    torch.testing.assert_close((weight, bias, read), wanted)
    assert not read[len(found) :].any()


def test_rows_take_the_number_type_of_the_weights() -> None:
    of = {name: tensor.detach() for name, tensor in made().items()}
    weight, bias = of["weight"].bfloat16(), of["bias"].bfloat16()
    product = layer(weight, bias, of["read"][:, :4], [ROWS])
    found = product(of["read"][:, 4:])
    assert found.dtype == torch.bfloat16
    expected = F.linear(of["read"], of["weight"], of["bias"])
    torch.testing.assert_close(found.double(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("names", [["base", "factor", "read"], ["factor", "read"]])
def test_a_factor_may_be_one_of_many(names: list[str]) -> None:
    """A product of matrices for each of three images, also where nothing is added to it."""
    torch.manual_seed(0)
    shapes = {"base": (3, ROWS, OUTPUTS), "factor": (3, INPUTS, OUTPUTS), "read": (3, ROWS, INPUTS)}
    of = {name: torch.randn(s).double().requires_grad_() for name, s in shapes.items()}
    if "base" not in names:
        of["base"] = torch.zeros(()).double().expand(shapes["base"])
    product = Products(of["base"], of["factor"], SIZES)
    found = torch.cat([product(rows) for rows in torch.split(of["read"], SIZES, dim=1)], dim=1)
    expected = of["base"] + of["read"] @ of["factor"]
    torch.testing.assert_close(found, expected)
    for wanted, gradient in zip(
        gradients(expected, of, names), gradients(found, of, names), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


def test_rows_are_packed_from_the_longest_to_the_shortest() -> None:
    keep = torch.tensor(
        [
            [1, 1, 0, 1, 0],  # to the fourth
            [1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0],  # still reads the first
            [1, 1, 1, 0, 0],
        ]
    ).bool()
    packed = pack(keep, images=2)
    assert packed.order.tolist() == [0, 3, 1, 2]
    assert packed.sizes == [4, 3, 2, 1]
    assert packed.ranks == [2, 2, 2, 1]
    assert [seats.tolist() for seats in packed.seats] == [[0, 3, 1, 2], [0, 3, 1], [0, 3], [0]]
    assert packed.reached.sum(dim=1).tolist() == [4, 2, 1, 3]
    assert packed.places.tolist() == [
        [0, 4, 7, 9, 0],
        [2, 6, 0, 0, 0],
        [3, 0, 0, 0, 0],
        [1, 5, 8, 0, 0],
    ]
