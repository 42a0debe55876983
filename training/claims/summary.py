"""The contents of the report of the claims: rows with their verdicts, and the words around them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from training.claims.drawing import NAMES
from training.claims.evidence import Verdict, judge
from training.claims.jobs import Scale
from training.claims.results import Judged, judged, read_result
from training.claims.row import Claim, Row
from training.claims.store import Store

NOT_RUN = "NOT RUN"
COMPARISON_HEAD = ("comparison", "first", "second", "difference", "95 % interval", "would say")


@dataclass(frozen=True)
class Entry:
    """A row of the report: its claim, its judged result or None if it was not run, and its networks' figures."""

    claim: Claim
    judged: Judged | None
    runs: Mapping[str, Mapping[str, Any]]

    @property
    def verdict(self) -> str:
        """Return the verdict in words, or NOT_RUN."""
        return self.judged.verdict.value if self.judged else NOT_RUN

    @property
    def training_minutes(self) -> float:
        """Return the time that the training of the row's networks took, those that it shares with others included."""
        return sum(float(one["seconds"]) for one in self.runs.values()) / 60

    @property
    def measuring_minutes(self) -> float:
        """Return the time of the row's measurement."""
        return float(self.judged.result.origin["seconds"]) / 60 if self.judged else 0.0


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
        order = (*(one.value for one in Verdict), NOT_RUN)
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
            f"measurement: {entry.judged.result.origin['device']}, commit {entry.judged.result.origin['commit']}"
            for entry in self.entries
            if entry.judged
        ]
        return list(dict.fromkeys(trained + measured))


def collect(rows: Iterable[Row], scale: Scale, store: Store, command: str) -> Report:
    """Read the measured rows of a run, and compute their intervals and verdicts from their outcomes."""
    entries = []
    for row in rows:
        result = read_result(row.claim, store.folder)
        runs = {job.name: store.figures(job) for job in row.jobs(scale) if store.finished(job)}
        entries.append(Entry(row.claim, judged(result, scale.resamples) if result else None, runs))
    return Report(scale, tuple(entries), command)


def intro(report: Report) -> list[str]:
    """Return the words before the rows, in paragraphs."""
    counted = ", ".join(f"{count} {verdict}" for verdict, count in report.tally.items())
    seeds = len(report.scale.seeds)
    return [
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
    found = [("published", claim.paper), ("against it", claim.counter), ("limits", claim.limits)]
    decides = f"{claim.decides}; {claim.enough:g} or more confirms"
    if entry.judged:
        interval = entry.judged.intervals[0]
        deciding = entry.judged.result.evidence.comparisons[0]
        by_seed = ", ".join(f"{one:+.3g}" for one in (deciding.a - deciding.b).mean(1))
        decides += f"; measured {interval.mean:+.3g} ({interval.low:+.3g} to {interval.high:+.3g}), by seed {by_seed}"
        found.insert(0, ("this run", entry.judged.result.evidence.said))
        if entry.judged.note:
            found.insert(1, ("verdict", entry.judged.note))
    time = f"training {entry.training_minutes:.1f} minutes, measurement {entry.measuring_minutes:.1f} minutes"
    return [one for one in (*found, ("decides", decides), ("time", time)) if one[1]]


def comparison_cells(one: Judged) -> list[list[str]]:
    """Return the cells of the table of comparisons, the deciding one first, under COMPARISON_HEAD.

    A comparison in the unit of the deciding one has the verdict that it would have given.
    """
    lines = []
    unit, enough = one.result.evidence.comparisons[0].unit, one.result.claim.enough
    for comparison, interval in zip(one.result.evidence.comparisons, one.intervals, strict=True):
        sides = ((comparison.first, comparison.a), (comparison.second, comparison.b))
        lines.append(
            [
                f"{comparison.name} ({comparison.unit})" if comparison.unit else comparison.name,
                *(f"{NAMES.get(name, name)}: {float(outcomes.mean()):.4g}" for name, outcomes in sides),
                f"{interval.mean:+.3g}",
                f"{interval.low:+.3g} to {interval.high:+.3g}",
                judge(interval, enough).value if comparison.unit == unit else "",
            ]
        )
    return lines


def in_words(value: Any) -> str:
    """Return a figure's value as text: numbers in short, lists with commas, dictionaries with names."""
    if isinstance(value, dict):
        return "; ".join(f"{NAMES.get(name, name)}: {in_words(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(in_words(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
