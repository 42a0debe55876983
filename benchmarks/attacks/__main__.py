"""``python -m benchmarks.attacks``: a client in good faith beside each attack, and the server's memory."""

import argparse
import csv
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.attacks.good_client import good_client
from benchmarks.attacks.link import Attack
from benchmarks.attacks.measure import MAX_MEMORY_RATIO, MAX_P99_RATIO, Result, measure
from benchmarks.attacks.served import target
from benchmarks.attacks.table import ATTACKS
from benchmarks.figures import origin, write
from benchmarks.load import LoadError
from serving.transport.methods import TRANSPORTS

#: The shares of its calls that a client in good faith must keep, beside attacks on one connection and on more.
MIN_SHARE, MIN_SHARE_OF_MANY = 0.95, 0.8
#: Length of the measurement without an attack, before and after it.
CALM_SECONDS = 2.0

_TITLES = (
    "right_share", "quiet_p99_ms", "control_p99_ms", "p99_ms", "memory_mib", "peak_mib", "attacker_mb",
    "attacker_connections", "misses",
)  # fmt: skip
_SHOWN = "{:<34}{:>12}{:>13}{:>15}{:>8}{:>11}{:>9}{:>12}{:>21}  {}"
_KEYS = ("transport", "attack", "connections", "commit", "device")


def figures(result: Result, many: bool) -> dict[str, Any]:
    """Return the figures of an attack by column. many: the attack had more than one connection."""
    held = [
        result.beside.share >= (MIN_SHARE_OF_MANY if many else MIN_SHARE),
        result.memory_ratio < MAX_MEMORY_RATIO,
        result.p99_ratio <= MAX_P99_RATIO,
        result.returned_seconds is not None,
        result.beside.wrong == 0,
    ]
    names = ("share", "memory", "p99", "return", "answers")
    return {
        "right_share": f"{result.beside.share:.3f}",
        "wrong": result.quiet.wrong + result.beside.wrong + result.after.wrong,
        "quiet_p99_ms": f"{result.quiet.p99_ms:.4g}",
        "control_p99_ms": f"{result.control.p99_ms:.4g}",
        "p99_ms": f"{result.beside.p99_ms:.4g}",
        "after_p99_ms": f"{result.after.p99_ms:.4g}",
        "memory_mib": f"{result.memory_mib:.4g}",
        "peak_mib": f"{result.peak_mib:.4g}",
        "after_mib": f"{result.memory_after_mib:.4g}",
        "returned_s": "" if result.returned_seconds is None else f"{result.returned_seconds:.2g}",
        "attacker_mb": f"{result.sent / 1e6:.3g}",
        "attacker_connections": result.opened,
        "failed": ", ".join(f"{count} {code}" for code, count in sorted(result.beside.failed.items())),
        "misses": " ".join(name for name, one in zip(names, held, strict=True) if not one),
    }


def run(attack: Attack, options: argparse.Namespace) -> dict[str, Any]:
    """Return the row of an attack on a server of its own."""
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other_folder,
        target(attack.server, options.transport, Path(folder)) as server,
        target(attack.server, options.transport, Path(other_folder)) as other,
        good_client(server, options.deadline) as client,
        good_client(other, options.deadline) as control,
    ):
        result = measure(server, client, control, attack, options.connections, options.seconds, CALM_SECONDS)
    row: dict[str, Any] = {"transport": options.transport, "attack": attack.name, "connections": options.connections}
    row["sockets"] = attack.sockets(options.connections)
    return {
        **row,
        "seconds": options.seconds,
        "deadline": options.deadline,
        **figures(result, options.connections > 1),
        **origin(),
    }


def _is_another(attack: Attack, connections: int) -> bool:
    """Return True if the attack differs from that on one connection, such as one that has 5,000 in any case."""
    return connections == 1 or attack.sockets(connections) > attack.sockets(1)


def merge(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, in the places of those with the same attack, connections, machine and commit."""
    known: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as stream:
            known = list(csv.DictReader(stream))
    by_key = {tuple(str(row[key]) for key in _KEYS): row for row in [*known, *rows]}
    write(file, list(by_key.values()), rows[0])


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.attacks", description=__doc__)
    command.add_argument("--transport", choices=TRANSPORTS, default="native", help="the server's (default: native)")
    command.add_argument("--seconds", type=float, default=6.0, help="length of each attack (default: 6)")
    command.add_argument(
        "--only", nargs="+", choices=ATTACKS, metavar="NAME", help="attacks (default: all that differ)"
    )
    command.add_argument("--connections", type=int, default=1, help="connections of each attack (default: 1)")
    command.add_argument(
        "--deadline", type=float, default=5.0, help="deadline of the good client's calls, in seconds (default: 5)"
    )
    command.add_argument("--out", type=Path, help="add the figures to this CSV file too")
    command.add_argument("--list", action="store_true", help="print the names of the attacks")
    options = command.parse_args(arguments)
    if options.list:
        print("\n".join(ATTACKS))
        return 0
    if min(options.seconds, options.connections, options.deadline) <= 0:
        command.error("--seconds, --connections and --deadline: expected numbers above 0")
    failed = False
    print(_SHOWN.format("attack", *_TITLES), flush=True)
    for name in options.only or [name for name, one in ATTACKS.items() if _is_another(one, options.connections)]:
        try:
            row = run(ATTACKS[name], options)
        except LoadError as error:
            failed = True
            print(f"{name}: {error}", file=sys.stderr)
            continue
        print(_SHOWN.format(name, *(row[column] or "-" for column in _TITLES)), flush=True)
        if options.out:
            merge(options.out, [row])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
