"""``python -m benchmarks.start``: the time from the start of the server's process until it is ready."""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health_pb2_grpc import HealthStub
from tqdm import tqdm

from benchmarks.figures import origin, write
from benchmarks.load import LoadError
from benchmarks.server import Served, repository, serve
from benchmarks.serving import setup
from training.model import CONFIGS

#: The origin of the server's plan: its threads, its parallel batches and the images of a batch.
TUNED, FIXED = "by measurement", "by settings"

_ROOT = Path(__file__).parent.parent
_IMPORTS_CODE = """import time
import serving.server
from serving.runtime import onnxruntime
onnxruntime()
print(time.time())
"""
_POLL_SECONDS = 0.002
_READY_SECONDS = 30
_CPU_METRIC = "process_cpu_seconds_total"
_SHOWN_COLUMNS = ("plan", "ready_s", "ready_least_s", "ready_most_s", "imports_s", "models_s", "ports_s", "cpu_s")


def imports() -> float:
    """Return the seconds until a new process has imported all that the server imports, with ONNX Runtime."""
    began = time.time()
    command = [sys.executable, "-c", _IMPORTS_CODE]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout) - began


def ready(served: Served) -> float:
    """Return the seconds from the start of the process until a health check answered SERVING. Raises LoadError."""
    end = time.monotonic() + _READY_SECONDS
    with grpc.insecure_channel(served.targets["tcp"]) as channel:
        stub = HealthStub(channel)
        while time.monotonic() < end:
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=_READY_SECONDS, wait_for_ready=True)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return time.time() - served.began
            time.sleep(_POLL_SECONDS)
    raise LoadError(f"the server said that it serves, but its health check did not in {_READY_SECONDS} s")


def loaded(served: Served) -> float:
    """Return the seconds from the start of the process until all models were loaded, tuned and warm.

    The log, in JSON, has a line for each model. Raises LoadError if it has none.
    """
    times = []
    for line in served.log.read_text().splitlines():
        entry = json.loads(line)
        if entry["logger"] == "serving.repository.served_model":
            times.append(datetime.fromisoformat(entry["time"]).timestamp())
    if not times:
        raise LoadError("the server's log does not say when its models were loaded")
    return max(times) - served.began


def measure(models: Path, precision: str, flags: Sequence[str], folder: Path) -> tuple[dict[str, float], str]:
    """Return the figures of one start by column, and the flags that would fix the plan that the server chose.

    Raises LoadError if the server does not start, or if its metrics or log lack a figure.
    """
    until_imported = imports()
    with serve(models, precision, ["--log-format=json", *flags], folder, _POLL_SECONDS) as served:
        until_ready = ready(served)
        page = served.page()
        cpu, until_loaded = page.total(_CPU_METRIC), loaded(served)
    if cpu is None:
        raise LoadError(f"the server's metrics lack {_CPU_METRIC}")
    chosen = setup(page, flags)
    figures = {
        "ready_s": until_ready,
        "imports_s": until_imported,
        "models_s": until_loaded - until_imported,
        "ports_s": until_ready - until_loaded,
        "cpu_s": cpu,
    }
    return figures, f"--threads={chosen.threads} --runtimes={chosen.sessions} --max-batch={chosen.max_batch}"


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the median of each figure over the rounds, and the least and the most of the time until it is ready."""
    row = {name: f"{statistics.median(one[name] for one in rounds):.3g}" for name in rounds[0]}
    times = [one["ready_s"] for one in rounds]
    return row | {"ready_least_s": f"{min(times):.3g}", "ready_most_s": f"{max(times):.3g}"}


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    command.add_argument("--configs", nargs="+", choices=CONFIGS, default=["compact"], help="networks")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument("--rounds", type=int, default=10, metavar="N", help="starts of each kind (default: 10)")
    command.add_argument(
        "--plan", default="", metavar="FLAGS",
        help="flags that fix the plan, in one argument (default: the plan that the first start chose)",
    )  # fmt: skip
    command.add_argument("--settings", default="", metavar="FLAGS", help="more flags for the server, in one argument")
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")
    options = command.parse_args(arguments)
    if options.rounds < 1:
        command.error("--rounds: expected a number above 0")
    how = {"rounds": options.rounds, "settings": options.settings, **origin()}
    settings = shlex.split(options.settings)
    rows: list[dict[str, Any]] = []
    for config in options.configs:
        flags = {TUNED: "", FIXED: options.plan}
        figures: dict[str, list[dict[str, float]]] = {plan: [] for plan in flags}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models = repository(config, options.precision, folder)
            try:
                for _ in tqdm(range(options.rounds), desc=config, leave=False):
                    for plan in flags:
                        given = [*settings, *shlex.split(flags[plan])]
                        values, chosen = measure(models, options.precision, given, folder)
                        figures[plan].append(values)
                        flags[FIXED] = flags[FIXED] or chosen
            except LoadError as error:
                print(f"{config}: {error}", file=sys.stderr)
                return 1
        found = [
            {"config": config, "precision": options.precision, "plan": plan, "flags": flags[plan]}
            | medians(figures[plan])
            for plan in flags
        ]
        print(f"\n{config} ({options.precision})")
        print("".join(f"{name:>16}" for name in _SHOWN_COLUMNS))
        for row in found:
            print("".join(f"{row[name]:>16}" for name in _SHOWN_COLUMNS))
        rows += [row | how for row in found]
    if options.out:
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
