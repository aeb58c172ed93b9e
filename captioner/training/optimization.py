"""The optimizer, the schedule of its learning rate, gradient clipping and weight averaging."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from captioner.config import Config, OptimizerConfig
from captioner.model.model import CaptionModel

__all__ = [
    "build_average",
    "build_optimizer",
    "clip_gradients",
    "cosine",
    "drops",
    "ramp",
    "rate_factor",
    "rise",
]


def build_optimizer(model: CaptionModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return AdamW over two groups of weights, the encoder's and all others.

    ``peak`` of a group is the group's highest learning rate.
    """
    encoder = list(model.encoder.parameters())
    known = {id(parameter) for parameter in encoder}
    decoders = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [
        {"params": decoders, "peak": config.lr},
        {"params": encoder, "peak": config.encoder_lr},
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )


def rate_factor(config: Config, step: int, steps: int, scores: Sequence[float]) -> float:
    """Return the learning rate of a step as a share of the peak learning rate.

    Args:
        config: The schedule and its settings.
        step: The index of the step within the schedule, from 0.
        steps: The number of steps of the schedule.
        scores: The scores of the evaluations so far, from which a plateau is detected.

    Returns:
        A factor between 0 and 1.
    """
    risen = rise(step, config.optimizer.warmup_steps)
    if config.optimizer.schedule == "cosine":
        return risen * cosine(step, steps)
    experimental = config.experimental
    fallen: float = experimental.plateau_decay ** drops(scores, experimental.plateau_patience)
    return risen * fallen


def clip_gradients(model: nn.Module, config: Config) -> float:
    """Clip the gradients by value or by norm, as the config says; return the norm before."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if config.experimental.clip_value:
        nn.utils.clip_grad_value_(model.parameters(), config.experimental.clip_value)
    else:
        nn.utils.clip_grads_with_norm_(model.parameters(), config.optimizer.clip_norm, norm)
    return norm.item()


def build_average(model: CaptionModel, decay: float) -> AveragedModel:
    """Return a copy of the model whose ``update_parameters`` moves it towards the model.

    At update n the decay is min(``decay``, (1 + n) / (10 + n)). The low decay at first lets the
    average forget the first weights. Source of averaging: Polyak and Juditsky (1992). Source of the
    rising decay: TensorFlow's ``ExponentialMovingAverage``.
    """

    def move(average: Sequence[Tensor], present: Sequence[Tensor], updates: Tensor | int) -> None:
        kept = min(decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(list(average), list(present), 1.0 - kept)

    return AveragedModel(model, multi_avg_fn=move)


def rise(step: int, warmup: int) -> float:
    """Return the share of the peak learning rate in a linear warm-up: 1 from ``warmup`` on."""
    return min(1.0, (step + 1) / max(warmup, 1))


def cosine(step: int, steps: int) -> float:
    """Return a factor that falls as a cosine from 1 at the first step to 0 after ``steps``.

    Source: Loshchilov and Hutter, "SGDR" (2017), equation 5, with one period.
    """
    return 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))


def drops(scores: Sequence[float], patience: int) -> int:
    """Return the number of runs of ``patience`` scores, none better than the best before."""
    best, waited, count = -math.inf, 0, 0
    for score in scores:
        waited = 0 if score > best else waited + 1
        best = max(best, score)
        if waited == patience:
            waited, count = 0, count + 1
    return count


def ramp(step: int, steps: int, highest: float) -> float:
    """Return a value that rises linearly from 0 to ``highest`` over ``steps``.

    Source: the linear decay of Bengio et al., "Scheduled Sampling" (2015), section 2.4.
    """
    return highest * min(step / max(steps, 1), 1.0)
