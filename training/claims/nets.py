"""The networks of the claims: capsule networks, plain networks with the same stem and as many parameters, and the
plain network of the paper (Sabour et al. 2017).

Axes: B images, C image channels, H W height and width, J classes, E pose dimension, F features, K objects an image.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from training.claims.jobs import PAPER, PAPER_SIZE
from training.loss import margin_loss, presence_loss, present_classes
from training.model import CapsNet, CapsNetConfig, lengths, to_pixels
from training.recorded.learner import pixel_errors, pose_errors

#: The kinds of networks: the iterations of routing, 0 for a plain network, and True if it learns to reconstruct.
KINDS = {"K3": (3, True), "K3n": (3, False), "K1": (1, True), "K1n": (1, False), "C0": (0, False), "C0r": (0, True)}
#: The sizes: the channels of the stem's first half, of which the second half has twice as many, and the primary types.
SIZES = {"tiny": (4, 1), "50K": (16, 1), "200K": (32, 4), "700K": (56, 12)}
HIDDEN_UNITS = 128  # of a plain network's layer before the classes
DECODER_WIDTHS = (128, 256)  # smaller than the paper's: many networks are trained
#: By size, the channels of the paper's three convolutions and the units of its two layers before the classes.
PAPER_LAYERS = {"tiny": ((8, 8, 4), (10, 6)), PAPER_SIZE: ((256, 256, 128), (328, 192))}
PAPER_KERNEL = 5
PAPER_DROPOUT = 0.5  # the paper names no rate; this is the usual one


@dataclass(frozen=True)
class NetSpec:
    """The description of a network.

    kind: one of KINDS, or PAPER. size: one of SIZES, or of PAPER_LAYERS, named after the number of parameters for ten
    classes on 28x28 pixels, without the decoder. canvas: height and width of its images.
    """

    kind: str
    size: str = "200K"
    canvas: int = 28
    channels: int = 1
    classes: int = 10

    @property
    def reconstructs(self) -> bool:
        """Return True if the network learns to reconstruct."""
        return self.kind in KINDS and KINDS[self.kind][1]

    @property
    def config(self) -> CapsNetConfig:
        """Return the config of the capsule network, or of the one that a plain network is as large as."""
        iterations, _ = KINDS[self.kind]
        width, types = SIZES[self.size]
        return CapsNetConfig(
            image_channels=self.channels,
            image_size=self.canvas,
            classes=self.classes,
            stem=((width, 5, 2, 2), (width, 3, 1, 1), (2 * width, 3, 2, 1), (2 * width, 3, 1, 1)),
            primary_types=types,
            primary_kernel=3,
            primary_stride=1,
            routing_iterations=max(1, iterations),
            decoder_widths=DECODER_WIDTHS if self.reconstructs else (),
        )


class Net(Protocol):
    """The methods that every network has. images: (B, C, H, W) float from 0 to 1; classes: (B,) int64."""

    spec: NetSpec

    def scores(self, images: Tensor) -> Tensor:
        """Return a score from 0 to 1 for each class, (B, J): the poses' lengths, or probabilities."""
        ...

    def features(self, images: Tensor) -> Tensor:
        """Return what the network knows of an image, (B, F): all poses, or the units before the classes."""
        ...

    def decode(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the reconstruction of an image for a class, (B, C, H, W). Raises ValueError without a decoder."""
        ...


class CapsuleNet(CapsNet):
    """A capsule network with the methods of Net. ``forward`` returns the poses (B, J, E)."""

    def __init__(self, spec: NetSpec) -> None:
        super().__init__(spec.config)
        self.spec = spec

    def poses(self, images: Tensor) -> Tensor:
        """Return the poses, (B, J, E)."""
        poses: Tensor = self(images)
        return poses.float()

    def class_poses(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the pose of each image's class, (B, E). classes: (B,)."""
        return self.poses(images)[torch.arange(len(classes), device=classes.device), classes]

    def scores(self, images: Tensor) -> Tensor:
        """Return the lengths of the poses, (B, J)."""
        return lengths(self.poses(images))

    def features(self, images: Tensor) -> Tensor:
        """Return all poses, (B, J*E)."""
        return self.poses(images).flatten(1)

    def decode(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the reconstruction from the pose of each image's class; see Net."""
        return self.decode_poses(self.poses(images), classes)

    def decode_poses(self, poses: Tensor, classes: Tensor) -> Tensor:
        """Return the reconstruction, (B, C, H, W), from poses (B, J, E), of which the class's alone is seen."""
        if self.decoder is None:
            raise ValueError(f"{self.spec.kind} has no decoder")
        pixels: Tensor = self.decoder(poses, classes)
        return pixels.float()

    def loss(self, images: Tensor, parts: Tensor, labels: Tensor, pixel_weight: Tensor | float) -> Tensor:
        """Return the loss of a batch, a scalar; images (B, C, H, W) and parts (B, K, C, H, W), 0 to 1."""
        poses = self(images).float()
        probabilities = lengths(poses)
        loss = (presence_loss if self.spec.classes == 1 else margin_loss)(probabilities, labels)
        return loss + pixel_weight * pose_errors(self, poses, parts, labels)


class PlainNet(nn.Module):
    """A plain network with the methods of Net: the capsule network's stem, one more convolution, 128 units, classes.

    The further convolution stands where the primary capsules' stands. It has as many channels as make the network as
    large as the capsule network. The decoder sees the class's part of the features: each unit times its weight for the
    class, a vector that belongs to the class as a pose does.
    """

    def __init__(self, spec: NetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem, self.last, self.hidden, self.output = self._layers(spec)
        self.decoder = _decoder(spec.config) if spec.reconstructs else None

    def _layers(self, spec: NetSpec) -> tuple[nn.Module, nn.Module, nn.Module, nn.Linear]:
        """Return the stem, the last convolution, the layer before the classes, and that of the classes."""
        config = spec.config
        layers: list[nn.Module] = []
        fan_in = config.image_channels
        for channels, kernel, stride, padding in config.stem:
            convolution = nn.Conv2d(fan_in, channels, kernel, stride, padding, bias=False)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            fan_in = channels
        channels = plain_channels(config)
        return (
            nn.Sequential(*layers),
            nn.Conv2d(fan_in, channels, config.primary_kernel),
            nn.Linear(channels * config.primary_grid**2, HIDDEN_UNITS),
            nn.Linear(HIDDEN_UNITS, config.classes),
        )

    def features(self, images: Tensor) -> Tensor:
        """Return the units before the classes, (B, 128)."""
        maps = torch.relu(self.last(self.stem(images)))
        units: Tensor = torch.relu(self.hidden(maps.flatten(1)))
        return units

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits, (B, J)."""
        logits: Tensor = self.output(self.features(images))
        return logits.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images)

    def scores(self, images: Tensor) -> Tensor:
        """Return the softmax over the classes, (B, J); for a single class the sigmoid."""
        logits = self.logits(images)
        return torch.sigmoid(logits) if self.spec.classes == 1 else logits.softmax(1)

    def decode(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return the reconstruction from the class's part of the features; see Net."""
        return self.decode_features(self.features(images), classes)

    def decode_features(self, units: Tensor, classes: Tensor) -> Tensor:
        """Return the reconstruction, (B, C, H, W), from features (B, 128), of which the class's part alone is seen."""
        if self.decoder is None:
            raise ValueError(f"{self.spec.kind} has no decoder")
        pixels: Tensor = self.decoder(self._part(units, present_classes(classes, self.spec.classes)))
        return pixels.float().reshape(-1, *self.spec.config.image_shape)

    def loss(self, images: Tensor, parts: Tensor, labels: Tensor, pixel_weight: Tensor | float) -> Tensor:
        """Return the loss of a batch, a scalar: cross-entropy, with equal probabilities for each of several objects."""
        units = self.features(images)
        logits = self.output(units).float()
        shown = present_classes(labels, self.spec.classes)  # (B, K, J)
        if self.spec.classes == 1:
            loss = nn.functional.binary_cross_entropy_with_logits(logits, shown.amax(1))
        else:
            loss = -(shown.mean(1) * logits.log_softmax(1)).sum(1).mean()
        if self.decoder is not None:
            seen = self._part(units.unsqueeze(1), shown).flatten(0, 1)  # (B*K, 128)
            loss = loss + pixel_weight * pixel_errors(self.decoder(seen), parts, labels)
        return loss

    def _part(self, units: Tensor, shown: Tensor) -> Tensor:
        """Return the units (..., 128) times their weights for the class that ``shown`` (..., J) marks with 1."""
        return units * (shown @ self.output.weight)


class PaperNet(PlainNet):
    """The plain network that the paper compares capsules with (Sabour et al. 2017, section 5.1), without a decoder.

    Three convolutions of 5x5 pixels, then layers of 328 and 192 units, dropout, and the classes. The paper says neither
    the padding nor the dropout's rate. With padding that keeps 28x28 pixels the network has the paper's 35.4 million
    parameters; without padding it would have 13.3 million.
    """

    def _layers(self, spec: NetSpec) -> tuple[nn.Module, nn.Module, nn.Module, nn.Linear]:
        channels, units = PAPER_LAYERS[spec.size]
        convolutions = [
            nn.Conv2d(fan_in, fan_out, PAPER_KERNEL, padding=PAPER_KERNEL // 2)
            for fan_in, fan_out in pairwise((spec.channels, *channels))
        ]
        first, second, last = convolutions
        return (
            nn.Sequential(first, nn.ReLU(), second, nn.ReLU()),
            last,
            nn.Sequential(nn.Linear(channels[-1] * spec.canvas**2, units[0]), nn.ReLU(), nn.Linear(*units)),
            nn.Linear(units[-1], spec.classes),
        )

    def features(self, images: Tensor) -> Tensor:
        """Return the units before the classes, (B, 192), of which the training drops some."""
        return nn.functional.dropout(super().features(images), PAPER_DROPOUT, self.training)


def build(spec: NetSpec) -> CapsuleNet | PlainNet:
    """Return a network of this description, with random weights."""
    if spec.kind == PAPER:
        return PaperNet(spec)
    return CapsuleNet(spec) if KINDS[spec.kind][0] else PlainNet(spec)


def plain_channels(config: CapsNetConfig) -> int:
    """Return the channels of a plain network's last convolution that make it as large as the capsule network."""
    fan_in = config.convolutions[-1][0] * config.primary_kernel**2
    capsules = config.primary_types * config.primary_dim * (fan_in + 1)
    capsules += config.primary_capsules * config.primary_dim * config.classes * config.digit_dim
    units = HIDDEN_UNITS * (1 + config.classes) + config.classes
    return max(1, round((capsules - units) / (fan_in + 1 + config.primary_grid**2 * HIDDEN_UNITS)))


def parameters(net: nn.Module) -> int:
    """Return the number of parameters that a network answers with: all but the decoder's."""
    return sum(value.numel() for name, value in net.named_parameters() if not name.startswith("decoder."))


def batch_loss(
    net: CapsuleNet | PlainNet,
    images: Tensor,
    parts: Tensor,
    labels: Tensor,
    targets: Tensor | None,
    weights: Tensor,
) -> Tensor:
    """Return a batch's loss, as a Learner takes it: uint8 images and parts; there are no targets."""
    return net.loss(to_pixels(images), to_pixels(parts), labels, weights[0])


def _decoder(config: CapsNetConfig) -> nn.Sequential:
    widths = (HIDDEN_UNITS, *config.decoder_widths)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], config.image_channels * config.image_size**2), nn.Sigmoid())
