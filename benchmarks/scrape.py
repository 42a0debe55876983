"""``python -m benchmarks.scrape``: the cost of fetching the metrics, to a server at full load."""

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

#: Headers as Prometheus sends them: it takes OpenMetrics before its own text format, and compressed pages.
HEADERS = {
    "Accept": "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
    "Accept-Encoding": "gzip",
}
#: Seconds between two scrapes that are common: too rare for a short sample, so that only their cost is computed.
USUAL_INTERVAL = 15.0

_CPU = "process_cpu_seconds_total"
#: Scrapes one after another in each round, so that the server's clock, of 10 ms a tick, can tell what one takes.
_COUNTED = 100
_SHOWN = (
    "interval_s", "requests_per_second", "ratio", "ratio_least", "ratio_most", "p99_ms", "scrape_p50_ms", "loss",
    "loss_scaled", "cpu_share",
)  # fmt: skip


@contextmanager
def scraping(served: Served, interval: float) -> Iterator[list[float]]:
    """Fetch the metrics at once and then every ``interval`` seconds, in a thread, until the block ends.

    Yields a list that grows by the milliseconds that each took. Raises LoadError if one fails.
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
    """Return the seconds of CPU time that a scrape takes the server, which has no other work.

    Raises LoadError if its metrics lack that time, or if a scrape fails.
    """
    try:
        before = served.page().total(_CPU)
        for _ in range(_COUNTED):
            served.fetch(HEADERS)
        after = served.page().total(_CPU)
    except (OSError, HTTPException) as error:
        raise LoadError(f"a scrape failed: {error}") from error
    if before is None or after is None:
        raise LoadError(f"the server's metrics lack {_CPU}")
    # From within the first page to within the last one, which is a page more than those between them.
    return (after - before) / (_COUNTED + 1)


@dataclass
class Collected:
    """Samples of all rounds. unscraped: one at the begin and one at the end of each; scraped: one a round and interval.

    scrape_ms: of the scrapes under load. cpu_seconds: of a scrape, a figure a round.
    """

    unscraped: list[tuple[Sample, Sample]] = field(default_factory=list)
    scraped: dict[float, list[Sample]] = field(default_factory=dict)
    scrape_ms: dict[float, list[float]] = field(default_factory=dict)
    cpu_seconds: list[float] = field(default_factory=list)

    def rows(self) -> list[dict[str, str]]:
        """Return the figures by their columns: a row for nobody scraping, for each interval, and for the usual one.

        Ratios are taken in each round. ``loss`` is the share of the throughput that scraping took by its median ratio.
        ``loss_scaled`` is that of the shortest interval by the number of scrapes, which the noise of samples spoils
        less. ``cpu_share`` is the CPU time of a scrape in terms of the interval: the share of one core.
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
        if USUAL_INTERVAL not in losses:
            rows.append({"interval_s": f"{USUAL_INTERVAL:g}"})
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
            # Without scrapes at both ends of a round, and the others in turns, so that the machine's drift cancels.
            first = sample(None)
            for interval in intervals if number % 2 == 0 else intervals[::-1]:
                sample(interval)
            collected.unscraped.append((first, sample(None)))
            collected.cpu_seconds.append(cpu_of_a_scrape(served))
    collected.scraped = {interval: collected.scraped[interval] for interval in intervals}
    return collected


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of one network as a table, and beneath it what they have in common."""
    print(f"\n{rows[0]['config']} ({rows[0]['precision']}), {CAPACITY}; seconds between scrapes:")
    print("".join(f"{name:>20}" for name in _SHOWN))
    for row in rows:
        print("".join(f"{row.get(name, '') or ('none' if name == 'interval_s' else ''):>20}" for name in _SHOWN))
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
    command.add_argument("--seconds", type=float, default=5.0, help="of each sample (default: 5)")
    command.add_argument(
        "--intervals", type=float, nargs="+", default=[1.0, 0.1], metavar="SECONDS",
        help="between two scrapes, each measured (default: 1 and 0.1)",
    )  # fmt: skip
    command.add_argument(
        "--most", type=float, default=0.02, metavar="SHARE",
        help="of the throughput that a scrape a second may cost; above it the command exits with 1 (default: 0.02)",
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
        # Of the shortest interval, whose loss stands out of the noise the most.
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
