"""The networks that the rows ask for, and the sizes of a whole run. This module does not import PyTorch."""

from collections.abc import Iterable
from dataclasses import dataclass

#: The kinds of training images; see ``training.claims.images``.
DIGITS, PLACED, PAIRS, BACKGROUND, ONE_CLASS = "digits", "placed", "pairs", "background", "one-class"
FEW = "few"  # the steps of networks with little data or of other sizes
#: The kind and the size of the paper's plain network, which a GPU alone trains in reasonable time.
PAPER, PAPER_SIZE = "paper", "35M"
#: By kind of images: the side of the canvas, the channels, and the classes.
SHAPES = {DIGITS: (28, 1, 10), PLACED: (40, 1, 10), PAIRS: (36, 1, 10), BACKGROUND: (28, 3, 10), ONE_CLASS: (28, 1, 1)}


@dataclass(frozen=True)
class Job:
    """A network to train.

    kind: one of nets.KINDS, or PAPER. seed: of weights and data; networks of one seed see the same images in the same
    order. images: the kind of training images. per_class: the number of different training images of each class, 0 for
    all. keep: the weights are stored, and not the scores alone.
    """

    kind: str
    seed: int
    steps: int
    images: str = DIGITS
    size: str = "200K"
    per_class: int = 0
    batch: int = 128
    keep: bool = False

    @property
    def name(self) -> str:
        """Return the name of the run, which tells all fields but ``keep``."""
        few = f"-{self.per_class}" if self.per_class else ""
        return f"{self.images}{few}-{self.size}-{self.kind}-{self.steps}x{self.batch}-s{self.seed}"


@dataclass(frozen=True)
class Scale:
    """The sizes of a run of all rows.

    steps: by kind of training images, and ``few`` for little data and sizes. per_class: numbers of training images.
    sizes: of networks for few parameters. train, held_out, test: the numbers of images. pairs: of test pairs.
    costly: the number of images for measurements that take long, such as attacks. resamples: of the bootstrap.
    """

    name: str
    seeds: tuple[int, ...]
    steps: dict[str, int]
    size: str
    sizes: tuple[str, ...]
    per_class: tuple[int, ...]
    batch: int
    pair_batch: int
    train: int
    held_out: int
    test: int
    pairs: int
    costly: int
    resamples: int

    def base(self, kinds: Iterable[str]) -> list[Job]:
        """Return the jobs of networks of these kinds on MNIST's digits, which most rows measure, with their weights."""
        return [
            Job(kind, seed, self.steps[DIGITS], size=self.size, batch=self.batch, keep=True)
            for seed in self.seeds
            for kind in kinds
        ]

    def paper(self) -> list[Job]:
        """Return the jobs of the paper's plain network on MNIST's digits, in its own size unless all are tiny."""
        size = self.size if self.size == "tiny" else PAPER_SIZE
        return [Job(PAPER, seed, self.steps[DIGITS], size=size, batch=self.batch) for seed in self.seeds]

    def special(self, images: str, kinds: Iterable[str]) -> list[Job]:
        """Return the jobs of networks of these kinds on other images, with the first seed's weights, for pictures."""
        batch = self.pair_batch if images == PAIRS else self.batch
        return [
            Job(kind, seed, self.steps[images], images, self.size, batch=batch, keep=seed == self.seeds[0])
            for seed in self.seeds
            for kind in kinds
        ]

    def few(self, kinds: Iterable[str], size: str | None = None, per_class: int = 0) -> list[Job]:
        """Return the jobs of networks of another size on all digits, or of the usual size on a few of each class."""
        steps = self.steps[FEW]
        return [
            Job(kind, seed, steps, size=size or self.size, per_class=per_class, batch=self.batch)
            for seed in self.seeds
            for kind in kinds
        ]


SCALES = {
    "quick": Scale(
        name="quick",
        seeds=(1, 2),
        steps={DIGITS: 200, PLACED: 100, PAIRS: 60, BACKGROUND: 60, ONE_CLASS: 40, FEW: 40},
        size="tiny",
        sizes=("tiny", "50K"),
        per_class=(10, 100),
        batch=32,
        pair_batch=32,
        train=4000,
        held_out=500,
        test=500,
        pairs=500,
        costly=40,
        resamples=300,
    ),
    "full": Scale(
        name="full",
        seeds=(1, 2, 3),
        steps={DIGITS: 9000, PLACED: 2500, PAIRS: 2000, BACKGROUND: 1500, ONE_CLASS: 800, FEW: 1500},
        size="200K",
        sizes=("50K", "200K", "700K"),
        per_class=(10, 100, 1000),
        batch=128,
        pair_batch=512,
        train=55_000,
        held_out=5000,
        test=10_000,
        pairs=100_000,
        costly=1000,
        resamples=2000,
    ),
}
