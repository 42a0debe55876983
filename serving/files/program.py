"""The version of the project, the words that run its commands, and those for packages that are not installed."""

import argparse
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = "capsnet-serving"
_SCRIPTS = {
    "serving": "capsnet-server", "serving.client": "capsnet-client", "training": "capsnet-train",
    "export": "capsnet-export",
}  # fmt: skip
_OWN_PACKAGES = frozenset({"protos", "serving", "training", "export"})


@cache
def project_version() -> str:
    """Return the version of the installed project, or "0.0.0" if it runs without an installation."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return "0.0.0"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add the flag ``--version``, which prints the project's name and version and ends the process."""
    parser.add_argument("--version", action="version", version=f"{PROJECT} {project_version()}")


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
