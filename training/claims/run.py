"""A run of the claims: train the networks that the rows need, measure the rows, write the report."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training.claims.bench import Bench
from training.claims.images import Images, load_images
from training.claims.jobs import DIGITS, Job, Scale
from training.claims.learn import Workshop, chosen_device, train
from training.claims.report import write_report
from training.claims.results import Result, read_result, write_result
from training.claims.row import CannotMeasure, Row
from training.claims.rows import rows
from training.claims.store import Store
from training.claims.summary import collect
from training.data.sources import DatasetError
from training.precision import avoid_matrix_tiles
from training.provenance import commit, provenance

SCALE_FILE = "scale.json"


@dataclass(frozen=True)
class Settings:
    """The settings of a run.

    numbers: of the rows; none for all. digits, clothes: folders of the data sets. source: the package managers that may
    be asked for them. deadline: of ``time.perf_counter``, for the training. command: the words that repeat the run.
    Raises ValueError for a number that no row has.
    """

    scale: Scale
    folder: Path
    numbers: tuple[int, ...] = ()
    digits: Path | None = None
    clothes: Path | None = None
    source: tuple[str, ...] = ()
    deadline: float | None = None
    commit: str = ""
    command: str = ""

    def __post_init__(self) -> None:
        known = {row.claim.number for row in rows()}
        if unknown := set(self.numbers) - known:
            raise ValueError(f"rows {sorted(unknown)}; expected some of 1 to {max(known)}")

    @property
    def report(self) -> Path:
        """Return the folder of the report."""
        return self.folder / "report"

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
        images = load_images(settings.scale, settings.digits, settings.clothes, settings.source)
    except (DatasetError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    store = Store(settings.folder)
    left: list[Job] = []
    if not no_training:
        left = _trained(settings, store, images, device)
    if train_only:
        return 1 if left else 0
    unmeasured = _measured(settings, store, images)
    report = collect(rows(), settings.scale, store, settings.command)
    write_report(report, jobs_of(rows(), settings.scale), store, settings.report)
    print(f"the report: {settings.report}")
    return 1 if left or unmeasured else 0


def _measured(settings: Settings, store: Store, images: Images) -> list[Row]:
    """Measure the rows that were not measured yet, and return those that cannot be."""
    missing = []
    with tqdm(desc="rows", total=len(settings.rows), unit="row", dynamic_ncols=True) as bar:
        for row in settings.rows:
            bar.set_postfix_str(row.claim.title)
            try:
                if read_result(row.claim, store.folder) is None:
                    _measure(row, settings, store, images)
            except CannotMeasure as reason:
                missing.append(row)
                tqdm.write(f"row {row.claim.number}, {row.claim.title}: not run. {reason}")
            bar.update()
    return missing


def _measure(row: Row, settings: Settings, store: Store, images: Images) -> None:
    """Measure a row and store its result. Raises CannotMeasure if a network or a package is missing."""
    if not all(store.finished(job) for job in row.jobs(settings.scale)):
        raise CannotMeasure("its networks are not all trained")
    begin = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(settings.scale, store, images, tqdm.write)
    evidence = row.measure(bench)
    origin = provenance(torch.device("cpu"))
    told = {
        "seconds": round(time.perf_counter() - begin + sum(bench.earlier), 1),
        "device": origin["device"],
        "commit": commit() or settings.commit,
    }
    write_result(Result(row.claim, evidence, told), store.folder)


def _trained(settings: Settings, store: Store, images: Images, device: torch.device) -> list[Job]:
    """Train the networks and return those that the deadline left out."""
    jobs = jobs_of(settings.rows, settings.scale)
    begin = time.perf_counter()
    with tqdm(desc="networks", total=len(jobs), unit="network", dynamic_ncols=True) as bar:
        bar.update(sum(store.finished(job) for job in jobs))
        told = (tqdm.write, bar.update, settings.deadline, settings.commit)
        left = train(jobs, Workshop(store, images, settings.scale, device, *told))
    print(f"{len(jobs) - len(left)} of {len(jobs)} networks are trained, {time.perf_counter() - begin:.0f} s")
    return left


def _check_scale(settings: Settings) -> None:
    """Store the sizes of the run in its folder. Raises ValueError if the folder has a run of other sizes."""
    file = settings.folder / SCALE_FILE
    text = json.dumps(asdict(settings.scale), indent=1)
    if file.exists() and file.read_text() != text:
        raise ValueError(f"{settings.folder} has a run of other sizes; give another --out")
    settings.folder.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
