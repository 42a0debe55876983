"""The rows of the report: a claim, the networks that it needs, and its measurement."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.claims.evidence import Evidence
from training.claims.jobs import Job, Scale

if TYPE_CHECKING:
    from training.claims.bench import Bench


class CannotMeasure(RuntimeError):
    """A row cannot be measured on this machine. The text says why."""


@dataclass(frozen=True)
class Claim:
    """The fixed facts of a row.

    number: 1 to 16. title: a few words. sentence: the claim as its authors make it, for a lay reader. paper: the
    figure that was published for it, with its source. counter: the strongest paper that contradicts it, with its
    figure. decides: the words for the deciding comparison's difference. enough: the smallest mean difference that
    confirms the claim; a smaller one, if it is not 0, makes it weaker. limits: the ways in which this measurement
    differs from the published one.
    """

    number: int
    title: str
    sentence: str
    paper: str
    counter: str
    decides: str
    enough: float
    limits: str = ""


@dataclass(frozen=True)
class Row:
    """A claim with its jobs, in the order of their importance, and its measurement from their networks.

    on_gpu: jobs that a GPU alone trains. The row is measured without their networks where they are missing.
    """

    claim: Claim
    jobs: Callable[[Scale], list[Job]]
    measure: Callable[["Bench"], Evidence]
    on_gpu: Callable[[Scale], list[Job]] = lambda scale: []

    def all_jobs(self, scale: Scale) -> list[Job]:
        """Return the jobs of a run with a GPU."""
        return [*self.jobs(scale), *self.on_gpu(scale)]
