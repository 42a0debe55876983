"""The complete capsule network of Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules" (NIPS 2017).

Axes, as they are named at the ends of lines:
B images, C image channels, H W image height and width, T primary capsule types, h w the primary grid,
I = T*h*w primary capsules, D their dimension, J classes (one digit capsule each), E digit capsule dimension.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from training.recipe import AGREEMENTS, INITIALIZATIONS, NORMALIZATIONS

KERNEL = 9  # the paper's first convolution is 9x9 with stride 1, without padding
BIAS = 0.1  # the initial value of every bias in the authors' code
GATE_BIAS = -2.0  # at first a gate is near 0.12: a primary capsule is absent until evidence opens it


@dataclass(frozen=True)
class Routing:
    """The choices of routing, those of CapsNetConfig."""

    iterations: int = 3
    agreement: str = "scalar-product"
    normalization: str = "softmax"
    gradient: bool = True
    scale: float = 1.0


class Field(NamedTuple):
    """The ``size`` x ``size`` pixels of a primary capsule: from ``stride`` times its row and column, plus ``offset``.

    A negative offset starts in the padding.
    """

    stride: int
    size: int
    offset: int


@dataclass(frozen=True)
class CapsNetConfig:
    """The shape of a network, and its choices. The defaults are the MNIST network in the paper's text (section 4).

    stem: the convolutions before the primary capsules, each as (channels, kernel, stride, padding), with batch
    normalisation and ReLU; empty for the paper's one, 9x9 with ``conv_channels`` channels, a bias and no normalisation.
    primary_kernel, primary_stride: those of the convolution that makes the primary capsules, without padding.

    In the other choices, the code of the paper's authors (Sarasra/models, research/capsules) or later work differs from
    the text:

    digit_bias: a bias (J, E) is added to s_j in every iteration (the authors' code).
    primary_divisor: the primary convolution's output is divided by it before its bias is added (the authors' code:
    32). initialization: of convolutions and decoder, ``pytorch`` for its default, or ``authors`` for their truncated
    normal (0.05 in the first convolution, else 0.1) and biases of 0.1. agreement: of a vote with a pose, their scalar
    product (the paper), or less their squared Euclidean distance. normalization: of a primary capsule's logits over
    its parents to couplings, ``softmax`` (the paper) or ``max-min`` (see ``max_min``). routing_gradient: gradients flow
    through all iterations (the authors' code); False stops them at the couplings, as many ports do. routing_scale: the
    logits are multiplied by it before they become couplings; above 1 a primary capsule's couplings go to fewer parents.
    Max-Min couplings do not depend on it. primary_gate: each primary capsule has a gate of its own, the sigmoid of a
    further channel of the primary convolution, which multiplies the squashed capsule, so that it can be absent.
    """

    image_channels: int = 1
    image_size: int = 28
    classes: int = 10
    conv_channels: int = 256
    primary_types: int = 32
    primary_dim: int = 8
    digit_dim: int = 16
    routing_iterations: int = 3
    decoder_widths: tuple[int, ...] = (512, 1024)
    digit_bias: bool = False
    primary_divisor: float = 1.0
    initialization: str = "pytorch"
    agreement: str = "scalar-product"
    normalization: str = "softmax"
    routing_gradient: bool = True
    routing_scale: float = 1.0
    primary_gate: bool = False
    stem: tuple[tuple[int, int, int, int], ...] = ()
    primary_kernel: int = 9
    primary_stride: int = 2

    def __post_init__(self) -> None:
        for name in (
            "image_channels", "classes", "conv_channels", "primary_types", "primary_dim", "digit_dim",
            "routing_iterations", "primary_kernel", "primary_stride",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; expected 1 or more")
        for name, known in (
            ("initialization", INITIALIZATIONS),
            ("agreement", AGREEMENTS),
            ("normalization", NORMALIZATIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if any(width < 1 for width in self.decoder_widths):
            raise ValueError(f"decoder_widths: {self.decoder_widths}; expected 1 or more each")
        for name in ("primary_divisor", "routing_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; expected a number above 0")
        for layer in self.stem:
            if len(layer) != 4 or min(layer[:3]) < 1 or layer[3] < 0:
                raise ValueError(f"stem: {layer}; expected channels, kernel and stride of 1 or more, and a padding")
        if self.initialization == "authors" and self.stem:
            raise ValueError("initialization: 'authors' is for the paper's one convolution; expected an empty stem")
        if self.primary_grid < 1:
            raise ValueError(f"image_size: {self.image_size}; the convolutions leave no position for a primary capsule")

    @property
    def convolutions(self) -> tuple[tuple[int, int, int, int], ...]:
        """Return (channels, kernel, stride, padding) of each convolution before that of the primary capsules."""
        return self.stem or ((self.conv_channels, KERNEL, 1, 0),)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of the images."""
        return self.image_channels, self.image_size, self.image_size

    @property
    def primary_grid(self) -> int:
        """Return the height and width of the primary capsules' grid, in positions."""
        size = self.image_size
        for _, kernel, stride, padding in self.convolutions:
            size = (size + 2 * padding - kernel) // stride + 1
        return (size - self.primary_kernel) // self.primary_stride + 1

    @property
    def primary_capsules(self) -> int:
        """Return I, the number of primary capsules."""
        return self.primary_types * self.primary_grid**2

    @property
    def receptive_field(self) -> Field:
        """Return the pixels that each primary capsule sees."""
        size, step, offset = 1, 1, 0
        for _, kernel, stride, padding in (*self.convolutions, (0, self.primary_kernel, self.primary_stride, 0)):
            size += (kernel - 1) * step
            offset -= padding * step
            step *= stride
        return Field(step, size, offset)

    def routing(self, iterations: int) -> Routing:
        """Return the choices of routing for this number of iterations."""
        return Routing(iterations, self.agreement, self.normalization, self.routing_gradient, self.routing_scale)


CONFIGS = {
    "paper": CapsNetConfig(),
    "authors": CapsNetConfig(digit_bias=True, primary_divisor=32.0, initialization="authors"),
    "compact": CapsNetConfig(conv_channels=64, primary_types=8),
    "fast": CapsNetConfig(
        stem=((32, 5, 2, 2), (32, 3, 1, 1), (64, 3, 2, 1), (64, 3, 1, 1)),
        primary_types=4,
        primary_kernel=3,
        primary_stride=1,
    ),
    "accurate": CapsNetConfig(
        stem=((32, 3, 1, 1), (48, 3, 2, 1), (48, 3, 1, 1), (96, 3, 2, 1), (96, 3, 1, 1), (96, 3, 1, 1)),
        primary_types=4,
        primary_kernel=3,
        primary_stride=1,
    ),
    "wide": CapsNetConfig(
        stem=((64, 3, 1, 1), (96, 3, 2, 1), (96, 3, 1, 1), (160, 3, 2, 1), (160, 3, 1, 1), (160, 3, 1, 1)),
        primary_types=4,
        primary_kernel=3,
        primary_stride=1,
    ),
    # For two overlapping digits on 36x36 pixels. To separate them takes more context than one wide convolution sees.
    "pairs": CapsNetConfig(
        image_size=36,
        stem=((32, 5, 2, 2), (64, 3, 1, 1), (64, 3, 2, 1), (128, 3, 1, 1), (128, 3, 1, 1)),
        primary_types=4,
        primary_kernel=3,
        primary_stride=1,
    ),
}


def squash(s: Tensor) -> Tensor:
    """Shrink vectors along the last axis to a length below 1, keeping their direction (equation 1).

    ``|s|^2 / (1 + |s|^2) * s / |s|``, written as ``s * |s| / (1 + |s|^2)``: no division by a length that can be 0,
    so no epsilon, which ONNX export would fold away below 5e-8 and which is 0 in half precision. The gradient at a
    zero vector is zero (``vector_norm`` defines it so; the root of a sum of squares would give NaN). Shape in,
    shape out.
    """
    length = torch.linalg.vector_norm(s, dim=-1)
    squashed: Tensor = s * (length / (1 + length.square())).unsqueeze(-1)
    return squashed


def votes(u: Tensor, weight: Tensor) -> Tensor:
    """Return each primary capsule's prediction of each digit capsule, ``u_hat_{j|i} = W_ij u_i`` (equation 2).

    u: (B, I, D); weight: (I, D, J, E). Returns (B, J, I, E).

    One matrix product a primary capsule, over all images at once: the small ``u`` is transposed, and the weights
    are never copied for each image as a broadcast product over five axes would.
    """
    i, d, j, e = weight.shape
    u_hat = torch.bmm(u.transpose(0, 1), weight.reshape(i, d, j * e))  # (I, B, J*E)
    return u_hat.reshape(i, -1, j, e).permute(1, 2, 0, 3).contiguous()  # (B, J, I, E)


def max_min(b: Tensor) -> Tensor:
    """Convert logits b (B, J, I) to couplings ``(b - min b) / (max b - min b)``, with minima and maxima over J.

    Max-Min normalization (Zhao et al., "Capsule Networks with Max-Min Normalization", arXiv 1903.09662) between the
    bounds 0 and 1: each primary capsule has one parent with coupling 1 and one with 0, and the couplings need not sum
    to 1. If all logits are equal, all couplings are 1: before the first update, and with a single parent. Bounds and
    first couplings are our reading, since the paper's abstract does not say them.
    """
    low, high = b.amin(dim=1, keepdim=True), b.amax(dim=1, keepdim=True)
    equal = high == low
    span = torch.where(equal, torch.ones_like(high), high - low)
    return torch.where(equal, torch.ones_like(b), (b - low) / span)


#: From the sums over the poses so far, (B, J, E), and over their squares, (B, J, 1), and how many poses they are, to s,
#: (B, J, E), and its couplings, (B, J, I).
Weigh = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def _weigh(u_hat: Tensor, total: Tensor, squares: Tensor, updates: int, routing: Routing) -> tuple[Tensor, Tensor]:
    """Return the part of s from votes (B, J, I, E), and their couplings; see Weigh and route."""
    compared = u_hat if routing.gradient else u_hat.detach()  # the input of the couplings
    b = (compared @ total.unsqueeze(-1)).squeeze(-1)  # (B, J, I)
    if routing.agreement == "euclidean":
        b = 2 * b - updates * compared.square().sum(-1) - squares
    if routing.scale != 1:
        b = routing.scale * b
    # Over the J parents of each primary capsule.
    c = max_min(b) if routing.normalization == "max-min" else b.softmax(dim=1)
    return (c.unsqueeze(2) @ u_hat).squeeze(2), c


def _stored(u: Tensor, weight: Tensor, routing: Routing) -> Weigh:
    """Compute the votes once, for all iterations."""
    u_hat = votes(u, weight)
    return lambda total, squares, updates: _weigh(u_hat, total, squares, updates, routing)


def _by_blocks(u: Tensor, weight: Tensor, routing: Routing, blocks: int) -> Weigh:
    """Compute the votes of one block of primary capsules after the other, and keep none for the gradient."""
    size = math.ceil(len(weight) / blocks)
    # Split once and not in each iteration: the gradient of a split is as large as all weights.
    parts = list(zip(torch.split(u, size, 1), torch.split(weight, size), strict=True))

    def weigh_block(u: Tensor, weight: Tensor, total: Tensor, squares: Tensor, updates: int) -> tuple[Tensor, Tensor]:
        return _weigh(votes(u, weight), total, squares, updates, routing)

    def weigh(total: Tensor, squares: Tensor, updates: int) -> tuple[Tensor, Tensor]:
        results = [checkpoint(weigh_block, *part, total, squares, updates, use_reentrant=False) for part in parts]
        sums, couplings = zip(*results, strict=True)
        s: Tensor = sum(sums)
        return s, torch.cat(couplings, 2)

    return weigh


def route(
    u: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None = None, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the poses v, (B, J, E), and the couplings c, (B, J, I), of ``route_by_iteration``'s last iteration."""
    poses, couplings = _iterate(u, weight, routing, bias, blocks)
    return poses[-1], couplings[-1] if couplings else _equal_couplings(u, weight, routing)


def route_by_iteration(
    u: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None = None, blocks: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Route by agreement (procedure 1), unrolled for a fixed number of iterations.

    u: (B, I, D); weight: (I, D, J, E); bias: (J, E), added to s. Returns, for each iteration, the digit capsules'
    poses v, (B, J, E), and the couplings c that made them, (B, J, I).

    Two identities shorten it without a change of the result. They save memory, but no measurable time. Before
    the first update all couplings are the same, 1/J, so the first iteration is one matrix product that needs no votes.
    The logits after t updates are ``b_ij = u_hat_ij . (v_1 + ... + v_t)``, so the sum of the poses is kept instead of
    the logits; with Euclidean agreement, ``-|u_hat_ij - v_j|^2`` summed over t is twice that less t times
    ``|u_hat_ij|^2`` and the sum of the poses' squares.

    blocks: with more than 1, the votes are not stored. The couplings of a primary capsule do not depend on the others,
    so the primary capsules are split into this number of blocks. A block's votes are computed again in each iteration
    and for the gradient. The memory for the votes, (B, J, I, E), falls by this factor; the result is the same.
    """
    poses, couplings = _iterate(u, weight, routing, bias, blocks)
    return list(zip(poses, [_equal_couplings(u, weight, routing), *couplings], strict=True))


def _equal_couplings(u: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """Return the couplings (B, J, I) of the first iteration."""
    i, _, j, _ = weight.shape
    return u.new_full((1, j, i), 1 / j if routing.normalization == "softmax" else 1).expand(u.shape[0], j, i)


def _iterate(
    u: Tensor, weight: Tensor, routing: Routing, bias: Tensor | None, blocks: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the poses (B, J, E) of each iteration, and the couplings (B, J, I) of each one after the first."""
    i, d, j, e = weight.shape
    s = (u.reshape(-1, i * d) @ weight.reshape(i * d, j * e)).reshape(-1, j, e)  # (B, J, E)
    if routing.normalization == "softmax":
        s = s / j
    v = squash(s if bias is None else s + bias)
    poses = [v]
    couplings: list[Tensor] = []
    if routing.iterations == 1:
        return poses, couplings
    weigh = _stored(u, weight, routing) if blocks == 1 else _by_blocks(u, weight, routing, blocks)
    pose = v if routing.gradient else v.detach()
    total, squares = pose, pose.square().sum(-1, keepdim=True)  # sums over the poses so far: (B, J, E), (B, J, 1)
    for update in range(1, routing.iterations):
        s, c = weigh(total, squares, update)
        v = squash(s if bias is None else s + bias)
        poses.append(v)
        couplings.append(c)
        if update < routing.iterations - 1:
            pose = v if routing.gradient else v.detach()
            total, squares = total + pose, squares + pose.square().sum(-1, keepdim=True)
    return poses, couplings


class Decoder(nn.Module):
    """The decoder, which reconstructs an image from one digit capsule's pose (section 4.1).

    Takes poses (B, J, E) and the class (B,) whose pose is kept, the others masked with zeros; returns pixels from
    0 to 1, (B, C, H, W).
    """

    def __init__(self, config: CapsNetConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.image_channels * config.image_size**2
        widths = (config.classes * config.digit_dim, *config.decoder_widths)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], pixels), nn.Sigmoid())

    def forward(self, poses: Tensor, classes: Tensor) -> Tensor:
        mask = nn.functional.one_hot(classes, self.config.classes).unsqueeze(-1)  # (B, J, 1)
        pixels: Tensor = self.layers((poses * mask).flatten(1))
        size = self.config.image_size
        return pixels.reshape(-1, self.config.image_channels, size, size)


class CapsNet(nn.Module):
    """The network: convolutions, primary capsules, digit capsules by routing, and the decoder for training.

    ``forward`` takes images (B, C, H, W), float pixels from 0 to 1, and returns the poses (B, J, E). A class's
    probability is its pose's length (``lengths``). The decoder is called separately; ``decoder_widths=()`` leaves it
    out. vote_blocks: the number of blocks of primary capsules, to save the memory of their votes, see ``route``.
    """

    def __init__(self, config: CapsNetConfig, vote_blocks: int = 1) -> None:
        super().__init__()
        self.config = config
        self.vote_blocks = vote_blocks
        if config.stem:
            self.stem = _stem(config)
        else:
            self.conv1 = nn.Conv2d(config.image_channels, config.conv_channels, KERNEL)
        self.primary = nn.Conv2d(
            config.convolutions[-1][0],
            config.primary_types * (config.primary_dim + config.primary_gate),
            config.primary_kernel,
            stride=config.primary_stride,
        )
        shape = (config.primary_capsules, config.primary_dim, config.classes, config.digit_dim)
        self.weight = nn.Parameter(torch.empty(shape))  # (I, D, J, E)
        _truncated_normal(self.weight, 0.1)  # as in the authors' code; the paper's text does not say
        self.digit_bias = nn.Parameter(torch.full(shape[2:], BIAS)) if config.digit_bias else None  # (J, E)
        if config.initialization == "authors":
            for layer, deviation in ((self.conv1, 0.05), (self.primary, 0.1)):
                _truncated_normal(layer.weight, deviation)
                assert layer.bias is not None
                nn.init.constant_(layer.bias, BIAS)
        if config.primary_gate:
            assert self.primary.bias is not None
            nn.init.constant_(self.primary.bias[config.primary_dim :: config.primary_dim + 1], GATE_BIAS)
        self.decoder = Decoder(config) if config.decoder_widths else None
        if config.initialization == "authors" and self.decoder is not None:
            for part in self.decoder.layers:
                if isinstance(part, nn.Linear):
                    _truncated_normal(part.weight, 0.1)
                    nn.init.constant_(part.bias, BIAS)

    def primary_capsules(self, images: Tensor) -> Tensor:
        """Return primary capsules (B, I, D) of images (B, C, H, W): the D channels of one type at one position each."""
        divisor = self.config.primary_divisor
        features = self.stem(images) if self.config.stem else torch.relu(self.conv1(images))
        # Dividing the input of a convolution divides its output, but not its bias.
        maps = self.primary(features if divisor == 1 else features / divisor)  # (B, T*D, h, w)
        grouped = maps.unflatten(1, (self.config.primary_types, -1))  # (B, T, D, h, w)
        capsules = grouped.permute(0, 1, 3, 4, 2).flatten(1, 3)  # (B, I, D), or (B, I, D + 1) with a gate
        if not self.config.primary_gate:
            return squash(capsules)
        return torch.sigmoid(capsules[..., -1:]) * squash(capsules[..., :-1])

    def forward(self, images: Tensor) -> Tensor:
        return self.with_couplings(images)[0]

    def with_couplings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the poses, (B, J, E), and the couplings of the last routing iteration, (B, J, I)."""
        return self.routed(self.primary_capsules(images), self.config.routing_iterations)

    def routed(self, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
        """Return the poses (B, J, E) of primary capsules (B, I, D), and the last of so many iterations' couplings."""
        return route(u, self.weight, self.config.routing(iterations), self.digit_bias, self.vote_blocks)

    def routed_by_iteration(self, u: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the poses (B, J, E) and the couplings (B, J, I) of each iteration, of primary capsules (B, I, D)."""
        routing = self.config.routing(self.config.routing_iterations)
        return route_by_iteration(u, self.weight, routing, self.digit_bias, self.vote_blocks)


def _stem(config: CapsNetConfig) -> nn.Sequential:
    """Return convolutions without bias, each with batch normalisation and ReLU."""
    layers: list[nn.Module] = []
    fan_in = config.image_channels
    for channels, kernel, stride, padding in config.stem:
        layers += [
            nn.Conv2d(fan_in, channels, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
        fan_in = channels
    return nn.Sequential(*layers)


def _truncated_normal(weight: Tensor, deviation: float) -> None:
    """Fill with a normal distribution cut at two standard deviations."""
    nn.init.trunc_normal_(weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def lengths(poses: Tensor) -> Tensor:
    """Return the probability of each class, the length of its pose (section 2): (B, J, E) to (B, J).

    No softmax: several classes may be present at once, and none.
    """
    result: Tensor = torch.linalg.vector_norm(poses, dim=-1)
    return result


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 images, 0 to 255, to the network's float pixels from 0 to 1, of the same shape."""
    return images.to(torch.float32) / 255
