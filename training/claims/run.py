"""A run of the claims: train the networks that the rows need, measure the rows, write the report."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training.claims.images import Images, load_images
from training.claims.jobs import DIGITS, Job, Scale
from training.claims.learn import Workshop, chosen_device, train
from training.claims.row import Row
from training.claims.rows import rows
from training.claims.store import Store
from training.data.sources import DatasetError
from training.precision import avoid_matrix_tiles

SCALE_FILE = "scale.json"


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    numbers: of the rows; none for all. digits, clothes: folders of the data sets. deadline: of ``time.perf_counter``,
    for the training. command: the words that repeat the run. Raises ValueError for a number that no row has.
    """

    scale: Scale
    folder: Path
    numbers: tuple[int, ...] = ()
    digits: Path | None = None
    clothes: Path | None = None
    deadline: float | None = None
    commit: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        known = {row.claim.number for row in rows()}
        if unknown := set(self.numbers) - known:
            raise ValueError(f"rows {sorted(unknown)}; expected some of 1 to {max(known)}")

    @property
    def rows(self) -> list[Row]:
        """Return the rows that are asked for."""
        return [row for row in rows() if not self.numbers or row.claim.number in self.numbers]


def jobs_of(asked: list[Row], scale: Scale) -> list[Job]:
    """Return the networks that these rows need, each once; first those that several rows measure."""
    needed = dict.fromkeys(job for row in asked for job in row.jobs(scale))
    return sorted(needed, key=lambda job: not (job.images == DIGITS and job.keep))


def run(settings: Settings, *, train_only: bool, no_training: bool) -> int:
    """Train, measure and report; return the exit status, 1 if something was left out or is missing."""
    avoid_matrix_tiles()
    device = chosen_device()
    if settings.scale.name == "quick":
        torch.set_num_threads(1)  # tiny networks gain nothing from more, and sums come out alike on every machine
    try:
        _check_scale(settings)
        images = load_images(settings.scale, settings.digits, settings.clothes)
    except (DatasetError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    store = Store(settings.folder)
    left: list[Job] = []
    if not no_training:
        left = _trained(settings, store, images, device)
    if train_only:
        return 1 if left else 0
    return 0


def _trained(settings: Settings, store: Store, images: Images, device: torch.device) -> list[Job]:
    """Train the networks and return those that the deadline left out."""
    jobs = jobs_of(settings.rows, settings.scale)
    begin = time.perf_counter()
    with _bar("networks", len(jobs)) as bar:
        bar.update(sum(store.finished(job) for job in jobs))
        shop = Workshop(
            store,
            images,
            settings.scale,
            device,
            tqdm.write,
            lambda: bar.update() and None,
            settings.deadline,
            settings.commit,
        )
        left = train(jobs, shop)
    print(f"{len(jobs) - len(left)} of {len(jobs)} networks are trained, {time.perf_counter() - begin:.0f} s")
    return left


@contextmanager
def _bar(name: str, total: int) -> Iterator["tqdm[None]"]:
    with tqdm(desc=name, total=total, unit=name.removesuffix("s"), dynamic_ncols=True) as bar:
        yield bar


def _check_scale(settings: Settings) -> None:
    """Store the sizes of the run in its folder. Raises ValueError if the folder has a run of other sizes."""
    file = settings.folder / SCALE_FILE
    text = json.dumps(asdict(settings.scale), indent=1)
    if file.exists() and file.read_text() != text:
        raise ValueError(f"{settings.folder} has a run of other sizes; give another --out")
    settings.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
