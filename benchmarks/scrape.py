"""``python -m benchmarks.scrape``: the cost of scraping the metrics of a server at full load."""

import argparse
import shlex
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.figures import origin, write
from benchmarks.load import H2LOAD_MISSING, LoadError, Sample, h2load_version
from benchmarks.overload import CAPACITY
from benchmarks.server import Served, load, prepare, serve
from training.model import CONFIGS

#: Prometheus's request headers: it prefers OpenMetrics to its own text format, and takes compressed pages.
HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
#: A common interval between scrapes. It is too long for a short sample, so its cost is computed from the others.
USUAL_INTERVAL_SECONDS = 15.0

_CPU_METRIC = "process_cpu_seconds_total"
#: Scrapes in a row that measure the CPU time of one: the server's CPU clock has ticks of 10 ms.
_TIMED_SCRAPES = 100
_SHOWN_COLUMNS = (
    "interval_s", "requests_per_second", "ratio", "ratio_least", "ratio_most", "p99_ms", "scrape_p50_ms", "loss",
    "loss_scaled", "cpu_share",
)  # fmt: skip


@contextmanager
def scraping(served: Served, interval: float) -> Iterator[list[float]]:
    """Fetch the metrics in a thread, now and then every ``interval`` seconds, until the block ends.

    Yield a list to which each scrape adds its time in milliseconds. Raises LoadError if a scrape fails.
    """
    milliseconds: list[float] = []
    ending = threading.Event()

    def scrape() -> None:
        due = time.monotonic()
        while not ending.wait(max(0.0, due - time.monotonic())):
            begin = time.perf_counter()
            served.fetch(HEADERS)
            milliseconds.append(1000 * (time.perf_counter() - begin))
            due += interval

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(scrape)
        try:
            yield milliseconds
        finally:
            ending.set()
    try:
        work.result()
    except (OSError, HTTPException) as error:
        raise LoadError(f"a scrape failed: {error}") from error


def cpu_of_a_scrape(served: Served) -> float:
    """Return the CPU seconds that a scrape costs a server without other work.

    Raises LoadError if its metrics lack that time, or if a scrape fails.
    """
    try:
        before = served.page().total(_CPU_METRIC)
        for _ in range(_TIMED_SCRAPES):
            served.fetch(HEADERS)
        after = served.page().total(_CPU_METRIC)
    except (OSError, HTTPException) as error:
        raise LoadError(f"a scrape failed: {error}") from error
    if before is None or after is None:
        raise LoadError(f"the server's metrics lack {_CPU_METRIC}")
    # The clock is read while a page is made, so the difference covers one page more than the loop fetched.
    return (after - before) / (_TIMED_SCRAPES + 1)


@dataclass
class Collected:
    """The samples of all rounds.

    unscraped: the samples at the beginning and at the end of each round. scraped: by interval, a sample a round.
    scrape_ms: by interval, the time of each scrape under load. cpu_seconds: the CPU time of a scrape, one a round.
    """

    unscraped: list[tuple[Sample, Sample]] = field(default_factory=list)
    scraped: dict[float, list[Sample]] = field(default_factory=dict)
    scrape_ms: dict[float, list[float]] = field(default_factory=dict)
    cpu_seconds: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, str]]:
        """Return the rows of figures: one without scrapes, one for each interval, and one for the usual interval.

        ``ratio`` compares throughput with and without scrapes in the same round. ``loss`` is 1 minus the median ratio.
        ``loss_scaled`` is the loss at the shortest interval, scaled to this row's number of scrapes: noise matters
        less there. ``cpu_share`` is the CPU time of a scrape divided by the interval: the share of one core.
        """
        means = [statistics.mean(map(_speed, pair)) for pair in self.unscraped]
        noise = [_speed(last) / _speed(first) for first, last in self.unscraped]
        rows = [_row("", [sample for pair in self.unscraped for sample in pair], noise)]
        cpu = statistics.median(self.cpu_seconds)
        losses: dict[float, float] = {}
        for interval, samples in self.scraped.items():
            ratios = [_speed(sample) / mean for sample, mean in zip(samples, means, strict=True)]
            losses[interval] = 1 - statistics.median(ratios)
            row = _row(f"{interval:g}", samples, ratios)
            rows.append(row | {"scrape_p50_ms": f"{statistics.median(self.scrape_ms[interval]):.4g}"})
        shortest = min(losses)
        for row in rows[1:]:
            row["loss"] = f"{losses[float(row['interval_s'])]:.3g}"
        if USUAL_INTERVAL_SECONDS not in losses:
            rows.append({"interval_s": f"{USUAL_INTERVAL_SECONDS:g}"})
        for row in rows[1:]:
            row["loss_scaled"] = f"{losses[shortest] * shortest / float(row['interval_s']):.3g}"
            row["cpu_share"] = f"{cpu / float(row['interval_s']):.3g}"
        return rows


def _speed(sample: Sample) -> float:
    return sample.requests / sample.seconds


def _row(interval: str, samples: Sequence[Sample], ratios: Sequence[float]) -> dict[str, str]:
    p50, _, p99 = (statistics.median(values) for values in zip(*(one.percentiles_ms for one in samples), strict=True))
    return {
        "interval_s": interval,
        "requests_per_second": f"{statistics.median(map(_speed, samples)):.4g}",
        "ratio": f"{statistics.median(ratios):.4g}",
        "ratio_least": f"{min(ratios):.4g}",
        "ratio_most": f"{max(ratios):.4g}",
        "p50_ms": f"{p50:.4g}",
        "p99_ms": f"{p99:.4g}",
    }


def measure(
    served: Served, body: Path, intervals: Sequence[float], rounds: int, seconds: float, name: str
) -> Collected:
    """Take all samples, of ``seconds`` each. Raises LoadError if a call or a scrape fails."""
    collected = Collected()
    target = served.targets["tcp"]
    with tqdm(total=rounds * (len(intervals) + 2), desc=name, leave=False) as bar:

        def sample(interval: float | None) -> Sample:
            scraper: AbstractContextManager[list[float]] = scraping(served, interval) if interval else nullcontext([])
            with scraper as milliseconds:
                one, _, _ = load(served, target, CAPACITY, body, seconds)
            if interval:
                collected.scraped.setdefault(interval, []).append(one)
                collected.scrape_ms.setdefault(interval, []).extend(milliseconds)
            bar.update()
            return one

        for number in range(rounds):
            # Samples without scrapes stand at both ends of a round, and the order alternates, so that drift cancels.
            first = sample(None)
            for interval in intervals if number % 2 == 0 else intervals[::-1]:
                sample(interval)
            collected.unscraped.append((first, sample(None)))
            collected.cpu_seconds.append(cpu_of_a_scrape(served))
    collected.scraped = {interval: collected.scraped[interval] for interval in intervals}
    return collected


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one network as a table, with their common figures beneath it."""
    print(f"\n{rows[0]['config']} ({rows[0]['precision']}), {CAPACITY}; seconds between scrapes:")
    print("".join(f"{name:>20}" for name in _SHOWN_COLUMNS))
    for row in rows:
        print(
            "".join(f"{row.get(name, '') or ('none' if name == 'interval_s' else ''):>20}" for name in _SHOWN_COLUMNS)
        )
    same = rows[0]
    print(
        f"a scrape takes the server {same['scrape_cpu_ms']} ms of CPU time; its page has {same['page_bytes']} bytes, "
        f"{same['sent_bytes']} as sent"
    )


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.scrape", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact"], help="networks")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument("--rounds", type=int, default=7, metavar="N", help="samples of each figure (default: 7)")
    command.add_argument("--seconds", type=float, default=5.0, help="length of each sample (default: 5)")
    command.add_argument(
        "--intervals", type=float, nargs="+", default=[1.0, 0.1], metavar="SECONDS",
        help="times between two scrapes; each is measured (default: 1 and 0.1)",
    )  # fmt: skip
    command.add_argument(
        "--most", type=float, default=0.02, metavar="SHARE",
        help="share of the throughput that one scrape a second may cost; above it the exit code is 1 (default: 0.02)",
    )  # fmt: skip
    command.add_argument("--settings", default="", metavar="FLAGS", help="more flags for the server, in one argument")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    if options.rounds < 1 or not min(options.seconds, *options.intervals) > 0:
        command.error("--rounds, --seconds and --intervals: expected numbers above 0")
    version = h2load_version()
    if version is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return 2
    how = {
        "rounds": options.rounds, "seconds": options.seconds, "settings": options.settings,
        "h2load": version.rpartition("/")[2], **origin(),
    }  # fmt: skip
    intervals = tuple(dict.fromkeys(options.intervals))
    rows: list[dict[str, Any]] = []
    costly = False
    for config in options.configs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models, _, bodies = prepare(config, options.precision, folder, [CAPACITY])
            body = bodies[CAPACITY]
            try:
                with serve(models, options.precision, shlex.split(options.settings), folder) as served:
                    collected = measure(served, body, intervals, options.rounds, options.seconds, config)
                    page, sent = served.fetch(), served.fetch(HEADERS)
            except LoadError as error:
                print(f"{config}: {error}", file=sys.stderr)
                return 1
        same = {
            "scrape_cpu_ms": f"{1000 * statistics.median(collected.cpu_seconds):.3g}",
            "page_bytes": len(page), "sent_bytes": len(sent),
        }  # fmt: skip
        found = [{"config": config, "precision": options.precision} | row | same | how for row in collected.rows()]
        show(found)
        # The shortest interval has the largest loss, so noise matters least there.
        cost = float(found[1]["loss_scaled"]) * float(found[1]["interval_s"])
        print(
            f"a scrape a second costs {100 * cost:.2g} % of the throughput; expected at most {100 * options.most:g} %"
        )
        costly |= cost > options.most
        rows += found
    if options.out:
        columns = dict.fromkeys(column for row in (*rows[1:], rows[0]) for column in row if column not in how)
        write(options.out, rows, (*columns, *how))
    return int(costly)


if __name__ == "__main__":
    sys.exit(main())
