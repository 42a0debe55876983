"""Learning rates by the number of the step, the decay of weights, and their average."""

import math
from typing import Any

import torch
from torch import Tensor, nn

# The authors' code multiplies the learning rate by EXPONENTIAL_BASE in EXPONENTIAL_STEPS steps, down to MIN_RATE.
EXPONENTIAL_BASE = 0.96
EXPONENTIAL_STEPS = 2000
MIN_RATE = 1e-6


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return an optimizer's groups: matrices and kernels with this decay, biases and normalizations without."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def cosine_factor(step: int, warmup: int, total: int) -> float:
    """Return the share of the peak learning rate: linear from 0, then half a cosine down to 0 at step ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))


def exponential_factor(step: int, warmup: int, peak: float) -> float:
    """Return the share of the peak learning rate: linear from 0, then ``0.96^(step/2000)``, at least 1e-6 in all."""
    rate: float = EXPONENTIAL_BASE ** (step / EXPONENTIAL_STEPS)
    return min((step + 1) / warmup, max(rate, MIN_RATE / peak))


def ema_decay(step: Tensor, most: float) -> Tensor:
    """Return the decay of averaged weights at step n, from 1 on: ``min(most, (1 + n) / (10 + n))``.

    A constant decay d keeps ``d^n`` of the first weights, which ruins short runs: after 300 steps 0.999 keeps 74 %.
    """
    count = step.to(torch.float32)
    return torch.clamp((1 + count) / (10 + count), max=most)
