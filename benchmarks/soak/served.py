"""The servers of a soak: encrypted, for clients with tokens alone, with models, tokens and certificates that change."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from benchmarks.attacks.served import PLAN, Target
from benchmarks.load import LoadError
from benchmarks.server import Page, serve
from benchmarks.soak.windows import process_state
from serving.access.tokens import ADMIN, METRICS, PREDICT, TokenEntry, new_token, write_entries
from serving.artifact import load, write_manifest
from serving.settings import embedded_models

#: The model that is swapped: version 1 always, version 2 now and then.
SWAPPED = "digits"
#: The model that is unloaded and loaded again.
UNLOADED = "other"
_NETWORKS = {
    (SWAPPED, "1"): "capsnet-mnist",
    (SWAPPED, "2"): "capsnet-mnist-accurate",
    (UNLOADED, "1"): "capsnet-mnist",
}
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
_ADMIN_ADDRESS = re.compile(r"loading and unloading of models on (\S+:\d+)")
#: The metrics that must be 0 once all calls have ended.
_ZERO_METRICS = (
    "capsnet_rpcs_in_flight",
    "capsnet_open_calls",
    "capsnet_queue_images",
    "capsnet_held_bytes",
    "capsnet_decoding_requests",
    "capsnet_decoding_memory_bytes",
)
_CONNECTIONS_METRIC = "capsnet_connections"
_MORE_FILES = 4  # that a process may open later, such as those of libraries
_SETTLE_SECONDS = 60.0
_PAUSE_SECONDS = 0.2
_ROLES = (PREDICT, ADMIN, METRICS)


@dataclass(frozen=True)
class Soaked(Target):
    """A running server of a soak, and its files.

    transport: its name. admin: the address of its admin port. folder: the files below. tokens: by role.
    """

    transport: str = ""
    admin: str = ""
    folder: Path = Path()
    tokens: tuple[tuple[str, str], ...] = ()

    @property
    def token_of(self) -> dict[str, str]:
        return dict(self.tokens)

    @property
    def log_text(self) -> str:
        return self.served.log.read_text(errors="replace")


def versions(folder: Path) -> list[Path]:
    """Write every version of every model below a folder, and return their folders."""
    written = []
    for (name, number), network in _NETWORKS.items():
        version = folder / "versions" / name / number
        original = embedded_models() / network / "1"
        shutil.copytree(original, version)
        write_manifest(replace(load(original), folder=version, name=name, version=number))
        written.append(version)
    return written


def put(folder: Path, name: str, number: str) -> None:
    """Put a version into the served repository, in one step."""
    place = folder / "repository" / name
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "versions" / name / number, place / f".{number}")
    (place / f".{number}").rename(place / number)


def take_away(folder: Path, name: str, number: str) -> None:
    """Take a version out of the served repository, in one step."""
    place = folder / "repository" / name
    (place / number).rename(place / f".gone-{number}")
    shutil.rmtree(place / f".gone-{number}")


def make_authority(folder: Path) -> None:
    """Write ca.pem and ca.key by openssl. Raises OSError, CalledProcessError."""
    _openssl(folder, *_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=soak")


def renew_certificate(folder: Path) -> str:
    """Write a new server.pem and server.key for 127.0.0.1, each in one step. Return the certificate, in PEM."""
    made = folder / "made"
    made.mkdir(exist_ok=True)
    _openssl(
        folder, *_KEY, "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "made/server.key", "-out", "made/server.pem",
        "-subj", "/CN=server", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=CA:FALSE",
    )  # fmt: skip
    text = (made / "server.pem").read_text()
    for name in ("server.key", "server.pem"):
        (made / name).replace(folder / name)
    return text


def write_tokens(server_folder: Path, entries: list[TokenEntry]) -> None:
    """Write the token file of a server."""
    write_entries(server_folder / "tokens.json", entries)


def token_entries() -> tuple[list[TokenEntry], dict[str, str]]:
    """Return new entries, one a role, and the tokens by role."""
    made = {role: new_token(role) for role in _ROLES}
    entries = [TokenEntry(role, (role,), hashed) for role, (_, hashed) in made.items()]
    return entries, {role: token for role, (token, _) in made.items()}


@dataclass(frozen=True)
class Held:
    """The holdings of a server: the metrics that should be 0 in the end, its connections and its open files."""

    amounts: Mapping[str, float]
    connections: float
    files: int

    def beyond(self, before: "Held") -> dict[str, float]:
        """Return what is left beyond what there was before, by name."""
        left = {name: amount for name, amount in self.amounts.items() if amount}
        if self.connections > before.connections:
            left["connections"] = self.connections - before.connections
        if self.files > before.files + _MORE_FILES:
            left["files"] = self.files - before.files
        return left


def held(server: Target) -> Held:
    """Return what a server holds now. Raises LoadError, OSError and HTTPException."""
    page = Page.parse(server.served.fetch({"Authorization": f"Bearer {server.token}"}))
    amounts = {}
    for name in _ZERO_METRICS:
        amount = page.total(name)
        if amount is None:
            raise LoadError(f"the server has no metric {name}")
        amounts[name] = amount
    return Held(amounts, page.total(_CONNECTIONS_METRIC) or 0.0, process_state(server.served.process.pid).files)


def left_over(server: Target, before: Held) -> dict[str, float]:
    """Return what the server still holds beyond what it held before, once all calls should have ended.

    Raises LoadError if the server does not tell it.
    """
    end = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            left = held(server).beyond(before)
        except (OSError, HTTPException) as error:  # the page may be overdue too
            if time.monotonic() > end:
                raise LoadError("the server's metrics cannot be read") from error
        else:
            if not left or time.monotonic() > end:
                return left
        time.sleep(_PAUSE_SECONDS)


@contextmanager
def soaked(transport: str, folder: Path, entries: list[TokenEntry], tokens: dict[str, str]) -> Iterator[Soaked]:
    """Run a server with the versions that ``versions`` has written; its files go to the folder.

    Raises LoadError if it does not start, or does not end with 0 after SIGTERM.
    """
    make_authority(folder)
    renew_certificate(folder)
    write_tokens(folder, entries)
    for name, number in ((SWAPPED, "1"), (UNLOADED, "1")):
        put(folder, name, number)
    flags = [
        f"--transport={transport}", *PLAN, "--poll-seconds=5", "--admin-port=0", "--http-port=0",
        f"--tokens={folder / 'tokens.json'}", f"--tls-cert={folder / 'server.pem'}",
        f"--tls-key={folder / 'server.key'}",
    ]  # fmt: skip
    ca = folder / "ca.pem"
    with serve(folder / "repository", "fp32", flags, folder, ca=ca) as served:
        found = _ADMIN_ADDRESS.search(served.log.read_text())
        if not found:
            raise LoadError("the log names no admin port")
        yield Soaked(served, ca.read_bytes(), tokens[METRICS], transport, found[1], folder, tuple(tokens.items()))
    if served.process.returncode:
        raise LoadError(f"the server on {transport} ended with {served.process.returncode} after SIGTERM")


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", "req", "-x509", *arguments], cwd=folder, check=True, capture_output=True)
