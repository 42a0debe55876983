"""``python -m benchmarks.overload``: the server at several times its capacity, from clients that do not wait for it."""

import argparse
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.figures import origin, write
from benchmarks.load import H2LOAD_MISSING, LoadError, Overload, h2load_version, in_own_process
from benchmarks.server import SERVICE, Case, Served, load, prepare, serve
from training.model import CONFIGS

#: Enough in flight to keep the server busy, and not more than it takes at once.
CAPACITY = Case(64)

_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
_MEMORY = "process_resident_memory_bytes"
_MIB = 2**20


def memory(served: Served) -> float:
    """Resident memory of the server in MiB. Raises LoadError where its metrics do not tell."""
    value = served.page().total(_MEMORY)
    if value is None:
        raise LoadError(f"the server's metrics lack {_MEMORY}")
    return value / _MIB


def capacity(served: Served, body: Path, seconds: float) -> float:
    """Single images a second that the server answers to clients that wait, the median of three samples."""
    samples = [load(served, served.targets["tcp"], CAPACITY, body, seconds)[0] for _ in range(3)]
    return statistics.median(sample.requests / sample.seconds for sample in samples)


def figures(outcome: Overload, before: float, after: float) -> dict[str, Any]:
    """The figures of an overload by their columns. before, after: the capacity, in calls a second."""
    accepted = outcome.latencies_ms.get(0, [])
    refused = [one for code, several in outcome.latencies_ms.items() if code != 0 for one in several]
    goodput = len(accepted) / outcome.seconds

    def percentile(several: list[float], percent: float) -> str:
        return f"{np.percentile(several, percent):.4g}" if several else ""

    return {
        "capacity_before": f"{before:.4g}",
        "capacity_after": f"{after:.4g}",
        "offered_per_second": f"{outcome.calls / outcome.seconds:.4g}",
        "calls": outcome.calls,
        "ok": len(accepted),
        "refused": len(refused),
        "expired": outcome.expired,
        "unsent": outcome.unsent,
        "goodput_per_second": f"{goodput:.4g}",
        "goodput_share": f"{goodput / statistics.mean((before, after)):.4g}",
        "refused_p50_ms": percentile(refused, 50),
        "refused_p99_ms": percentile(refused, 99),
        "accepted_p50_ms": percentile(accepted, 50),
        "accepted_p99_ms": percentile(accepted, 99),
        "client_cores": f"{outcome.client_cpu_seconds / outcome.seconds:.3g}",
        "answers": ", ".join(
            f"{len(several)} {_CODES[code]} (median {statistics.median(several):.4g} ms)"
            for code, several in sorted(outcome.latencies_ms.items())
        ),
    }


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact"], help="networks")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument("--seconds", type=float, default=60.0, help="of overload (default: 60)")
    command.add_argument("--times", type=float, default=3.0, help="calls in terms of the capacity (default: 3)")
    command.add_argument("--deadline", type=float, default=1.0, help="of each call, in seconds (default: 1)")
    command.add_argument("--settings", default="", metavar="FLAGS", help="more flags for the server, in one argument")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    if not min(options.seconds, options.times, options.deadline) > 0:
        command.error("--seconds, --times and --deadline: expected numbers above 0")
    version = h2load_version()
    if version is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    for config in options.configs:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models, _, bodies = prepare(config, options.precision, folder, [CAPACITY])
            body = bodies[CAPACITY]
            sample_seconds = min(5.0, options.seconds)
            try:
                with serve(models, options.precision, shlex.split(options.settings), folder) as served:
                    before = capacity(served, body, sample_seconds)
                    memory_before = memory(served)
                    printed = in_own_process(
                        "rate", served.targets["tcp"], f"{SERVICE}/Classify", body, "--rate", options.times * before,
                        "--seconds", options.seconds, "--deadline", options.deadline,
                    )  # fmt: skip
                    memory_after = memory(served)
                    after = capacity(served, body, sample_seconds)
            except LoadError as error:
                print(f"{config}: {error}", file=sys.stderr)
                return 1
        by_code = {int(code): several for code, several in printed["latencies_ms"].items()}
        outcome = Overload(**printed | {"latencies_ms": by_code})
        row = {
            "config": config, "precision": options.precision, "times": options.times, "seconds": options.seconds,
            "deadline": options.deadline, **figures(outcome, before, after),
            "memory_before_mib": f"{memory_before:.4g}", "memory_after_mib": f"{memory_after:.4g}",
        }  # fmt: skip
        for column, value in row.items():
            print(f"{column:<20}{value}")
        rows.append(row | {"settings": options.settings, **origin()})
    if options.out:
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
