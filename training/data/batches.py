"""The batches of a run. Each is a function of the seed and of the number of finished steps."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from training.data.compose import members

# A run's generators are numbered: those of the epochs from 0 on, those of the steps from here on.
FIRST_STEP_NUMBER = 10_000


def generator(seed: int, number: int) -> torch.Generator:
    """Return a generator by its number in a run. Neighbouring seeds share none of their first million generators."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def steps_per_pass(images: int, batch_size: int) -> int:
    """Return the number of steps in one pass over this number of images."""
    return math.ceil(images / batch_size)


class Batches:
    """Shuffled batches of one epoch after another, each of images (B, K, C, H, W), labels (B, K) and turns (B,).

    The first of an image's K objects is the next one of the pass; for pairs, the second has another class. Turns are
    for the augmentations. Passes over all images follow one another. An epoch is one pass, or ``steps_per_epoch``
    steps. A batch depends only on the seed and on the number of finished steps, so a resumed run sees the same batches
    as an undisturbed one.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        steps_done: Callable[[], int],
        objects: int = 1,
        steps_per_epoch: int = 0,
    ) -> None:
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.steps_done = steps_done
        self.objects = objects
        self.steps_per_pass = steps_per_pass(len(images), batch_size)
        self.steps_per_epoch = steps_per_epoch or self.steps_per_pass

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the rest of the epoch that the steps done lead into."""
        done = self.steps_done()
        left = self.steps_per_epoch - done % self.steps_per_epoch
        number, position = divmod(done, self.steps_per_pass)
        while left > 0:
            drawn = generator(self.seed, number)
            order = torch.randperm(len(self.images), generator=drawn)
            together = members(self.labels, self.objects, drawn)[order]
            for chosen in torch.split(together, self.batch_size)[position : position + left]:
                yield self.images[chosen], self.labels[chosen], chosen[:, 0] + number
                left -= 1
            number, position = number + 1, 0
