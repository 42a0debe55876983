"""The version of the project, and the words for packages that a command needs and that are not installed."""

import argparse
from importlib.metadata import PackageNotFoundError, version

PROJECT = "capsnet-serving"
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


def missing_package(error: ModuleNotFoundError, extra: str) -> str:
    """Return a line that names the missing package and the extra that installs it.

    Raises the error again if one of the project's own modules is missing.
    """
    package = (error.name or "").partition(".")[0]
    if not package or package in _OWN_PACKAGES:
        raise error
    return f"the package {package} is not installed; install it with: pip install '{PROJECT}[{extra}]'"
