"""The servers that are attacked, and the files that their clients need."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import grpc

from benchmarks.attacks.link import Port
from benchmarks.load import LoadError
from benchmarks.server import Page, Served, encrypted, serve
from serving.access.tokens import METRICS, PREDICT, TokenEntry, new_token, write_entries
from serving.settings import DEFAULT_MODEL, embedded_models

#: The kinds of servers: open to everyone, encrypted, and for clients with a token alone.
KINDS = ("plain", "tls", "tokens")
PLAN = ("--threads=1", "--runtimes=1", "--max-batch=8")
_CLIENT_NAME = "good"
_PLACES = {"http": re.compile(r"HTTP on \S+:(\d+)"), "metrics": re.compile(r"metrics on \S+:(\d+)")}
_IN_FLIGHT_METRIC = "capsnet_rpcs_in_flight"


@dataclass(frozen=True)
class Target:
    """A server that is attacked, and the way in for a client in good faith.

    certificate: the server's, in PEM; empty without TLS. token: the client's; empty if the server wants none.
    """

    served: Served
    certificate: bytes = b""
    token: str = ""

    @property
    def address(self) -> str:
        return self.served.targets["tcp"]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    @property
    def died(self) -> bool:
        """Return True if the server's process has ended."""
        return self.served.process.poll() is not None

    def port_of(self, kind: Port) -> int:
        """Return the number of a port. Raises LoadError if the server has none of this kind."""
        if kind == "grpc":
            return self.port
        place = _PLACES[kind].search(self.served.log.read_text(errors="replace"))
        if place is None:
            raise LoadError(f"the server has no port of {kind}")
        return int(place[1])

    def channel(self) -> grpc.Channel:
        """Return a channel with a connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1)]
        if not self.certificate:
            return grpc.insecure_channel(self.address, options)
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(self.certificate), options)

    def memory_mib(self) -> float:
        """Return the resident memory of the server's process, in MiB. Raises LoadError if it has ended."""
        try:
            status = Path(f"/proc/{self.served.process.pid}/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
        except (OSError, StopIteration) as error:
            raise LoadError("the server's process has ended") from error

    def calls_in_flight(self) -> float:
        """Return the calls that have begun and not ended. Raises OSError, HTTPException."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        page = Page.parse(self.served.fetch(headers))
        return page.total(_IN_FLIGHT_METRIC) or 0.0


@contextmanager
def target(kind: str, transport: str, folder: Path, flags: Sequence[str] = ()) -> Iterator[Target]:
    """Run a server of one of ``KINDS`` with the embedded model; its files go to ``folder``. Raises LoadError."""
    flags = [f"--transport={transport}", f"--model={DEFAULT_MODEL}", "--http-port=0", *PLAN, *flags]
    certificate, token, ca = b"", "", None
    if kind == "tls":
        more, ca = encrypted(folder)
        certificate = ca.read_bytes()
        flags += more
    elif kind == "tokens":
        token, hashed = new_token(_CLIENT_NAME)
        write_entries(folder / "tokens.json", [TokenEntry(_CLIENT_NAME, (PREDICT, METRICS), hashed)])
        flags.append(f"--tokens={folder / 'tokens.json'}")
    with serve(embedded_models(), "fp32", flags, folder, ca=ca) as served:
        yield Target(served, certificate, token)


def settled(server: Target, seconds: float) -> bool:
    """Wait until no call is in flight, for at most these seconds. Return False if that did not come."""
    end = time.monotonic() + seconds
    while not server.died:
        with suppress(OSError, HTTPException):  # the page may be overdue too
            if server.calls_in_flight() == 0:
                return True
        if time.monotonic() > end:
            break
        time.sleep(0.05)
    return False
