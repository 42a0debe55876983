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


class Batches:
    """Shuffled batches of one epoch after another, each of images (B, K, C, H, W), labels (B, K) and turns (B,).

    An image's K objects are the next one of the epoch and, for pairs, another one of another class. Turns are for the
    augmentations. The next batch depends only on the seed and on the number of finished steps: a resumed run sees the
    same batches as an undisturbed one.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        seed: int,
        steps_done: Callable[[], int],
        objects: int = 1,
    ) -> None:
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.steps_done = steps_done
        self.objects = objects

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the rest of the present epoch."""
        epoch, position = divmod(self.steps_done(), len(self))
        drawn = generator(self.seed, epoch)
        order = torch.randperm(len(self.images), generator=drawn)
        together = members(self.labels, self.objects, drawn)[order]
        for chosen in torch.split(together, self.batch_size)[position:]:
            yield self.images[chosen], self.labels[chosen], chosen[:, 0] + epoch
