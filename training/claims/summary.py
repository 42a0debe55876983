"""The contents of the report of the claims: rows with their verdicts, and the words around them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.claims.drawing import NAMES
from training.claims.evidence import Verdict, judge
from training.claims.jobs import Scale
from training.claims.results import Finding, Omission, found, read_omission, read_result
from training.claims.row import Claim, Row
from training.claims.store import DamagedRunError, Store

NOT_RUN, FAILED = "NOT RUN", "FAILED"
COMPARISON_HEAD = ("comparison", "first", "second", "difference", "95 % interval", "would say")


@dataclass(frozen=True)
class Entry:
    """A row of the report.

    finding: its measurement, or the reason why there is none. runs: the figures of its trained networks, by name.
    """

    claim: Claim
    finding: Finding | Omission
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def verdict(self) -> str:
        """Return the verdict in words, NOT_RUN or FAILED."""
        if isinstance(self.finding, Finding):
            return self.finding.verdict.value
        return FAILED if self.finding.failed else NOT_RUN

    @property
    def said(self) -> str:
        """Return the figures of this run in one sentence, or why there are none."""
        if isinstance(self.finding, Finding):
            return self.finding.said
        if not self.finding.reason:
            return "This row was not run."
        return f"{'failed' if self.finding.failed else 'not run'}: {self.finding.reason}"

    @property
    def training_minutes(self) -> float:
        """Return the time that the training of the row's networks took, those that it shares with others included."""
        return sum(float(one["seconds"]) for one in self.runs.values()) / 60

    @property
    def measuring_minutes(self) -> float:
        """Return the time of the row's measurement."""
        return float(self.finding.origin["seconds"]) / 60 if isinstance(self.finding, Finding) else 0.0


@dataclass(frozen=True)
class Report:
    """All that a report says. command: the words that repeat the run."""

    scale: Scale
    entries: tuple[Entry, ...]
    command: str

    @property
    def tally(self) -> dict[str, int]:
        """Return the number of rows by verdict, without the verdicts of none."""
        verdicts = [entry.verdict for entry in self.entries]
        order = (*(one.value for one in Verdict), NOT_RUN, FAILED)
        return {verdict: verdicts.count(verdict) for verdict in order if verdict in verdicts}

    @property
    def origins(self) -> list[str]:
        """Return the devices, commits and versions of PyTorch of the trainings and the measurements, each once."""
        trained = [
            f"training: {run['device']}, PyTorch {run['torch']}, commit {run['commit']}"
            for entry in self.entries
            for run in entry.runs.values()
        ]
        measured = [
            f"measurement: {entry.finding.origin['device']}, commit {entry.finding.origin['commit']}"
            for entry in self.entries
            if isinstance(entry.finding, Finding)
        ]
        return list(dict.fromkeys(trained + measured))


def collect(rows: Iterable[Row], scale: Scale, store: Store, command: str) -> Report:
    """Read the measured rows of a run, and compute their intervals and verdicts from their outcomes."""
    return Report(scale, tuple(_entry(row, scale, store) for row in rows), command)


def _entry(row: Row, scale: Scale, store: Store) -> Entry:
    """Return a row of the report; one with a file that cannot be read has failed."""
    runs: dict[str, dict[str, Any]] = {}
    try:
        for job in row.all_jobs(scale):
            if store.finished(job):
                runs[job.name] = store.figures(job)
        result = read_result(row.claim, store.folder)
        finding = found(result, scale.resamples) if result else read_omission(row.claim, store.folder)
    except (OSError, DamagedRunError) as error:
        return Entry(row.claim, Omission(str(error), failed=True), runs)
    return Entry(row.claim, finding, runs)


def intro(report: Report) -> list[str]:
    """Return the words before the rows, in paragraphs."""
    counted = ", ".join(f"{count} {verdict}" for verdict, count in report.tally.items())
    seeds = len(report.scale.seeds)
    tiny = "A quick run, which tries the command out on tiny networks: its figures mean nothing. "
    return [
        f"{tiny if report.scale.name == 'quick' else ''}"
        "A capsule network answers with a vector for each class: its length says how likely the class is there, and its"
        " direction how the object looks. Many advantages are claimed for such networks. Each row measures one claim"
        " on our capsule network (three rounds of routing) and on a plain network with the same stem, as many"
        " parameters, the same images in the same order and as many steps.",
        "CONFIRMED: a difference was shown, as large as the claim needs. WEAKER: it was shown, but is smaller."
        " NOT CONFIRMED: no difference could be shown, or the opposite was measured. The verdicts are computed from a"
        f" paired bootstrap over images and seeds, at 95 % confidence. {seeds} seeds are few, so that an interval may"
        " be too narrow: each row also has the difference of each seed. Its"
        " other comparisons have the verdict that they would give by the same rule, if they are in the same unit.",
        f"Result: {counted}.",
    ]


def made(report: Report) -> list[str]:
    """Return how the figures came about: command, seeds, devices, commits, minutes."""
    trained = {name: run["seconds"] for entry in report.entries for name, run in entry.runs.items()}
    measured = sum(entry.measuring_minutes for entry in report.entries)
    return [
        f"command: `{report.command}`",
        f"seeds: {', '.join(map(str, report.scale.seeds))}; {len(trained)} networks",
        f"steps: {', '.join(f'{count} ({name})' for name, count in report.scale.steps.items())},"
        f" of {report.scale.batch} images, or {report.scale.pair_batch} pairs",
        f"training: {sum(trained.values()) / 60:.1f} minutes; measurements: {measured:.1f} minutes",
        *report.origins,
    ]


def facts(entry: Entry) -> list[tuple[str, str]]:
    """Return the fixed facts of a row and its deciding comparison, by name."""
    claim = entry.claim
    decides = f"{claim.decides}; {claim.enough:g} or more confirms"
    note = ""
    if isinstance(entry.finding, Finding):
        deciding = entry.finding.compared[0]
        interval = deciding.interval
        by_seed = ", ".join(f"{one:+.3g}" for one in deciding.by_seed)
        decides += f"; measured {interval.mean:+.3g} ({interval.low:+.3g} to {interval.high:+.3g}), by seed {by_seed}"
        note = entry.finding.note
    time = f"training {entry.training_minutes:.1f} minutes, measurement {entry.measuring_minutes:.1f} minutes"
    told = [
        ("this run", entry.said), ("verdict", note), ("published", claim.paper), ("against it", claim.counter),
        ("limits", claim.limits), ("decides", decides), ("time", time),
    ]  # fmt: skip
    return [one for one in told if one[1]]


def comparison_cells(finding: Finding) -> list[list[str]]:
    """Return the cells of the table of comparisons, the deciding one first, under COMPARISON_HEAD.

    A comparison in the unit of the deciding one has the verdict that it would have given.
    """
    return [
        [
            f"{one.name} ({one.unit})" if one.unit else one.name,
            *(f"{NAMES.get(name, name)}: {mean:.4g}" for name, mean in one.sides),
            f"{one.interval.mean:+.3g}",
            f"{one.interval.low:+.3g} to {one.interval.high:+.3g}",
            judge(one.interval, finding.claim.enough).value if one.unit == finding.compared[0].unit else "",
        ]
        for one in finding.compared
    ]


def figure_lines(value: Any, *names: str) -> list[str]:
    """Return a figure's value as lines of text: one for each innermost list or dictionary, with its outer names."""
    if isinstance(value, dict) and any(isinstance(one, dict | list | tuple) for one in value.values()):
        return [line for name, one in value.items() for line in figure_lines(one, *names, NAMES.get(name, str(name)))]
    if names and isinstance(value, dict):
        words = ", ".join(f"{in_words(one)} ({NAMES.get(name, name)})" for name, one in value.items())
    else:
        words = in_words(value)
    return [f"{'; '.join(names)}: {words}" if names else words]


def in_words(value: Any) -> str:
    """Return a figure's value as text: numbers in short, lists with commas, dictionaries with names."""
    if isinstance(value, dict):
        return "; ".join(f"{NAMES.get(name, name)}: {in_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(in_words(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
