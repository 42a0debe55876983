"""``python -m benchmarks.soak``: both transports under mixed load, while models, tokens and certificates change.

Every answer is compared with that of ONNX Runtime. Memory, open files, threads and p99 must stay as they are.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.figures import origin, write
from benchmarks.load import LoadError
from benchmarks.soak.client import Client
from benchmarks.soak.hostile import hostile
from benchmarks.soak.right_answers import digits, right_answers
from benchmarks.soak.served import soaked, token_entries, versions
from benchmarks.soak.soak import Soak
from benchmarks.soak.windows import faults
from serving.transport.methods import TRANSPORTS

_DIGITS = 64
#: A soak has this many windows, of at least MIN_WINDOW_SECONDS.
_WINDOWS = 60
_MIN_WINDOW_SECONDS = 5.0
_PLOTTED = (
    ("memory_mib", "resident memory (MiB)"), ("files", "open files"), ("threads", "threads"),
    ("p99_ms", "p99 of single images (ms)"),
)  # fmt: skip
_SHOWN_COLUMNS = (
    "transport",
    "at_s",
    "calls",
    "right",
    "wrong",
    "unexpected",
    "p99_ms",
    "memory_mib",
    "files",
    "threads",
)


async def run(soaks: Sequence[Soak]) -> None:
    """Run the soaks side by side."""
    await asyncio.gather(*(soak.run() for soak in soaks))


def soak(transports: Sequence[str], seconds: float, rate: float, folder: Path) -> list[Soak]:
    """Return the soaks of a server of each transport, which ran side by side. Raises LoadError."""
    images = digits(_DIGITS)
    window = max(_MIN_WINDOW_SECONDS, seconds / _WINDOWS)

    async def all_of(stack: ExitStack) -> list[Soak]:
        soaks = []
        for transport in transports:
            own = folder / transport
            answers = right_answers(versions(own), images)
            entries, tokens = token_entries()
            server = stack.enter_context(soaked(transport, own, entries, tokens))
            soaks.append(Soak(Client(server, images, answers), entries, rate, seconds, window))
        await run(soaks)
        return soaks

    with ExitStack() as stack:
        return asyncio.run(all_of(stack))


def plot(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw memory, files, threads and p99 over time, a line for each transport."""
    figure = Figure((11, 6.5), layout="constrained")
    for axis, (column, title) in zip(figure.subplots(2, 2).flat, _PLOTTED, strict=True):
        for transport in dict.fromkeys(row["transport"] for row in rows):
            own = [row for row in rows if row["transport"] == transport]
            minutes = [float(row["at_s"]) / 60 for row in own]
            axis.plot(minutes, [float(row[column]) for row in own], label=transport)
        axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_xlabel("minutes")
        axis.legend(fontsize=7)
    return figure


def show(one: Soak, found: Sequence[str]) -> None:
    """Print the calls of a soak by kind, and what is wrong with it."""
    print(f"\n{one.client.server.transport}:")
    for kind, outcomes in one.outcomes_by_kind.items():
        print(f"  {kind:<24}{', '.join(f'{count} {name}' for name, count in sorted(outcomes.items()))}")
    changes = one.windows[-1].changes
    print(f"  {'changes':<24}{', '.join(f'{count} {name}' for name, count in sorted(changes.items()))}")
    print("\n".join(f"  FAULT: {text}" for text in found) or "  no fault")


def mixed_load(options: argparse.Namespace) -> tuple[bool, list[dict[str, Any]]]:
    """Run the soak. Return if something is wrong, and the rows of its windows. Raises LoadError."""
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        soaks = soak(options.transports, seconds, options.rate, Path(folder))
    rows = [
        {"transport": one.client.server.transport, "rate": options.rate, **window.row(), **origin()}
        for one in soaks
        for window in one.windows
    ]
    print("".join(f"{name:>12}" for name in _SHOWN_COLUMNS))
    for row in rows:
        print("".join(f"{row[name]:>12}" for name in _SHOWN_COLUMNS))
    wrong = False
    for one in soaks:
        found = [*one.faults, *faults(one.windows, seconds)]
        show(one, found)
        wrong |= bool(found)
    if options.plot:
        plot(rows).savefig(options.plot, dpi=110)
    return wrong, rows


def broken_requests(options: argparse.Namespace) -> tuple[bool, list[dict[str, Any]]]:
    """Send broken requests. Return if something is wrong, and a row for each transport. Raises LoadError."""
    wrong, rows = False, []
    for transport in options.transports:
        row, found = hostile(transport, options.hostile)
        for column, value in row.items():
            print(f"{column:<14}{value}", flush=True)
        print("\n".join(f"  FAULT: {text}" for text in found) or "  no fault", flush=True)
        wrong |= bool(found)
        rows.append(row)
    return wrong, rows


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    command.add_argument("--minutes", type=float, default=1.0, help="length of the soak (default: 1)")
    command.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    command.add_argument("--rate", type=float, default=60.0, help="calls a second on each transport (default: 60)")
    command.add_argument(
        "--hostile", type=int, default=0, metavar="N", help="send N broken requests to each transport instead"
    )
    command.add_argument("--out", type=Path, help="write the figures of each window to this CSV file too")
    command.add_argument("--plot", type=Path, help="write a picture of them to this PNG file")
    options = command.parse_args(arguments)
    if min(options.minutes, options.rate) <= 0:
        command.error("--minutes and --rate: expected numbers above 0")
    begin = time.monotonic()
    try:
        wrong, rows = broken_requests(options) if options.hostile else mixed_load(options)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"\n{time.monotonic() - begin:.0f} seconds in all")
    if options.out:
        write(options.out, rows)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
