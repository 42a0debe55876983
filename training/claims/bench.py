"""The networks, scores and images that a row's measurement takes."""

from collections.abc import Callable
from dataclasses import dataclass, field

from training.claims.images import Images
from training.claims.jobs import Job, Scale
from training.claims.nets import CapsuleNet, PlainNet
from training.claims.store import Arrays, Store


@dataclass(frozen=True)
class Bench:
    """The measuring bench of a run: its sizes, its stored networks, and the images.

    progress: is told each step of a long measurement, in a few words. earlier: the seconds that earlier runs spent on
    what ``kept`` returned.
    """

    scale: Scale
    store: Store
    images: Images
    progress: Callable[[str], None] = lambda _: None
    earlier: list[float] = field(default_factory=list)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds of the run."""
        return self.scale.seeds

    def base(self, kind: str, seed: int) -> Job:
        """Return the job of the network of this kind and seed on MNIST's digits; a row lists it by ``Scale.base``."""
        [job] = [one for one in self.scale.base([kind]) if one.seed == seed]
        return job

    def net(self, job: Job) -> CapsuleNet | PlainNet:
        """Return a trained network on the CPU, in evaluation mode, in single precision, without gradients of weights.

        Raises FileNotFoundError if the job was not run, or does not keep its weights.
        """
        net = self.store.net(job)
        for weight in net.parameters():
            weight.requires_grad_(False)
        return net.eval()

    def scored(self, job: Job, name: str) -> Arrays:
        """Return what the training stored of an evaluation set, by name; see ``training.claims.scoring``."""
        return self.store.arrays(job, name)

    def kept(self, key: str, compute: Callable[[], Arrays]) -> Arrays:
        """Return ``compute()``, or what it returned in an earlier run with this key.

        A measurement that takes minutes for each network is kept by network, so that an interrupted row goes on there.
        The key must name the row and all that the arrays depend on beyond the run's scale.
        """
        arrays, seconds = self.store.kept(key, compute)
        self.earlier.append(seconds)
        return arrays
