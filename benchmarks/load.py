"""Load for a gRPC server: ``h2load`` for unary calls, our own client for streams and for the status of single calls.

The server shares the cores with the client, and grpcio's client takes about as much CPU time for a call as the server.
So our client makes the bytes of a request once, and reads only the status of an answer. ``python -m benchmarks.load``
runs it in a process of its own, which prints its measurements as JSON.
"""

import argparse
import json
import re
import resource
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

H2LOAD = "h2load"
H2LOAD_MISSING = "h2load is not installed; it comes with nghttp2 (Debian and Ubuntu: apt install nghttp2-client)"
PERCENTILES = (50, 95, 99)
#: The prefix of an address that is served over TLS.
TLS_PREFIX = "tls:"
#: The most connections that calls are spread over.
MAX_CONNECTIONS = 4

_MAX_H2LOAD_SECONDS = 120
_GRPC_HEADERS = ("content-type: application/grpc", "te: trailers")
_OCTET_STREAM_HEADERS = ("content-type: application/octet-stream",)
_PREFIX_BYTES = 5  # before each message: a flag for compression, and the length
_OK_STATUS = 0


class LoadError(RuntimeError):
    """A load failed. The text says what came and what was expected."""


@dataclass(frozen=True)
class Sample:
    """One load: ``requests`` requests were answered OK in ``seconds`` seconds.

    percentiles_ms: the 50th, 95th and 99th percentile of the latencies.
    """

    requests: int
    seconds: float
    percentiles_ms: tuple[float, float, float]
    client_cpu_seconds: float


@dataclass(frozen=True, eq=False)
class Flood:
    """Calls at a fixed rate: ``calls`` in all, ``rate`` a second, the last answered after ``seconds`` seconds.

    latencies_ms: the latency of each answer, whatever its status.
    """

    calls: int
    rate: float
    seconds: float
    latencies_ms: NDArray[np.float64]


@dataclass
class Probes:
    """Calls that were timed one by one.

    latencies_ms: the latencies of the answers within the deadline, in order of arrival, by gRPC status code.
    expired: the number of calls without an answer at their deadline.
    """

    calls: int = 0
    expired: int = 0
    latencies_ms: dict[int, list[float]] = field(default_factory=dict)


def framed(message: bytes) -> bytes:
    """Return a message with gRPC's prefix, not compressed."""
    return struct.pack(">BI", 0, len(message)) + message


def percentiles(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    p50, p95, p99 = np.percentile(milliseconds, PERCENTILES).tolist()
    return p50, p95, p99


def children_cpu_seconds() -> float:
    """Return the CPU time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def h2load(
    target: str,
    path: str,
    body: Path,
    in_flight: int,
    requests: int,
    http1: bool = False,
    deadline: float | None = None,
) -> Sample:
    """Make unary calls with ``h2load``: ``in_flight`` at a time, ``requests`` in all.

    h2load checks the status of HTTP, not that of gRPC.

    target: ``HOST:PORT``, ``unix:PATH``, or ``tls:HOST:PORT`` for TLS, where h2load does not check the certificate.
    body: a file with the body of each request.
    http1: send HTTP/1.1 POST requests instead of gRPC calls, one at a time on each connection.
    deadline: the deadline of each call, in seconds.

    Raises LoadError if a call fails in HTTP, if h2load fails, or if calls stay unanswered for too long.
    """
    connections = in_flight if http1 else min(in_flight, MAX_CONNECTIONS)
    streams = -(-in_flight // connections)
    flags = [f"--clients={connections}", f"--max-concurrent-streams={streams}", *(["--h1"] if http1 else [])]
    headers = _OCTET_STREAM_HEADERS if http1 else _grpc_headers(deadline)
    before = children_cpu_seconds()
    start, duration = _h2load(flags, target, path, headers, body, requests, _MAX_H2LOAD_SECONDS)
    cpu_seconds = children_cpu_seconds() - before
    seconds = float((start + duration).max() - start.min())
    return Sample(requests, seconds, percentiles((1000 * duration).tolist()), cpu_seconds)


def flood(target: str, path: str, body: Path, rate: float, calls: int, deadline: float) -> Flood:
    """Make ``calls`` unary calls at ``rate`` a second with ``h2load``, without waiting for answers.

    Every 10 ms each connection sends the calls that are due. deadline: the deadline of each call, in seconds. Raises
    LoadError.
    """
    flags = [f"--clients={MAX_CONNECTIONS}", f"--max-concurrent-streams={calls}", f"--rps={rate / MAX_CONNECTIONS}"]
    start, duration = _h2load(
        flags, target, path, _grpc_headers(deadline), body, calls, calls / rate + _MAX_H2LOAD_SECONDS
    )
    begin = start.min()
    took = start.max() - begin
    return Flood(calls, float(calls / took) if took else rate, float((start + duration).max() - begin), 1000 * duration)


def _grpc_headers(deadline: float | None) -> tuple[str, ...]:
    return _GRPC_HEADERS if deadline is None else (*_GRPC_HEADERS, f"grpc-timeout: {round(1000 * deadline)}m")


def _h2load(
    flags: list[str], target: str, path: str, headers: Sequence[str], body: Path, requests: int, seconds: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the start and the duration of each call, in seconds. Raises LoadError."""
    scheme, host = "http", "localhost" if target.startswith("unix:") else target
    if target.startswith(TLS_PREFIX):
        scheme, host = "https", target.removeprefix(TLS_PREFIX)
    url = f"{scheme}://{host}{path}"
    command = [
        H2LOAD,
        f"--requests={requests}",
        f"--data={body}",
        *flags,
        *(f"--header={header}" for header in headers),
    ]
    command += [f"--base-uri={target}"] if target.startswith("unix:") else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        try:
            result = subprocess.run(
                [*command, f"--log-file={log}", url], capture_output=True, text=True, check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"h2load: {requests} requests were not answered in {seconds:.0f} s") from error
        counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", result.stdout)
        if result.returncode or not counts or (int(counts[1]), int(counts[2]), int(counts[3])) != (requests, 0, 0):
            raise LoadError(f"h2load: expected {requests} requests that succeed: {result.stdout}{result.stderr}")
        start, _, duration = np.loadtxt(log, dtype=np.int64, ndmin=2).T  # microseconds
    return start / 1e6, duration / 1e6


def h2load_version() -> str | None:
    """Return the version of h2load, or None if it is not installed."""
    if not shutil.which(H2LOAD):
        return None
    return subprocess.run([H2LOAD, "--version"], capture_output=True, text=True, check=True).stdout.strip()


def in_own_process(*arguments: object) -> Any:
    """Run ``python -m benchmarks.load`` and return what it prints. Raises LoadError with its message if it fails."""
    command = [sys.executable, "-m", "benchmarks.load", *map(str, arguments)]
    result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LoadError(result.stderr.strip().rpartition("\n")[2])
    return json.loads(result.stdout)


_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_HEADER_TABLE_SIZE, _ENABLE_PUSH, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 1, 2, 3, 4
_CANCEL = 8
#: The gRPC status code for each HTTP/2 error code of a reset.
_STATUS_OF_RESET = {7: 14, 8: 1, 11: 8}
_INTERNAL_STATUS = 13
_FRAME_HEADER = struct.Struct(">HBBBI")  # 24 bits of length in two parts, type, flags, stream
_MAX_FRAME_BYTES = 16384
_MAX_WINDOW_BYTES = 2**31 - 1
_DEFAULT_WINDOW_BYTES = 65535


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _FRAME_HEADER.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def _setting(identifier: int, value: int) -> bytes:
    return struct.pack(">HI", identifier, value)


class _Connection:
    """An unencrypted HTTP/2 connection with prior knowledge. It does only what a benchmark needs.

    Raises LoadError if the server closes it or sends more than 2 GiB.
    """

    def __init__(self, target: str) -> None:
        if target.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(target.removeprefix("unix:"))
        else:
            host, _, port = target.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.next_stream = 1
        #: The server's limits on open streams, and on bytes to send.
        self.max_streams = _MAX_WINDOW_BYTES
        self.window = _DEFAULT_WINDOW_BYTES
        self.stream_window = _DEFAULT_WINDOW_BYTES
        #: Bytes that single streams may send beyond ``stream_window``.
        self.granted: dict[int, int] = {}
        self._may_receive = _MAX_WINDOW_BYTES
        self._received = b""
        #: True once the server has sent its settings.
        self.settled = False
        self._unsent = bytearray(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        # With a header table of 0 bytes the server writes each header in full, so that the status is found by its name.
        settings = ((_HEADER_TABLE_SIZE, 0), (_ENABLE_PUSH, 0), (_INITIAL_WINDOW_SIZE, _MAX_WINDOW_BYTES))
        self.send(_frame(_SETTINGS, 0, 0, b"".join(_setting(*setting) for setting in settings)))
        self.send(_frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _MAX_WINDOW_BYTES - _DEFAULT_WINDOW_BYTES)))

    @property
    def sending(self) -> bool:
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send data now, or as soon as the socket has room."""
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        if not self._unsent:
            return
        try:
            del self._unsent[: self.socket.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            raise LoadError(f"the server closed the connection: {error.strerror}") from error

    @staticmethod
    def wait(connections: "Sequence[_Connection]", seconds: float) -> "list[tuple[_Connection, int, int, int, bytes]]":
        """Wait at most ``seconds`` and return the frames that came: connection, type, flags, stream and payload."""
        sockets = {one.socket: one for one in connections}
        readable, writable, _ = select.select(sockets, [one.socket for one in connections if one.sending], [], seconds)
        for ready in writable:
            sockets[ready].flush()
        return [(one, *frame) for one in map(sockets.__getitem__, readable) for frame in one._receive()]

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            read = self.socket.recv(2**20)
        except BlockingIOError:
            return
        except OSError as error:
            raise LoadError(f"the server closed the connection: {error.strerror}") from error
        if not read:
            raise LoadError("the server closed the connection")
        data = self._received + read if self._received else read
        at, end = 0, len(data)
        while end - at >= _FRAME_HEADER.size:
            high, low, kind, flags, stream = _FRAME_HEADER.unpack_from(data, at)
            after = at + _FRAME_HEADER.size + (high << 8 | low)
            if after > end:
                break
            payload = data[at + _FRAME_HEADER.size : after]
            at = after
            if kind in (_DATA, _HEADERS, _RST_STREAM):
                if kind == _DATA:
                    self._may_receive -= len(payload)
                yield kind, flags, stream, payload
            else:
                self._control(kind, flags, stream, payload)
        self._received = data[at:]
        if self._may_receive < _MAX_FRAME_BYTES:
            raise LoadError("the server sent more than 2 GiB; expected a shorter sample")

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            for at in range(0, len(payload), 6):
                identifier, value = struct.unpack_from(">HI", payload, at)
                if identifier == _MAX_CONCURRENT_STREAMS:
                    self.max_streams = value
                elif identifier == _INITIAL_WINDOW_SIZE:
                    self.stream_window = value
            self.settled = True
            self.send(_frame(_SETTINGS, _ACK, 0))
        elif kind == _PING and not flags & _ACK:
            self.send(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream == 0:
                self.window += more
            else:
                self.granted[stream] = self.granted.get(stream, 0) + more
        elif kind == _GOAWAY:
            raise LoadError(f"the server ended the connection (GOAWAY): {payload[8:]!r}")


@contextmanager
def _connected(target: str) -> Iterator[_Connection]:
    """Open a connection and wait for the server's limits."""
    link = _Connection(target)
    try:
        while not link.settled:
            _Connection.wait([link], 1.0)
        yield link
    finally:
        link.socket.close()


def _header_block(path: str, timeout_ms: int | None = None) -> bytes:
    """Return the header block of a call. Each header is in full, or an index in HPACK's static table (RFC 7541)."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    block = b"\x83\x86\x04" + text(path) + b"\x01" + text("localhost")
    block += b"\x0f\x10" + text("application/grpc") + b"\x00" + text("te") + text("trailers")
    if timeout_ms is not None:
        block += b"\x00" + text("grpc-timeout") + text(f"{timeout_ms}m")
    return block


def _unary(path: str, body: bytes, timeout_ms: int) -> list[bytes]:
    """Return the bytes of a call, cut at each place where the stream's number belongs."""
    block = _header_block(path, timeout_ms)
    parts = [_frame(_HEADERS, _END_HEADERS, 0, block)]
    for at in range(0, len(body), _MAX_FRAME_BYTES):
        last = at + _MAX_FRAME_BYTES >= len(body)
        parts.append(_frame(_DATA, _END_STREAM if last else 0, 0, body[at : at + _MAX_FRAME_BYTES]))
    pieces = [b""]
    for part in parts:
        pieces[-1] += part[:5]
        pieces.append(part[9:])
    return pieces


@lru_cache(1024)
def _status(trailers: bytes) -> int:
    """Return gRPC's status code from trailers. Raises LoadError if the trailers do not hold it in full."""
    found = re.search(rb"grpc-status[\x01\x02](\d+)", trailers)
    if not found:
        raise LoadError(f"the server's trailers hold no grpc-status in plain: {trailers!r}")
    return int(found[1])


def probe(target: str, path: str, body: bytes, rate: float, seconds: float, deadline: float) -> Probes:
    """Make unary calls at ``rate`` a second for ``seconds`` seconds, without waiting for answers.

    A call is cancelled ``deadline`` seconds after the time at which it was due. Raises LoadError, also if the server's
    limits on streams and bytes hold a call back.
    """
    with _connected(target) as link:
        return _probe(link, _unary(path, body, round(1000 * deadline)), len(body), rate, seconds, deadline)


def _probe(link: _Connection, pieces: list[bytes], size: int, rate: float, seconds: float, deadline: float) -> Probes:
    result = Probes()
    open_calls: dict[int, float] = {}  # by stream, the time at which it was due; the oldest first
    begin = time.perf_counter()
    total = round(rate * seconds)
    while result.calls < total or open_calls:
        now = time.perf_counter()
        while result.calls < total and (arrival := begin + result.calls / rate) <= now:
            if link.window < size or len(open_calls) >= link.max_streams:
                raise LoadError(f"the server does not let this client open more than {len(open_calls)} calls")
            link.window -= size
            open_calls[link.next_stream] = arrival
            link.send(link.next_stream.to_bytes(4).join(pieces))
            link.next_stream += 2
            result.calls += 1
        for stream, arrival in list(open_calls.items()):
            if now < arrival + deadline:
                break
            del open_calls[stream]
            result.expired += 1
            link.send(_frame(_RST_STREAM, 0, stream, struct.pack(">I", _CANCEL)))
        events = [begin + result.calls / rate] if result.calls < total else []
        events += [arrival + deadline for arrival in islice(open_calls.values(), 1)]
        frames = _Connection.wait([link], max(0.0, min(events, default=now) - now))
        now = time.perf_counter()
        for _, kind, flags, stream, payload in frames:
            if kind == _DATA or not (kind == _RST_STREAM or flags & _END_STREAM) or stream not in open_calls:
                continue
            latency = now - open_calls.pop(stream)
            if latency > deadline:
                result.expired += 1
            else:
                code = (
                    _STATUS_OF_RESET.get(int.from_bytes(payload), _INTERNAL_STATUS)
                    if kind == _RST_STREAM
                    else _status(payload)
                )
                result.latencies_ms.setdefault(code, []).append(1000 * latency)
    return result


def in_streams(
    target: str, path: str, body: bytes, streams: int, in_flight: int, seconds: float, answer: int = 0x12
) -> Sample:
    """Run ``streams`` bidirectional streams in one connection, which share ``in_flight`` messages in flight.

    answer: the first byte of each answer that is not an error. Raises LoadError if another one comes, or if a stream
    ends with a status other than OK.
    """
    with _connected(target) as link:
        return _in_streams(link, path, body, streams, in_flight, seconds, answer)


def _in_streams(
    link: _Connection, path: str, body: bytes, streams: int, in_flight: int, seconds: float, answer: int
) -> Sample:
    pieces = [body[at : at + _MAX_FRAME_BYTES] for at in range(0, len(body), _MAX_FRAME_BYTES)]
    numbers = range(1, 2 * streams, 2)
    message = {stream: b"".join(_frame(_DATA, 0, stream, piece) for piece in pieces) for stream in numbers}
    room = {stream: link.stream_window for stream in numbers}
    in_flight_since: dict[int, deque[float]] = {stream: deque() for stream in numbers}
    buffers = {stream: b"" for stream in numbers}
    still_open = set(numbers)
    closed = False
    share = -(-in_flight // streams)
    latencies: list[float] = []
    cpu, begin = time.process_time(), time.perf_counter()
    for stream in numbers:
        link.send(_frame(_HEADERS, _END_HEADERS, stream, _header_block(path)))
    while still_open:
        now = time.perf_counter()
        if now - begin < seconds:
            for stream in numbers:
                room[stream] += link.granted.pop(stream, 0)
                allowed = min(link.window, room[stream]) // len(body)
                count = max(0, min(share - len(in_flight_since[stream]), allowed))
                in_flight_since[stream].extend([now] * count)
                link.window -= count * len(body)
                room[stream] -= count * len(body)
                link.send(message[stream] * count)
        elif not closed:
            closed = True
            for stream in numbers:
                link.send(_frame(_DATA, _END_STREAM, stream))
        frames = _Connection.wait([link], 0.05)
        now = time.perf_counter()
        for _, kind, flags, stream, payload in frames:
            if kind == _DATA:
                data = buffers[stream] + payload
                at = 0
                while len(data) - at > _PREFIX_BYTES:
                    after = at + _PREFIX_BYTES + int.from_bytes(data[at + 1 : at + _PREFIX_BYTES])
                    if after > len(data):
                        break
                    if data[at + _PREFIX_BYTES] != answer:
                        raise LoadError(f"a stream answered with an error: {data[at + _PREFIX_BYTES : after]!r}")
                    latencies.append(1000 * (now - in_flight_since[stream].popleft()))
                    at = after
                buffers[stream] = data[at:]
            elif kind == _RST_STREAM or flags & _END_STREAM:
                if kind == _RST_STREAM or not closed or _status(payload) != _OK_STATUS or in_flight_since[stream]:
                    raise LoadError(
                        f"a stream ended with {len(in_flight_since[stream])} messages unanswered: {payload!r}"
                    )
                still_open.discard(stream)
    return Sample(len(latencies), now - begin, percentiles(latencies), time.process_time() - cpu)


def main(arguments: list[str] | None = None) -> int:
    command = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    kinds = command.add_subparsers(dest="kind", required=True)
    for kind, text in (("probe", "unary calls, one by one"), ("streams", "streams, a window of messages in each")):
        one = kinds.add_parser(kind, help=text)
        one.add_argument("target", help="HOST:PORT or unix:PATH")
        one.add_argument("path", help="the method, /PACKAGE.SERVICE/METHOD")
        one.add_argument("body", type=Path, help="file with the message, framed as gRPC does")
        one.add_argument("--seconds", type=float, required=True)
        if kind == "probe":
            one.add_argument("--rate", type=float, required=True, help="calls a second")
            one.add_argument("--deadline", type=float, required=True, help="seconds for each")
        else:
            one.add_argument("--streams", type=int, required=True)
            one.add_argument("--in-flight", type=int, required=True, help="messages in flight, in all streams together")
    options = command.parse_args(arguments)
    body = options.body.read_bytes()
    result: Sample | Probes
    try:
        if options.kind == "probe":
            result = probe(options.target, options.path, body, options.rate, options.seconds, options.deadline)
        else:
            result = in_streams(options.target, options.path, body, options.streams, options.in_flight, options.seconds)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
