"""A run of the claims: train the networks that the rows need, measure the rows, write the report."""

import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from training.claims.bench import Bench
from training.claims.images import Images, load_images
from training.claims.jobs import DIGITS, PAPER, Job, Scale
from training.claims.learn import Workshop, chosen_device, train
from training.claims.report import write_report
from training.claims.results import Omission, Result, read_result, write_omission, write_result
from training.claims.row import CannotMeasure, Row
from training.claims.rows import rows
from training.claims.store import RunFolderError, Store, alone_in, write_file
from training.claims.summary import collect
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


def jobs_of(asked: list[Row], scale: Scale, *, gpu: bool) -> list[Job]:
    """Return the networks that these rows need, each once; first those that several rows measure.

    gpu: with those that a GPU alone trains.
    """
    needed = dict.fromkeys(job for row in asked for job in (row.all_jobs(scale) if gpu else row.jobs(scale)))
    return sorted(needed, key=lambda job: (job.kind == PAPER, not (job.images == DIGITS and job.keep)))


def run(settings: Settings, *, train_only: bool, no_training: bool) -> int:
    """Train, measure and report; return the exit status, 1 if something was left out or is missing.

    Raises DatasetError without the images, RunFolderError if the folder cannot be used, and OSError.
    """
    avoid_matrix_tiles()
    device = chosen_device()
    if settings.scale.name == "quick":
        torch.set_num_threads(1)  # tiny networks gain nothing from more, and sums come out alike on every machine
    _make_folder(settings.folder)
    with alone_in(settings.folder):
        _check_scale(settings)
        images = load_images(settings.scale, settings.digits, settings.clothes, settings.source)
        store = Store(settings.folder)
        left: list[Job] = []
        if not no_training:
            left = _trained(settings, store, images, device)
        if train_only:
            return 1 if left else 0
        unmeasured = _measured(settings, store, images)
        report = collect(rows(), settings.scale, store, settings.command)
        write_report(report, jobs_of(rows(), settings.scale, gpu=True), settings.report)
        print(f"the report: {settings.report}")
        return 1 if left or unmeasured else 0


def _measured(settings: Settings, store: Store, images: Images) -> list[Row]:
    """Measure the rows that were not measured yet, and return those that cannot be measured."""
    missing = []
    with tqdm(desc="rows", total=len(settings.rows), unit="row", dynamic_ncols=True, disable=None) as bar:
        for row in settings.rows:
            bar.set_postfix_str(row.claim.title)
            if omission := _omission(row, settings, store, images):
                missing.append(row)
                write_omission(omission, row.claim, store.folder)
                outcome = "failed" if omission.failed else "not run"
                tqdm.write(f"row {row.claim.number}, {row.claim.title}, {outcome}: {omission.reason}", file=sys.stderr)
            bar.update()
    return missing


def _omission(row: Row, settings: Settings, store: Store, images: Images) -> Omission | None:
    """Measure a row if it was not measured yet, and return why this cannot be done, or None.

    A row that fails must not stop those after it, so every error is a reason.
    """
    try:
        if not _is_measured(row, settings.scale, store):
            _measure(row, settings, store, images)
    except CannotMeasure as reason:
        return Omission(str(reason))
    except RunFolderError as error:
        return Omission(str(error), failed=True)
    except Exception as error:
        tqdm.write(traceback.format_exc(), file=sys.stderr)
        return Omission(f"{type(error).__name__}: {' '.join(str(error).split())}", failed=True)
    return None


def _is_measured(row: Row, scale: Scale, store: Store) -> bool:
    """Return True if a row was measured, with all of those networks that a GPU alone trains and that are there."""
    result = read_result(row.claim, store.folder)
    return result is not None and result.origin.get("on_gpu", []) == _trained_on_gpu(row, scale, store)


def _trained_on_gpu(row: Row, scale: Scale, store: Store) -> list[str]:
    return [job.name for job in row.on_gpu(scale) if store.finished(job)]


def _measure(row: Row, settings: Settings, store: Store, images: Images) -> None:
    """Measure a row and store its result. Raises CannotMeasure if a network or a package is missing."""
    missing = [job.name for job in row.jobs(settings.scale) if not store.finished(job)]
    if missing:
        raise CannotMeasure(f"{len(missing)} of its networks are not trained, such as {missing[0]}")
    begin = time.perf_counter()
    torch.manual_seed(0)
    bench = Bench(settings.scale, store, images, tqdm.write)
    evidence = row.measure(bench)
    origin = provenance(torch.device("cpu"))
    told = {
        "seconds": round(time.perf_counter() - begin + sum(bench.earlier), 1),
        "device": origin["device"],
        "commit": commit() or settings.commit,
        "on_gpu": _trained_on_gpu(row, settings.scale, store),
    }
    write_result(Result(row.claim, evidence, told), store.folder)


def _trained(settings: Settings, store: Store, images: Images, device: torch.device) -> list[Job]:
    """Train the networks and return those that are missing; see ``train``."""
    jobs = jobs_of(settings.rows, settings.scale, gpu=device.type == "cuda")
    begin = time.perf_counter()
    with tqdm(desc="networks", total=len(jobs), unit="network", dynamic_ncols=True, disable=None) as bar:
        bar.update(sum(store.finished(job) for job in jobs))
        told = (tqdm.write, bar.update, settings.deadline, settings.commit)
        left = train(jobs, Workshop(store, images, settings.scale, device, *told))
    print(f"{len(jobs) - len(left)} of {len(jobs)} networks are trained, {time.perf_counter() - begin:.0f} s")
    return left


def _make_folder(folder: Path) -> None:
    """Make the folder of the run. Raises RunFolderError if it is none, or cannot be made."""
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"--out: {folder} is a file; expected a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out: the folder {folder} cannot be made: {error.strerror}") from error


def _check_scale(settings: Settings) -> None:
    """Store the sizes of the run in its folder. Raises RunFolderError if the folder has a run of other sizes."""
    file = settings.folder / SCALE_FILE
    content = json.dumps(asdict(settings.scale), indent=1).encode()
    if not file.exists():
        write_file(file, content)
    elif file.read_bytes() != content:
        other = f"{settings.folder} has a run of other sizes than those of {settings.scale.name}"
        raise RunFolderError(f"{other}; give another --out")
