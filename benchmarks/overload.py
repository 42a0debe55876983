"""``python -m benchmarks.overload``: the server under several times the load that it can serve."""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.figures import origin, write
from benchmarks.load import (
    H2LOAD_MISSING,
    Flood,
    LoadError,
    Probes,
    children_cpu_seconds,
    flood,
    h2load_version,
    in_own_process,
)
from benchmarks.server import SERVICE, Case, Served, load, prepare, serve
from training.model import CONFIGS

#: The load that measures capacity: it keeps the server busy without filling its queue.
CAPACITY = Case(64)

METHOD = "Classify"

_STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
_MEMORY_METRIC = "process_resident_memory_bytes"
_HANDLED_METRIC = "grpc_server_handled_total"
_SETTLE_SECONDS = 5.0
_OK = grpc.StatusCode.OK.value[0]
_MIB = 2**20


def memory(served: Served) -> float:
    """Return the resident memory of the server in MiB. Raises LoadError if its metrics lack it."""
    value = served.page().total(_MEMORY_METRIC)
    if value is None:
        raise LoadError(f"the server's metrics lack {_MEMORY_METRIC}")
    return value / _MIB


def capacity(served: Served, body: Path, seconds: float, deadline: float) -> float:
    """Return the single images a second that the server answers, the median of three samples.

    The clients wait for each answer. The calls have the deadline of the overload, since a deadline costs some time.
    """
    samples = [load(served, served.targets["tcp"], CAPACITY, body, seconds, deadline)[0] for _ in range(3)]
    return statistics.median(sample.requests / sample.seconds for sample in samples)


def ended(served: Served, calls: float) -> dict[str, int]:
    """Return the number of calls that ended with each status, once ``calls`` have ended.

    Raises LoadError if they do not end in time.
    """
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        page = served.page()
        counts = {
            code: page.total(_HANDLED_METRIC, grpc_method=METHOD, grpc_code=code) for code in _STATUS_NAMES.values()
        }
        by_code = {code: int(count) for code, count in counts.items() if count}
        if sum(by_code.values()) >= calls:
            return by_code
        if time.monotonic() > end:
            raise LoadError(f"{sum(by_code.values())} calls ended; expected {calls:.0f}")
        time.sleep(0.05)


def overload(
    served: Served, body: Path, rate: float, probes: float, seconds: float, deadline: float
) -> tuple[Flood, Probes, float]:
    """Send ``rate`` calls a second, ``probes`` of them by a client that times each call.

    At most a tenth of the calls are probes. Return both results and the CPU seconds of both clients.
    """
    probes = min(probes, rate / 10)
    target, path = served.targets["tcp"], f"{SERVICE}/{METHOD}"
    flags = ("--rate", probes, "--seconds", seconds, "--deadline", deadline)
    calls = max(1, round((rate - probes) * seconds))
    before = children_cpu_seconds()
    with ThreadPoolExecutor() as pool:
        probing = pool.submit(in_own_process, "probe", target, path, body, *flags)
        flooded = flood(target, path, body, rate - probes, calls, deadline)
        printed = probing.result()
    by_code = {int(code): several for code, several in printed["latencies_ms"].items()}
    return flooded, Probes(**printed | {"latencies_ms": by_code}), children_cpu_seconds() - before


def figures(
    flooded: Flood, probed: Probes, by_code: Mapping[str, int], deadline: float, before: float, after: float
) -> dict[str, Any]:
    """Return the figures of an overload by column.

    by_code: the number of calls that ended with each status, by the server's metrics. deadline: in seconds. before,
    after: the capacity before and after the overload, in calls a second.
    """
    calls = flooded.calls + probed.calls
    late = int((flooded.latencies_ms > 1000 * deadline).sum()) + probed.expired
    ok = by_code.get(_STATUS_NAMES[_OK], 0)
    accepted = probed.latencies_ms.get(_OK, [])
    refused = [one for code, several in probed.latencies_ms.items() if code != _OK for one in several]
    # The status of a single answer of the flood is unknown, and every late answer may have been OK. So this is a lower
    # bound.
    goodput = max(0, ok - late) / flooded.seconds

    def percentile(several: list[float], percent: float) -> str:
        return f"{np.percentile(several, percent):.4g}" if several else ""

    return {
        "capacity_before": f"{before:.4g}",
        "capacity_after": f"{after:.4g}",
        "offered_per_second": f"{flooded.rate * calls / flooded.calls:.4g}",
        "calls": calls,
        "answers": ", ".join(f"{count} {code}" for code, count in sorted(by_code.items())),
        "late": late,
        "goodput_per_second": f"{goodput:.4g}",
        "goodput_share": f"{goodput / statistics.mean((before, after)):.4g}",
        # The latency of the median refusal, if every refusal came before every answer; otherwise it is a lower bound.
        "flood_refused_p50_ms": f"{np.quantile(flooded.latencies_ms, (1 - ok / calls) / 2):.4g}" if ok < calls else "",
        "probes_refused": len(refused),
        "refused_p50_ms": percentile(refused, 50),
        "refused_p99_ms": percentile(refused, 99),
        "probes_accepted": len(accepted),
        "accepted_p50_ms": percentile(accepted, 50),
        "accepted_p99_ms": percentile(accepted, 99),
    }


def measure(served: Served, body: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one overload, and the capacity before and after it. Return the figures by column."""
    sample_seconds = min(5.0, options.seconds)
    before = capacity(served, body, sample_seconds, options.deadline)
    memory_before = memory(served)
    first = ended(served, 0)
    flooded, probed, cpu_seconds = overload(
        served, body, options.times * before, options.probes, options.seconds, options.deadline
    )
    calls = sum(first.values()) + flooded.calls + probed.calls
    by_code = {code: count - first.get(code, 0) for code, count in ended(served, calls).items()}
    memory_after = memory(served)
    after = capacity(served, body, sample_seconds, options.deadline)
    return {
        "times": options.times, "seconds": options.seconds, "deadline": options.deadline,
        **figures(flooded, probed, by_code, options.deadline, before, after),
        "client_cores": f"{cpu_seconds / flooded.seconds:.3g}",
        "memory_before_mib": f"{memory_before:.4g}", "memory_after_mib": f"{memory_after:.4g}",
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact"], help="networks")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument("--rounds", type=int, default=1, help="overloads, one after the other (default: 1)")
    command.add_argument("--seconds", type=float, default=60.0, help="length of the overload (default: 60)")
    command.add_argument("--times", type=float, default=3.0, help="calls as a multiple of the capacity (default: 3)")
    command.add_argument("--deadline", type=float, default=1.0, help="deadline of each call, in seconds (default: 1)")
    command.add_argument(
        "--probes", type=float, default=20.0, help="calls a second that are timed one by one (default: 20)"
    )
    command.add_argument("--settings", default="", metavar="FLAGS", help="more flags for the server, in one argument")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    if not min(options.seconds, options.times, options.deadline, options.probes, options.rounds) > 0:
        command.error("--seconds, --times, --deadline, --probes and --rounds: expected numbers above 0")
    version = h2load_version()
    if version is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for config in options.configs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models, _, bodies = prepare(config, options.precision, folder, [CAPACITY])
            try:
                with serve(models, options.precision, shlex.split(options.settings), folder) as served:
                    for number in range(options.rounds):
                        row = {"config": config, "precision": options.precision, "round": number + 1}
                        row |= measure(served, bodies[CAPACITY], options)
                        for column, value in row.items():
                            print(f"{column:<22}{value}", flush=True)
                        rows.append(row | {"settings": options.settings, **origin()})
            except LoadError as error:
                print(f"{config}: {error}", file=sys.stderr)
                return 1
    if options.out:
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
