"""Capsule networks with changes that may let a primary capsule be absent, for ``benchmarks.absent_capsules``.

Axes, as in training.model: B images, T primary types, h w the primary grid, I = T*h*w primary capsules, D their
dimension, J classes, E digit capsule dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.model import GATE_BIAS, CapsNet, CapsNetConfig, lengths, squash, votes

SQUASHES = ("paper", "far", "threshold", "exponential")
NORMALIZATIONS = ("none", "batch", "type")
FAR_SQUARE = 10.0  # c of |s|^2 / (c + |s|^2)
THRESHOLD = 1.0  # lengths up to it are squashed to 0


@dataclass(frozen=True)
class Change:
    """The differences of a network from CapsNet. The defaults change nothing.

    squash: of the primary capsules, by their length n: ``paper`` for ``n^2 / (1 + n^2)``, ``far`` with 10 in place of
    1, ``threshold`` for the paper's of ``max(0, n - 1)``, ``exponential`` for ``1 - exp(-n)`` (Mazzia, Salvetti and
    Chiaberge, "Efficient-CapsNet", 2021, whose published code has this one). normalization: before that squash, of
    each channel over the batch, or of each type's channels over all positions of one image. types_compete: a further
    convolution has a logit for each capsule; their softmax over the types at a position, and over a type that stays
    absent, multiplies the squashed capsules. longest: how many primary capsules of an image remain, the others are 0;
    0 for all. learned_scale: the factor of the routing logits is learned. weights: factor of the primary convolution's
    initial weights. bias: its initial bias, None for PyTorch's.
    """

    squash: str = "paper"
    normalization: str = "none"
    types_compete: bool = False
    longest: int = 0
    learned_scale: bool = False
    weights: float = 1.0
    bias: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("squash", SQUASHES), ("normalization", NORMALIZATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}; expected one of {', '.join(known)}")


def squash_primary(s: Tensor, kind: str) -> Tensor:
    """Shrink vectors (..., D) to lengths below 1 by one of SQUASHES. A vector of length 0 stays, with a gradient."""
    if kind == "paper":
        return squash(s)
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    safe = length.clamp_min(1e-6)
    if kind == "far":
        factor = length / (FAR_SQUARE + length.square())
    elif kind == "threshold":
        above = torch.relu(length - THRESHOLD)
        factor = above.square() / (1 + above.square()) / safe
    else:
        factor = -torch.expm1(-safe) / safe
    squashed: Tensor = s * factor
    return squashed


def route_scaled(u: Tensor, weight: Tensor, iterations: int, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Route by agreement like ``training.model.route``, with logits that a learned scale, (), multiplies.

    u: (B, I, D); weight: (I, D, J, E). Returns poses (B, J, E) and the last couplings (B, J, I).
    """
    u_hat = votes(u, weight)  # (B, J, I, E)
    b = u_hat.new_zeros(u_hat.shape[:3])  # (B, J, I)
    for iteration in range(iterations):
        c = b.softmax(dim=1)
        v = squash((c.unsqueeze(2) @ u_hat).squeeze(2))  # (B, J, E)
        if iteration < iterations - 1:
            b = b + scale * (u_hat @ v.unsqueeze(-1)).squeeze(-1)
    return v, c


class ChangedCapsNet(CapsNet):
    """The network with changes. Its initial weights are those of CapsNet after the same seed, where both have them.

    primary_lengths: (B, I), of the last images that went through it, with their gradient.
    """

    def __init__(self, config: CapsNetConfig, change: Change) -> None:
        super().__init__(config)
        self.change = change
        self.primary_lengths = torch.empty(0)
        types, channels = config.primary_types, self.primary.out_channels
        self.normalize: nn.Module = nn.Identity()
        if change.normalization == "batch":
            self.normalize = nn.BatchNorm2d(channels)
        elif change.normalization == "type":
            self.normalize = nn.GroupNorm(types, channels)
        if change.types_compete:
            self.gate = nn.Conv2d(
                config.convolutions[-1][0], types, config.primary_kernel, stride=config.primary_stride
            )
            assert self.gate.bias is not None
            nn.init.constant_(self.gate.bias, GATE_BIAS)
        if change.learned_scale:
            self.log_scale = nn.Parameter(torch.zeros(()))
        assert self.primary.bias is not None
        with torch.no_grad():
            self.primary.weight.mul_(change.weights)
            if change.bias is not None:
                self.primary.bias.fill_(change.bias)

    def primary_capsules(self, images: Tensor) -> Tensor:
        """Return primary capsules (B, I, D) of images (B, C, H, W)."""
        config, change = self.config, self.change
        features = self.stem(images) if config.stem else torch.relu(self.conv1(images))
        divisor = config.primary_divisor
        maps = self.normalize(self.primary(features if divisor == 1 else features / divisor))  # (B, T*D, h, w)
        capsules = maps.unflatten(1, (config.primary_types, -1)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        u = squash_primary(capsules[..., : config.primary_dim], change.squash)  # (B, I, D)
        if config.primary_gate:
            u = torch.sigmoid(capsules[..., -1:]) * u
        if change.types_compete:
            logits = self.gate(features).float()  # (B, T, h, w)
            shares = torch.cat([logits, torch.zeros_like(logits[:, :1])], 1).softmax(1)[:, :-1]
            u = u * shares.flatten(1).unsqueeze(-1)
        if change.longest:
            length = lengths(u)
            least = length.topk(change.longest, dim=1).values[:, -1:]
            u = u * (length >= least).unsqueeze(-1)
        self.primary_lengths = lengths(u)
        return u

    def routed(self, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Return the poses (B, J, E) of primary capsules (B, I, D), and the last of so many iterations' couplings."""
        if self.change.learned_scale:
            return route_scaled(u, self.weight, iterations, self.log_scale.exp())
        return super().routed(u, iterations)
