"""The files of the report: Markdown with pictures, one HTML file, CSV files of every run and comparison, report.json.

report.json has all figures of the report, so that ``training.claims.rewrite`` can write its pages again.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training.claims.evidence import Interval
from training.claims.jobs import Job, Scale
from training.claims.page import html_page
from training.claims.results import Compared, Finding, Omission
from training.claims.row import Claim, Row
from training.claims.store import reading
from training.claims.summary import COMPARISON_HEAD, Entry, Report, comparison_cells, facts, figure_lines, intro, made

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "claims.html", "README.md", "report.json"
RUNS_FILE, COMPARISONS_FILE = "runs.csv", "comparisons.csv"
PICTURES, OUTCOMES = "pictures", "outcomes"


def write_report(report: Report, jobs: Sequence[Job], folder: Path) -> None:
    """Write the report's files into a folder, with the outcomes of each deciding comparison, (S, N) for both sides.

    jobs: of the runs to list, in their order, where the report has their figures.
    """
    for name in (PICTURES, OUTCOMES):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for entry in report.entries:
        if not isinstance(entry.finding, Finding):
            continue
        for number, content in enumerate(entry.finding.pictures.values()):
            _picture(folder, entry.claim, number).write_bytes(content)
        if entry.finding.outcomes:
            a, b = entry.finding.outcomes
            np.savez_compressed(folder / OUTCOMES / f"{entry.claim.number:02}.npz", a=a, b=b)
    runs = {name: figures for entry in report.entries for name, figures in entry.runs.items()}
    _write_csv(
        folder / RUNS_FILE, [{"run": job.name, **asdict(job), **runs[job.name]} for job in jobs if job.name in runs]
    )
    write_pages(report, folder)


def write_pages(report: Report, folder: Path) -> None:
    """Write those files of a report that have words: the pages, the comparisons, and report.json."""
    (folder / HTML_FILE).write_text(html_page(report))
    (folder / MARKDOWN_FILE).write_text(markdown(report))
    _write_csv(folder / COMPARISONS_FILE, list(_comparison_lines(report)))
    told = {
        "scale": asdict(report.scale),
        "command": report.command,
        "rows": {entry.claim.number: _told(entry) for entry in report.entries},
    }
    (folder / JSON_FILE).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def read_report(rows: Iterable[Row], folder: Path) -> Report:
    """Read a written report. Its claims have the words that they have in ``rows``.

    Raises OSError if a file is missing, and DamagedRunError if one cannot be read.
    """
    with reading(folder / RUNS_FILE), (folder / RUNS_FILE).open(newline="") as stream:
        runs = {line["run"]: {**line, "seconds": float(line["seconds"])} for line in csv.DictReader(stream)}
    with reading(folder / JSON_FILE):
        told = json.loads((folder / JSON_FILE).read_text())
        sizes: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told["scale"].items()
        }
        scale = Scale(**sizes)
        entries = []
        for row in rows:
            names = [job.name for job in row.all_jobs(scale) if job.name in runs]
            finding = _finding(row, told["rows"][str(row.claim.number)], folder)
            entries.append(Entry(row.claim, finding, {name: runs[name] for name in names}))
        return Report(scale, tuple(entries), told["command"])


def markdown(report: Report) -> str:
    """Return the report as Markdown, with links to the pictures beside it."""
    lines = [
        "# Sixteen claims made for capsule networks, measured",
        "",
        "\n\n".join(intro(report)),
        "",
        f"The same report with all pictures in one file is [{HTML_FILE}]({HTML_FILE}).",
        "",
        "| row | claim | verdict | this run |",
        "|---|---|---|---|",
        *(
            f"| [{entry.claim.number}](#row-{entry.claim.number}) | {entry.claim.sentence} | **{entry.verdict}** |"
            f" {_cell(entry.said)} |"
            for entry in report.entries
        ),
    ]
    for entry in report.entries:
        lines += ["", *_section(entry)]
    lines += ["", "## How this was made", "", *(f"- {one}" for one in made(report)), ""]
    return "\n".join(lines)


def _section(entry: Entry) -> list[str]:
    claim, finding = entry.claim, entry.finding
    lines = [f'<a id="row-{claim.number}"></a>', "", f"## {claim.number}. {claim.title}: {entry.verdict}", ""]
    lines += [claim.sentence, "", *(f"- {name}: {text}" for name, text in facts(entry))]
    if not isinstance(finding, Finding):
        return lines
    lines += ["", f"| {' | '.join(COMPARISON_HEAD)} |", f"|{'---|' * len(COMPARISON_HEAD)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in comparison_cells(finding)]
    if finding.figures:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {'<br>'.join(figure_lines(value))} |" for name, value in finding.figures.items()]
    for number, title in enumerate(finding.pictures):
        lines += ["", f"![{title}]({PICTURES}/{claim.number:02}-{number}.png)"]
    return lines


def _cell(text: str) -> str:
    """Return a text as a cell of a table, of which a line would end it."""
    return text.replace("|", "\\|")


def _picture(folder: Path, claim: Claim, number: int) -> Path:
    return folder / PICTURES / f"{claim.number:02}-{number}.png"


def _told(entry: Entry) -> dict[str, Any]:
    """Return a row as report.json has it."""
    finding = entry.finding
    if not isinstance(finding, Finding):
        return asdict(finding)
    return {
        "said": finding.said,
        "comparisons": [asdict(one) for one in finding.compared],
        "figures": finding.figures,
        "pictures": list(finding.pictures),
        "origin": finding.origin,
    }


def _finding(row: Row, told: Mapping[str, Any], folder: Path) -> Finding | Omission:
    """Return a row that report.json has; the reverse of ``_told``."""
    if "reason" in told:
        return Omission(**told)
    compared = tuple(
        Compared(**{**one, "a": tuple(one["a"]), "b": tuple(one["b"]), "interval": Interval(**one["interval"])})
        for one in told["comparisons"]
    )
    pictures = {
        title: _picture(folder, row.claim, number).read_bytes() for number, title in enumerate(told["pictures"])
    }
    return Finding(row.claim, told["said"], compared, told["figures"], pictures, told["origin"])


def _comparison_lines(report: Report) -> Iterable[dict[str, Any]]:
    for entry in report.entries:
        if not isinstance(entry.finding, Finding):
            continue
        for number, one in enumerate(entry.finding.compared):
            for seed, a, b in zip(report.scale.seeds, one.a, one.b, strict=False):
                yield {
                    "row": entry.claim.number,
                    "verdict": entry.verdict if number == 0 else "",
                    "comparison": one.name,
                    "unit": one.unit,
                    "first": one.first,
                    "second": one.second,
                    "seed": seed,
                    "first_mean": f"{a:.6g}",
                    "second_mean": f"{b:.6g}",
                    "images": one.images,
                    "difference": f"{one.interval.mean:.6g}",
                    "low": f"{one.interval.low:.6g}",
                    "high": f"{one.interval.high:.6g}",
                }


def _write_csv(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]) if lines else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
