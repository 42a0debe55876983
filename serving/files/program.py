"""The version of the project, the words that run its commands, and those for packages that are not installed."""

import argparse
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = "capsnet-serving"
_SCRIPTS = {
    "serving": "capsnet-server", "serving.client": "capsnet-client", "training": "capsnet-train",
    "export": "capsnet-export",
}  # fmt: skip
_OWN_PACKAGES = frozenset({"protos", "serving", "training", "export"})


def project_version() -> str:
    """Return the version of the installed project, or "0.0.0" if it runs without an installation."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return "0.0.0"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--version``, which prints the project's name and version and ends the process."""
    parser.add_argument("--version", action="version", version=f"{PROJECT} {project_version()}")


def parse_path(text: str, kind: str = "a path") -> Path:
    """Return a path. Raises ArgumentTypeError for none, which an unset variable of a shell gives.

    kind: what the error says was expected.
    """
    if not text:
        raise argparse.ArgumentTypeError(f"nothing; expected {kind}")
    return Path(text)


def parse_flags(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what a command line says. An unknown flag ends the process, with the nearest flag that there is."""
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = re.findall(r"(?<!\S)--[a-z0-9-]+", parser.format_help())
        name = unknown[0].partition("=")[0]
        nearest = [flag for flag in flags if flag.startswith(name)] or get_close_matches(name, flags, 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else "; --help lists the flags"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return parsed


def reason_of(error: Exception) -> str:
    """Return an error's text. That of a file has the file's name first, and no number of the system's."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def command_of(module: str) -> str:
    """Return the words that run a module of the project in the environment of this process.

    They are as its user has typed them: a script, or the Python of the environment, such as ``.venv/bin/python``.
    """
    typed = sys.orig_argv[0] if sys.orig_argv else ""
    if Path(sys.argv[0]).name in _SCRIPTS.values() and module in _SCRIPTS:
        return _SCRIPTS[module]
    return f"{typed if Path(typed).name.startswith('python') else 'python'} -m {module}"


def missing_package(error: ModuleNotFoundError, extra: str) -> str:
    """Return a line that names the missing package and the extra that installs it.

    Raises the error again if one of the project's own modules is missing.
    """
    package = (error.name or "").partition(".")[0]
    if not package or package in _OWN_PACKAGES:
        raise error
    return f"the package {package} is not installed; install it with: pip install '{PROJECT}[{extra}]'"
