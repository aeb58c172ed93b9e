"""How weights learn: groups, rates, bounds and averages against their closed forms."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from captioner.config import Config, ExperimentalConfig, OptimizerConfig
from captioner.model.checkpoint import Checkpoint
from captioner.model.model import CaptionModel
from captioner.training.optimization import (
    build_average,
    build_optimizer,
    clip_gradients,
    rate_factor,
)

OPTIMIZER = OptimizerConfig(lr=0.03, encoder_lr=0.002, weight_decay=0.1, warmup_steps=5)
CONFIG = Config(optimizer=OPTIMIZER)


@pytest.fixture
def model(small: Checkpoint) -> CaptionModel:
    """Return a model that a test may change."""
    return deepcopy(small.model)


def test_every_weight_learns_once_at_the_rate_of_its_kind(model: CaptionModel) -> None:
    """The first step of AdamW goes as far as its rate, whatever the gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OPTIMIZER)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = OPTIMIZER.encoder_lr if name.startswith("encoder.") else OPTIMIZER.lr
        expected = before[name] * (1.0 - rate * OPTIMIZER.weight_decay) - rate
        torch.testing.assert_close(parameter.detach(), expected)


def test_the_rate_rises_and_falls_as_a_cosine() -> None:
    found = [rate_factor(CONFIG, step, 16, [9.0, 1.0, 1.0, 1.0]) for step in range(17)]
    expected = [
        min((step + 1) / 5, 1.0) * (1 + math.cos(math.pi * step / 16)) / 2 for step in range(17)
    ]
    assert found == pytest.approx(expected)
    assert max(found) == found[4]


def test_the_rate_falls_at_each_plateau() -> None:
    config = Config(
        optimizer=replace(OPTIMIZER, schedule="plateau"),
        experimental=ExperimentalConfig(plateau_patience=2, plateau_decay=0.3),
    )
    scores = [5.0, 4.0, 3.0, 6.0, 6.0, 6.0, 6.0, 6.0]
    found = [rate_factor(config, 100, 101, scores[:count]) for count in range(9)]
    assert found == pytest.approx([1, 1, 1, 0.3, 0.3, 0.3, 0.09, 0.09, 0.027])
    assert rate_factor(config, 1, 101, scores) == pytest.approx(0.4 * 0.027)


def with_gradients(scale: float) -> tuple[nn.Module, Tensor]:
    """Return a module, one of whose weights is frozen, and all its gradients in a row."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 7))
    module[0].weight.requires_grad_(False)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.grad = scale * torch.randn_like(parameter)
    return module, row_of(module)


def row_of(module: nn.Module) -> Tensor:
    """Return a copy of a module's gradients in a row."""
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def clipping(clip_norm: float = 5.0, clip_value: float = 0.0) -> Config:
    """Return a config with bounds of the gradient."""
    optimizer, experimental = OptimizerConfig(clip_norm=clip_norm), ExperimentalConfig()
    experimental = replace(experimental, clip_value=clip_value)
    return Config(optimizer=optimizer, experimental=experimental)


def test_a_long_gradient_is_shortened_and_keeps_its_direction() -> None:
    module, before = with_gradients(10.0)
    found = clip_gradients(module, clipping(clip_norm=2.0))
    assert found == pytest.approx(before.square().sum().sqrt().item())
    assert found > 2.0
    torch.testing.assert_close(row_of(module), before * (2.0 / found))


def test_a_short_gradient_is_left_alone() -> None:
    module, before = with_gradients(0.01)
    found = clip_gradients(module, clipping(clip_norm=2.0))
    assert found == pytest.approx(before.norm().item())
    assert torch.equal(row_of(module), before)


def test_where_values_are_bounded_the_norm_is_not() -> None:
    module, before = with_gradients(10.0)
    found = clip_gradients(module, clipping(1e-3, 3.0))
    assert found == pytest.approx(before.norm().item())
    assert torch.equal(row_of(module), before.clamp(-3.0, 3.0))
    assert (before.abs() < 3.0).any()
    assert (before.abs() > 3.0).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip_value", [0.0, 3.0])
def test_a_gradient_that_is_not_finite_is_told(bad: float, clip_value: float) -> None:
    module, _ = with_gradients(1.0)
    gradient = next(p.grad for p in module.parameters() if p.grad is not None)
    gradient.view(-1)[2] = bad
    assert not math.isfinite(clip_gradients(module, clipping(clip_value=clip_value)))


def shares(count: int, decay: float) -> list[float]:
    """Return what share of the average each of so many updates has: they add up to 1."""
    found: list[float] = []
    for n in range(count):
        kept = min(decay, (1 + n) / (10 + n)) if n else 0.0
        found = [*(kept * share for share in found), 1.0 - kept]
    return found


def test_the_average_is_its_closed_form(model: CaptionModel) -> None:
    """After seven updates 8/17 would be kept: more than the decay, which rules from there on."""
    average = build_average(model, decay=0.47)
    torch.manual_seed(2)
    past: list[dict[str, Tensor]] = []
    for _ in range(13):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        past.append({n: p.detach().double() for n, p in model.named_parameters()})
        average.update_parameters(model)
    weights = shares(13, 0.47)
    assert sum(weights) == pytest.approx(1.0)
    assert weights[-1] == pytest.approx(0.53)
    for name, found in average.module.named_parameters():
        expected = sum(w * p[name] for w, p in zip(weights, past, strict=True))
        torch.testing.assert_close(found.detach().double(), expected, atol=2e-6, rtol=1e-6)
        assert torch.equal(past[-1][name], model.get_parameter(name).double())


def test_at_first_the_average_forgets_quickly(model: CaptionModel) -> None:
    average = build_average(model, decay=0.999)
    bias = model.caption_decoder.output.bias
    found = []
    for value in (3.0, 5.0, 7.0):
        nn.init.constant_(bias, value)
        average.update_parameters(model)
        found.append(average.module.get_parameter("caption_decoder.output.bias")[0].item())
    second = 3.0 * 2 / 11 + 5.0 * 9 / 11
    assert found == pytest.approx([3.0, second, second * 3 / 12 + 7.0 * 9 / 12])


def test_the_average_has_the_models_buffers_and_ties(tiny: Checkpoint) -> None:
    average = build_average(tiny.model, decay=0.9)
    for _ in range(2):
        for buffer in tiny.model.buffers():
            buffer.add_(3)
        average.update_parameters(tiny.model)
    inner = cast(CaptionModel, average.module)
    buffers = dict(inner.named_buffers())
    assert len(buffers) > 1
    for name, buffer in tiny.model.named_buffers():
        assert torch.equal(buffers[name], buffer)
        assert buffers[name].data_ptr() != buffer.data_ptr()
    decoder = inner.caption_decoder
    assert decoder.output.weight is decoder.embedding.weight
    assert decoder.embedding.weight is not tiny.model.caption_decoder.embedding.weight
