"""``python -m benchmarks.soak.breaker PORT``: send broken requests, and look at every answer."""

import argparse
import base64
import binascii
import contextlib
import json
import os
import random
import re
import socket
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote

from hpack import Decoder
from hpack.exceptions import HPACKError

from benchmarks.attacks.link import cancel
from benchmarks.soak.broken import BROKEN, COSTLY, NEVER_OK, NOT_ANSWERED_BY_GRPCIO, Maker, last_words
from benchmarks.soak.inner_text import inner_text
from serving.transport import frames

#: The environment variable with the token.
TOKEN_VARIABLE = "BREAKER_TOKEN"
_BATCH = 64
_BATCHES_A_CONNECTION = 40
_LAST_WORDS_SHARE = 0.1
_CONNECT_SECONDS = 20.0
#: The client gives its requests up if nothing comes for this time, in seconds.
_SILENCE_SECONDS = 10.0
_READ_BYTES = 2**18
_READ_BESIDE_SECONDS = 0.01
_MAX_SHOWN = 20
_TEXT = re.compile(rb"[ -~]{12,}")


@dataclass
class Broken:
    """The results of a run.

    requests: their number. connections: opened. outcomes: by status, error code, or other end. kinds: requests by
    kind. faults: some of the answers that must not be. fault_count: the
    number of all of them.
    """

    requests: int = 0
    connections: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    fault_count: int = 0

    def fault(self, text: str) -> None:
        self.fault_count += 1
        if len(self.faults) < _MAX_SHOWN:
            self.faults.append(text)


class Connection:
    """A connection that sends batches of broken requests.

    optional: the kinds that need no answer. The client gives them up when all others have one.
    """

    def __init__(self, port: int, result: Broken, maker: Maker, optional: Collection[str]) -> None:
        self.closed = False
        self._optional = optional
        self._result, self._maker = result, maker
        self._decoder = Decoder(2**20)
        self._received = b""
        self._next_stream = 1
        self._open: dict[int, str] = {}
        self._socket = socket.create_connection(("127.0.0.1", port), _CONNECT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send(frames.PREFACE + frames.settings({}))
        result.connections += 1

    def close(self) -> None:
        self._socket.close()

    def batch(self, kinds: Iterable[str]) -> None:
        """Send a request of each kind, and read until each has ended, or the connection has."""
        sent = b""
        for kind in kinds:
            stream, self._next_stream = self._next_stream, self._next_stream + 2
            sent += BROKEN[kind](self._maker, stream)
            self._open[stream] = kind
            self._result.kinds[kind] += 1
            self._result.requests += 1
            if kind in ("given up", "own priority") or (kind == "broken health" and sent.endswith(cancel(stream))):
                del self._open[stream]  # its client does not wait
                self._result.outcomes["given up"] += 1
        self._send(sent)
        while not self.closed and any(kind not in self._optional for kind in self._open.values()):
            if not self._read(_SILENCE_SECONDS):
                break
        if self._open and not self.closed:
            self._give_up()
        self._result.outcomes["connection ended"] += len(self._open)
        self._open.clear()

    def _give_up(self) -> None:
        """Reset the requests that have no answer. They are faults, but for those that need none."""
        self._result.outcomes["no answer"] += len(self._open)
        for kind in self._open.values():
            if kind not in self._optional:
                self._result.fault(f"no answer to {kind}")
        self._send(b"".join(map(cancel, self._open)))
        self._open.clear()

    def break_off(self) -> None:
        """Break the connection, and read until the server has closed it."""
        self._send(last_words(self._maker))
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        while not self.closed:
            if not self._read(_SILENCE_SECONDS):
                self._result.fault("a broken connection that is not closed")
                self.closed = True

    def _send(self, sent: bytes) -> None:
        """Send bytes, and read meanwhile, so that the server is never waited for by both sides."""
        view = memoryview(sent)
        while view and not self.closed:
            self._socket.settimeout(_READ_BESIDE_SECONDS)
            try:
                view = view[self._socket.send(view) :]
            except TimeoutError:
                self._read(_READ_BESIDE_SECONDS)
            except OSError:
                self.closed = True

    def _read(self, seconds: float) -> bool:
        """Read what comes within some seconds. Return False if nothing has come."""
        self._socket.settimeout(seconds)
        try:
            read = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            return False
        except OSError:
            read = b""
        if not read:
            self.closed = True
        self._received += read
        at = 0
        while len(self._received) - at >= frames.HEAD.size:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(self._received, at)
            end = at + frames.HEAD.size + (high << 8 | low)
            if end > len(self._received):
                break
            self._take(kind, flags, stream, self._received[at + frames.HEAD.size : end])
            at = end
        self._received = self._received[at:]
        return True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.HEADERS:
            self._take_headers(flags, stream, payload)
        elif kind == frames.DATA:
            self._look(stream, " ".join(_texts_in(payload)))
            update = frames.window_update(0, len(payload)) if payload else b""
            with contextlib.suppress(OSError):
                self._socket.sendall(update)
        elif kind == frames.RST_STREAM:
            self._end(stream, f"RST {frames.read_number(payload, 'RST_STREAM')}")
        elif kind == frames.GOAWAY:
            self._look(0, payload[8:].decode("latin-1"))
        elif kind in (frames.SETTINGS, frames.PING) and not flags & frames.ACK:
            with contextlib.suppress(OSError):
                self._socket.sendall(frames.frame(kind, frames.ACK, 0, payload if kind == frames.PING else b""))

    def _take_headers(self, flags: int, stream: int, payload: bytes) -> None:
        try:
            fields = [(str(name), str(value)) for name, value in self._decoder.decode(payload)]
        except HPACKError as error:
            self._result.fault(f"headers that cannot be read: {error}")
            self.closed = True
            return
        for name, value in fields:
            self._look(stream, unquote(value))
            if name.endswith("-bin"):
                self._look(stream, _decoded(value))
        if flags & frames.END_STREAM:
            by_name = dict(fields)
            status = by_name.get("grpc-status")
            if status == "0" and self._open.get(stream) in NEVER_OK:
                self._result.fault(f"OK for {self._open[stream]}")
            self._end(stream, f"status {status}" if status else f"HTTP {by_name.get(':status')}")

    def _end(self, stream: int, outcome: str) -> None:
        if self._open.pop(stream, None) is not None:
            self._result.outcomes[outcome] += 1

    def _look(self, stream: int, text: str) -> None:
        if sign := inner_text(text):
            self._result.fault(f"inner text for {self._open.get(stream)}: {sign!r} in {text[:200]!r}")


def _texts_in(payload: bytes) -> list[str]:
    """Return the texts among binary data, such as the errors in a stream of answers."""
    return [found.decode() for found in _TEXT.findall(payload)]


def _decoded(value: str) -> str:
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4)).decode("latin-1")
    except (binascii.Error, ValueError):
        return value


def break_all(port: int, count: int, maker: Maker, optional: Collection[str] = ()) -> Broken:
    """Send ``count`` broken requests to a port of this machine. optional: see Connection.

    Raises OSError if the server is not there.
    """
    result = Broken()
    weights = [COSTLY.get(kind, 1.0) for kind in BROKEN]
    while result.requests < count:
        connection = Connection(port, result, maker, optional)
        for _ in range(_BATCHES_A_CONNECTION):
            connection.batch(maker.random.choices(list(BROKEN), weights, k=min(_BATCH, count - result.requests)))
            if connection.closed or result.requests >= count:
                break
            if maker.random.random() < _LAST_WORDS_SHARE:
                connection.break_off()
                break
        connection.close()
    return result


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.soak.breaker", description=__doc__)
    command.add_argument("port", type=int, help="the server's port on 127.0.0.1")
    command.add_argument("--count", type=int, default=1000, help="requests (default: 1000)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--grpcio", action="store_true", help="the server is gRPC's own, which leaves some unanswered")
    options = command.parse_args(arguments)
    token = os.environ.get(TOKEN_VARIABLE, "")
    fields = (("authorization", f"Bearer {token}"),) if token else ()
    optional = NOT_ANSWERED_BY_GRPCIO if options.grpcio else ()
    result = break_all(options.port, options.count, Maker(random.Random(options.seed), fields), optional)
    print(json.dumps(vars(result)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
