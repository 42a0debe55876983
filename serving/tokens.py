"""``python -m serving.tokens``: make, list and remove the tokens of clients.

A running server reads the file again when it changes.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.access.files import AccessError
from serving.access.tokens import PREDICT, ROLES, TokenEntry, locked, new_token, read_entries, write_entries
from serving.files.program import add_version


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m serving.tokens",
        description="Make, list and remove the tokens with which clients may call a server (--tokens FILE).",
    )
    add_version(result)
    commands = result.add_subparsers(dest="command", required=True, metavar="add|list|remove")
    add = commands.add_parser("add", help="make a token, and print it; the file keeps only its hash")
    add.add_argument("file", type=Path, metavar="FILE", help="the token file, made if it is missing")
    add.add_argument("name", metavar="NAME", help="name of the client, for the log")
    add.add_argument(
        "--role",
        action="append",
        choices=ROLES,
        help=f"what the client may do; several times for several roles (default: {PREDICT})",
    )
    add.add_argument("--calls", type=int, metavar="N", help="most calls in flight (default: the server's client_calls)")
    add.add_argument("--rate", type=float, metavar="X", help="most calls a second (default: the server's client_rate)")
    add.add_argument(
        "--certificate",
        default="",
        metavar="COMMON_NAME",
        help="no token: the client is known by its certificate (--tls-client-ca) with this common name",
    )
    show = commands.add_parser("list", help="show names, roles and limits")
    show.add_argument("file", type=Path, metavar="FILE", help="the token file")
    remove = commands.add_parser("remove", help="remove a client; its calls are refused within a second")
    remove.add_argument("file", type=Path, metavar="FILE", help="the token file")
    remove.add_argument("name", metavar="NAME", help="name of the client")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 after an error, which is printed."""
    options = parser().parse_args(arguments)
    try:
        match options.command:
            case "add":
                with locked(options.file):
                    _add(options)
            case "list":
                for entry in read_entries(options.file):
                    print(_described(entry))
            case "remove":
                with locked(options.file):
                    _remove(options.file, options.name)
    except (AccessError, OSError) as error:
        print(f"python -m serving.tokens: {error}", file=sys.stderr)
        return 1
    return 0


def _add(options: argparse.Namespace) -> None:
    entries = read_entries(options.file) if options.file.exists() else []
    if any(entry.name == options.name for entry in entries):
        raise AccessError(f"{options.name}: the file has a client of this name; remove it first")
    if options.certificate and any(entry.certificate == options.certificate for entry in entries):
        raise AccessError(f"{options.certificate}: the file has a client with this certificate; remove it first")
    token, hash_ = ("", "") if options.certificate else new_token(options.name)
    roles = tuple(dict.fromkeys(options.role or (PREDICT,)))
    entry = TokenEntry(options.name, roles, hash_, options.certificate, options.calls, options.rate)
    write_entries(options.file, [*entries, entry])
    if token:
        print(token)


def _remove(path: Path, name: str) -> None:
    entries = read_entries(path)
    kept = [entry for entry in entries if entry.name != name]
    if len(kept) == len(entries):
        raise AccessError(f"{name}: the file has no client of this name")
    write_entries(path, kept)


def _described(entry: TokenEntry) -> str:
    words = [entry.name, ",".join(entry.roles)]
    if entry.certificate:
        words.append(f"certificate={entry.certificate}")
    words += [
        f"{name}={value:g}" for name, value in (("calls", entry.calls), ("rate", entry.rate)) if value is not None
    ]
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
