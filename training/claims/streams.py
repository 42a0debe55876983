"""Endless training images of each kind, made on the device, a chunk of steps at once.

Axes: S steps, B images a step, N = S*B, K objects an image, C channels, H W height and width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.claims.images import Images, Labelled
from training.claims.jobs import BACKGROUND, DIGITS, ONE_CLASS, PAIRS, PLACED, SHAPES, Job
from training.data.augment import distort
from training.data.compose import place
from training.data.datasets import per_class
from training.data.specs import NONE
from training.recorded.chunks import Chunk, Pairs

CHUNK_STEPS = 50
SHIFT_PIXELS = 2.0  # the largest shift of a training digit, as in the paper (section 4)
ONE_CLASS_DIGIT = 5  # the digit of a network of one class; the others are its negatives
TINT = (0.15, 0.7)  # of the largest value of a background's colour channel

Stream = Callable[[], Chunk]


def stream(job: Job, images: Images) -> Stream:
    """Return the training images of a job, on the device of ``images``. Jobs of one seed get the same images."""
    source = images.train
    if job.per_class:
        chosen = per_class(source.labels.cpu(), job.per_class, job.seed).to(source.labels.device)
        source = Labelled(source.images[chosen], source.labels[chosen])
    canvas = SHAPES[job.images][0]
    if job.images == PAIRS:
        return Pairs(source.images, source.labels, job.batch, job.seed, canvas, CHUNK_STEPS)
    return Drawn(job.images, source, images.other_train, job.batch, job.seed)


class Drawn:
    """Chunks of single digits, drawn with replacement and changed as their kind says.

    All but PLACED rotate, shear, scale and shift each digit. PLACED puts it anywhere on a larger canvas, which is the
    paper's only change for affNIST (section 5.2). BACKGROUND puts it on colours, see ``on_background``. In ONE_CLASS
    every second image shows ONE_CLASS_DIGIT, and the label of the others is NONE.
    """

    def __init__(self, kind: str, digits: Labelled, clothes: Labelled, batch: int, seed: int) -> None:
        self._kind, self._digits, self._clothes, self._batch = kind, digits, clothes, batch
        self._generator = torch.Generator(digits.images.device).manual_seed(seed)

    def __call__(self) -> Chunk:
        labels = self._digits.labels
        if self._kind == ONE_CLASS:
            shown = labels == ONE_CLASS_DIGIT
            sides = [side.nonzero().flatten() for side in (shown, ~shown)]
            halves = [side[self._draw(len(side), CHUNK_STEPS * self._batch // 2)] for side in sides]
            chosen = torch.stack(halves, 1).flatten()
            labels = torch.where(shown, 0, NONE)
        else:
            chosen = self._draw(len(labels), CHUNK_STEPS * self._batch)
        images = self._changed(self._digits.images[chosen])
        images = images.reshape(CHUNK_STEPS, self._batch, *images.shape[1:])
        return Chunk(images, images.unsqueeze(2), labels[chosen].reshape(CHUNK_STEPS, self._batch, 1))

    def _draw(self, below: int, count: int) -> Tensor:
        device = self._generator.device
        return torch.randint(below, (count,), generator=self._generator, device=device)

    def _changed(self, digits: Tensor) -> Tensor:
        if self._kind == PLACED:
            return place(digits, SHAPES[PLACED][0], self._generator)
        warped = distort(digits.float(), self._generator, shift=SHIFT_PIXELS).round().clamp(0, 255)
        if self._kind in (DIGITS, ONE_CLASS):
            return warped.to(torch.uint8)
        assert self._kind == BACKGROUND
        half = len(warped) // 2
        clothes = self._clothes.images[self._draw(len(self._clothes), len(warped) - half)]
        grounds = torch.cat([noise(half, digits.shape[2:], self._generator), patches(clothes, self._generator)])
        mixed = torch.randperm(len(grounds), generator=self._generator, device=grounds.device)
        return on_background(warped, grounds[mixed], self._generator)


def noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return uniform noise, (N, 3, H, W) from 0 to 1, different in each colour."""
    return torch.rand((count, 3, *shape), generator=generator, device=generator.device)


def patches(clothes: Tensor, generator: torch.Generator) -> Tensor:
    """Return clothes (N, 1, H, W) uint8 as grey grounds (N, 3, H, W) from 0 to 1, moved around both edges at random."""
    count, _, height, width = clothes.shape
    rows, columns = (
        (torch.randint(size, (count, 1), generator=generator, device=clothes.device) + places) % size
        for size, places in ((size, torch.arange(size, device=clothes.device)) for size in (height, width))
    )
    moved = clothes[torch.arange(count, device=clothes.device)[:, None, None], 0, rows[:, :, None], columns[:, None]]
    return (moved.float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)


def on_background(digits: Tensor, grounds: Tensor, generator: torch.Generator) -> Tensor:
    """Return white digits (N, 1, H, W), 0 to 255, on grounds (N, 3, H, W), 0 to 1, of a random colour: uint8."""
    low, high = TINT
    tint = low + (high - low) * torch.rand((len(grounds), 3, 1, 1), generator=generator, device=grounds.device)
    ink = digits.float() / 255
    return (255 * (ink + (1 - ink) * tint * grounds)).round().clamp(0, 255).to(torch.uint8)
