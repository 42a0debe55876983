"""Folding of batch normalisation into the convolutions before it, so that a served graph need not compute it."""

import copy

import torch
from torch import nn

from training.model import CapsNet


def folded(network: CapsNet) -> CapsNet:
    """Return the network with each normalisation of its stem folded into the convolution before it, to be evaluated.

    The given network does not change. A network without a stem has nothing to fold and is returned itself.
    """
    if not network.config.stem:
        return network
    result = copy.deepcopy(network).eval()
    layers: list[nn.Module] = []
    for layer in result.stem:
        if isinstance(layer, nn.BatchNorm2d):
            convolution = layers.pop()
            assert isinstance(convolution, nn.Conv2d)
            layer = fold(convolution, layer)
        layers.append(layer)
    result.stem = nn.Sequential(*layers)
    return result


def fold(convolution: nn.Conv2d, normalisation: nn.BatchNorm2d) -> nn.Conv2d:
    """Return one convolution with a bias that computes both. Its weights are rounded once, from double precision.

    ``gamma * (w x - mean) / sqrt(variance + epsilon) + beta`` is a convolution with the kernel ``scale * w`` and the
    bias ``beta - scale * mean``, where ``scale`` is ``gamma / sqrt(variance + epsilon)``. convolution: without a bias.
    """
    gamma, beta, mean, variance = (
        values.double()
        for values in (
            normalisation.weight,
            normalisation.bias,
            normalisation.get_buffer("running_mean"),
            normalisation.get_buffer("running_var"),
        )
    )
    with torch.no_grad():
        scale = gamma / torch.sqrt(variance + normalisation.eps)  # one number for each output channel
        result = copy.deepcopy(convolution)
        result.weight.copy_(convolution.weight * scale[:, None, None, None])
        result.bias = nn.Parameter((beta - scale * mean).to(result.weight.dtype))
    return result
