"""The files of the report: Markdown with pictures, one HTML file, and CSV files of every run and comparison."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training.claims.jobs import Job
from training.claims.page import html_page
from training.claims.store import Store
from training.claims.summary import COMPARISON_HEAD, Entry, Report, comparison_cells, facts, in_words, intro, made

HTML_FILE, MARKDOWN_FILE, RUNS_FILE, COMPARISONS_FILE = "claims.html", "README.md", "runs.csv", "comparisons.csv"
PICTURES, OUTCOMES = "pictures", "outcomes"


def write_report(report: Report, jobs: Sequence[Job], store: Store, folder: Path) -> None:
    """Write the report's files into a folder, with the outcomes of each deciding comparison, (S, N) for both sides."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PICTURES, OUTCOMES):
        (folder / name).mkdir(exist_ok=True)
    for entry in report.entries:
        if entry.judged is None:
            continue
        evidence = entry.judged.result.evidence
        for number, content in enumerate(evidence.pictures.values()):
            (folder / PICTURES / f"{entry.claim.number:02}-{number}.png").write_bytes(content)
        deciding = evidence.comparisons[0]
        np.savez_compressed(folder / OUTCOMES / f"{entry.claim.number:02}.npz", a=deciding.a, b=deciding.b)
    (folder / HTML_FILE).write_text(html_page(report))
    (folder / MARKDOWN_FILE).write_text(markdown(report))
    _write_csv(folder / RUNS_FILE, [_run_line(job, store) for job in jobs if store.finished(job)])
    _write_csv(folder / COMPARISONS_FILE, list(_comparison_lines(report)))


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
            f" {entry.judged.result.evidence.said if entry.judged else ''} |"
            for entry in report.entries
        ),
    ]
    for entry in report.entries:
        lines += ["", *_section(entry)]
    lines += ["", "## How this was made", "", *(f"- {one}" for one in made(report)), ""]
    return "\n".join(lines)


def _section(entry: Entry) -> list[str]:
    claim = entry.claim
    lines = [f'<a id="row-{claim.number}"></a>', "", f"## {claim.number}. {claim.title}: {entry.verdict}", ""]
    lines += [claim.sentence, "", *(f"- {name}: {text}" for name, text in facts(entry))]
    if entry.judged is None:
        return lines
    evidence = entry.judged.result.evidence
    lines += ["", f"| {' | '.join(COMPARISON_HEAD)} |", f"|{'---|' * len(COMPARISON_HEAD)}"]
    lines += [f"| {' | '.join(cells)} |" for cells in comparison_cells(entry.judged)]
    if evidence.figures:
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {name} | {in_words(value)} |" for name, value in evidence.figures.items()]
    for number, title in enumerate(evidence.pictures):
        lines += ["", f"![{title}]({PICTURES}/{claim.number:02}-{number}.png)"]
    return lines


def _run_line(job: Job, store: Store) -> dict[str, Any]:
    return {"run": job.name, **asdict(job), **store.figures(job)}


def _comparison_lines(report: Report) -> Iterable[dict[str, Any]]:
    for entry in report.entries:
        if entry.judged is None:
            continue
        comparisons = entry.judged.result.evidence.comparisons
        for number, (one, interval) in enumerate(zip(comparisons, entry.judged.intervals, strict=True)):
            for seed, a, b in zip(report.scale.seeds, one.a.mean(1), one.b.mean(1), strict=False):
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
                    "images": one.a.shape[1],
                    "difference": f"{interval.mean:.6g}",
                    "low": f"{interval.low:.6g}",
                    "high": f"{interval.high:.6g}",
                }


def _write_csv(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]) if lines else ["run"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
