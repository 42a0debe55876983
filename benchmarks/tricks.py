"""``python -m benchmarks.tricks``: the gain of each trick of the request path, with and without it in turns."""

import argparse
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.figures import origin, write
from benchmarks.load import H2LOAD_MISSING, LoadError, flood, h2load, h2load_version, in_own_process
from benchmarks.overload import METHOD, ended
from benchmarks.server import SERVICE, Case, Served, prepare, serve
from benchmarks.without import FEW, LARGE, LOADS, MANY, OVERLOAD, REFUSALS, STREAMS, TRICKS
from training.model import CONFIGS

CASES = {FEW: Case(16), MANY: Case(64), LARGE: Case(4, images=64), STREAMS: Case(64, streams=4), REFUSALS: Case(64)}
#: The same for all, since a server that measures its plan may choose another than the one beside it.
SETTINGS = "--threads 1 --runtimes 2 --max-batch 16"
_TIMES = 3.0
_DEADLINE_SECONDS = 1.0
_HOPELESS_SECONDS = 0.001  # a deadline that no call can meet
_OVERLOAD_SAMPLES = 3.0  # times as long as the others, since an overload takes a while to fill the queue
_WARM_CALLS = 200


@dataclass(frozen=True)
class Figures:
    """Answered calls a second, and the CPU seconds of a call: of the server, and of its event loop's thread.

    Under an overload, refused calls do not count as answered.
    """

    per_second: float
    cpu: float
    loop: float


@dataclass(frozen=True)
class Gain:
    """Ratios of a round. Each is above 1 if the trick helps.

    throughput: answered calls a second with the trick, divided by those without it.
    cpu: CPU time of a call without the trick, divided by that with it.
    loop: the same ratio as if only the event loop's thread had changed. Other work of the machine hardly affects it.
    """

    throughput: float
    cpu: float
    loop: float

    @classmethod
    def of(cls, kept: Figures, off: Figures) -> "Gain":
        """Return the gain of a server with the trick over one without it."""
        return cls(kept.per_second / off.per_second, off.cpu / kept.cpu, (kept.cpu - kept.loop + off.loop) / kept.cpu)


class Subject:
    """A server under test. Every answer is counted."""

    def __init__(self, served: Served, bodies: Mapping[Case, Path]) -> None:
        self._served = served
        self._bodies = bodies
        self._calls = self._ok = 0

    def measure(self, load: str, size: "Size") -> Figures:
        """Put a load on the server. Raises LoadError if an answer is missing, or is not OK without an overload."""
        if load == REFUSALS:  # refusals need a known cost of a batch, so something must have been computed lately
            self._in_turn(CASES[MANY], CASES[MANY].in_flight)
        before = self._cpu()
        if load == OVERLOAD:
            answered, seconds = self._overloaded(size)
        elif load == STREAMS:
            answered, seconds = self._streamed(CASES[load], size.seconds)
        else:
            answered, seconds = self._in_turn(CASES[load], size.calls, _HOPELESS_SECONDS if load == REFUSALS else None)
        cpu, loop = (after - earlier for after, earlier in zip(self._used, before, strict=True))
        return Figures(answered / seconds, cpu / answered, loop / answered)

    def warm(self, loads: Sequence[str]) -> None:
        """Put a little of each load on the server."""
        for load in loads:
            calls = 0 if load == OVERLOAD else _WARM_CALLS // CASES[load].images
            self.measure(load, Size(calls, 0.2, 500.0))

    def check(self) -> None:
        """Raise LoadError unless the server has answered all expected calls with OK."""
        self._served.page_after(self._ok, METHOD)

    def _in_turn(self, case: Case, calls: int, deadline: float | None = None) -> tuple[int, float]:
        calls = max(2 * case.in_flight, calls)
        target, body = self._served.targets["tcp"], self._bodies[case]
        sample = h2load(target, f"{SERVICE}/{METHOD}", body, case.in_flight, calls, deadline=deadline)
        self._used = self._cpu()
        self._calls += calls
        self._ok += 0 if deadline else calls
        return calls, sample.seconds

    def _streamed(self, case: Case, seconds: float) -> tuple[int, float]:
        flags = ("--streams", case.streams, "--in-flight", case.in_flight, "--seconds", seconds)
        target, body = self._served.targets["tcp"], self._bodies[case]
        printed = in_own_process("streams", target, f"{SERVICE}/ClassifyStream", body, *flags)
        self._used = self._cpu()
        return printed["requests"], printed["seconds"]

    def _overloaded(self, size: "Size") -> tuple[int, float]:
        target, body = self._served.targets["tcp"], self._bodies[CASES[MANY]]
        calls = round(size.rate * size.seconds)
        flooded = flood(target, f"{SERVICE}/{METHOD}", body, size.rate, calls, _DEADLINE_SECONDS)
        self._used = self._cpu()  # before the metrics are asked for, which takes CPU time too
        self._calls += calls
        ok = ended(self._served, self._calls).get("OK", 0)
        good, self._ok = ok - self._ok, ok
        if not good:
            raise LoadError("no call of an overload was answered; expected some")
        return good, flooded.seconds

    def _cpu(self) -> tuple[float, float]:
        """Return the CPU seconds of the server, and of its first thread, which is the event loop's."""
        process = self._served.process.pid
        used = {}
        for task in Path(f"/proc/{process}/task").iterdir():
            with suppress(OSError):  # of a thread that ends now
                used[task.name] = int((task / "schedstat").read_text().split()[0]) / 1e9
        return sum(used.values()), used[str(process)]


@dataclass(frozen=True)
class Size:
    """The size of one load: a number of calls; for streams, seconds; for an overload, seconds and calls a second."""

    calls: int
    seconds: float
    rate: float


def sizes(subject: Subject, loads: Sequence[str], seconds: float) -> dict[str, Size]:
    """Return, by load, the size of a sample of about this many seconds, from a short measurement."""
    found = {}
    for load in CASES:
        if load in loads or (load == MANY and OVERLOAD in loads):
            calls = _WARM_CALLS // CASES[load].images
            per_second = [subject.measure(load, Size(calls, 0.3, 0.0)).per_second for _ in range(3)]
            found[load] = Size(round(seconds * statistics.median(per_second)), seconds, 0.0)
    if OVERLOAD in loads:
        capacity = found[MANY].calls / seconds
        found[OVERLOAD] = Size(0, _OVERLOAD_SAMPLES * seconds, _TIMES * capacity)
    return found


@dataclass
class Collected:
    """Figures with one trick under one load, and the gain, for each round."""

    kept: list[Figures] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)

    def row(self) -> dict[str, str]:
        """Return the medians by their columns, with the quartiles of each ratio."""
        row = {
            "per_second": f"{statistics.median(one.per_second for one in self.kept):.4g}",
            "cpu_us": f"{1e6 * statistics.median(one.cpu for one in self.kept):.4g}",
            "loop_us": f"{1e6 * statistics.median(one.loop for one in self.kept):.4g}",
        }
        for name in ("throughput", "cpu", "loop"):
            low, middle, high = np.quantile([getattr(gain, name) for gain in self.gains], (0.25, 0.5, 0.75))
            row |= {name: f"{middle:.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}
        return row


def compare(
    kept: Subject, off: Subject, loads: Sequence[str], size: Mapping[str, Size], rounds: int
) -> dict[str, Collected]:
    """Put the loads on both servers in turns. The first one changes from round to round. Raises LoadError."""
    found = {load: Collected() for load in loads}
    off.warm(loads)
    for number in range(rounds):
        for load in loads:
            if number % 2:
                without, with_ = off.measure(load, size[load]), kept.measure(load, size[load])
            else:
                with_, without = kept.measure(load, size[load]), off.measure(load, size[load])
            found[load].kept.append(with_)
            found[load].gains.append(Gain.of(with_, without))
    off.check()
    return found


def measure(models: Path, bodies: Mapping[Case, Path], folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """Yield trick, load and figures of each. Raises LoadError."""

    @contextmanager
    def started(trick: str) -> Iterator[Subject]:
        own = Path(tempfile.mkdtemp(dir=folder))
        program = ("benchmarks.without", trick)
        with serve(models, options.precision, shlex.split(options.settings), own, program=program) as served:
            yield Subject(served, bodies)

    nothing = next(iter(TRICKS))
    with started(nothing) as kept:
        kept.warm(options.loads)
        size = sizes(kept, options.loads, options.seconds)
        tricks = [",".join(options.tricks)] if options.together else options.tricks
        for trick in tqdm(tricks, leave=False):
            several = [TRICKS[name] for name in trick.split(",")]
            loads = [load for load in options.loads if any(load in one.loads for one in several)]
            with started(trick) as off:
                for load, collected in compare(kept, off, loads, size, options.rounds).items():
                    yield {"trick": trick, "load": load, **collected.row()}
        kept.check()


def show(row: Mapping[str, str]) -> None:
    """Print a row."""
    ratios = (
        f"{name} {row[name]} ({row[f'{name}_low']}-{row[f'{name}_high']})" for name in ("throughput", "cpu", "loop")
    )
    print(f"{row['trick']:<28}{row['load']:<16}", *ratios, sep="  ", flush=True)


def add_sampling(command: argparse.ArgumentParser, rounds: int, of_rounds: str, seconds: float) -> None:
    """Add the flags of a comparison of servers. rounds, seconds: the defaults. of_rounds: what a round is."""
    command.add_argument("--rounds", type=int, default=rounds, metavar="N", help=f"{of_rounds} (default: {rounds})")
    command.add_argument("--seconds", type=float, default=seconds, help=f"of each sample (default: {seconds:g})")
    command.add_argument(
        "--settings", default=SETTINGS, metavar="FLAGS", help=f"flags for the servers (default: {SETTINGS})"
    )
    command.add_argument("--out", type=Path, help="write the figures to this CSV file too")


def parse_sampling(command: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace | None:
    """Return the flags, or print a reason and return None without h2load. Exits for numbers that are not above 0."""
    options = command.parse_args(arguments)
    if options.rounds < 1 or options.seconds <= 0:
        command.error("--rounds and --seconds: expected numbers above 0")
    if h2load_version() is None:
        print(H2LOAD_MISSING, file=sys.stderr)
        return None
    return options


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.tricks", description=__doc__)
    command.add_argument("--config", choices=CONFIGS, default="compact", help="network (default: compact)")
    command.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    command.add_argument(
        "--tricks", nargs="+", choices=TRICKS, default=list(TRICKS), metavar="TRICK", help="the default: all"
    )
    command.add_argument("--together", action="store_true", help="switch these tricks off all at once, and not in turn")
    command.add_argument(
        "--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD",
        help="the default: those that each trick may speed up",
    )  # fmt: skip
    add_sampling(command, rounds=6, of_rounds="pairs of samples", seconds=0.7)
    options = parse_sampling(command, arguments)
    if options is None:
        return 2
    how = {"config": options.config, "rounds": options.rounds, "seconds": options.seconds, **origin()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models, _, bodies = prepare(options.config, options.precision, folder, list(CASES.values()))
        try:
            for row in measure(models, bodies, folder, options):
                show(row)
                rows.append(row | how)
        except LoadError as error:
            print(error, file=sys.stderr)
            return 1
    if options.out:
        write(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
