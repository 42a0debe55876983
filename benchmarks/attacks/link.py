"""A hostile client's connection, and the parts of the bytes that it sends."""

import gzip
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from hpack.hpack import encode_integer

from protos.capsnet.v1 import capsnet_pb2 as pb
from serving.transport import frames
from serving.transport.frames import ErrorCode
from serving.transport.messages import PREFIX

#: The pieces that a connection sends one after the other, each of whole frames; a number is a pause in seconds.
Pieces = Iterator[bytes | float]
#: The ports of a server.
Port = Literal["grpc", "http", "metrics"]
Script = Callable[["Link"], Pieces]
#: Makes a message with gRPC's prefix, or nothing for a call without one.
Message = Callable[[], bytes]

CLASSIFY = "/capsnet.v1.CapsNetService/Classify"
CLASSIFY_STREAM = "/capsnet.v1.CapsNetService/ClassifyStream"
INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
EXPLAIN = "/capsnet.v1.CapsNetService/Explain"
RECONSTRUCT = "/capsnet.v1.CapsNetService/Reconstruct"
GET_MODEL = "/capsnet.v1.CapsNetService/GetModel"
CHECK = "/grpc.health.v1.Health/Check"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_MAX_CONNECTIONS = 5000
#: Pause of a script that waits for the server, in seconds.
WAIT_SECONDS = 0.02

#: The width and height of the images.
SIDE = 28
_PIXELS = SIDE * SIDE
#: An image none of which is ground, so that its relevance takes the most images.
INK = b"\x80" * (_PIXELS - 1) + b"\xff"
_READ_BYTES = 2**18
_MAX_UPLOADED_BYTES = 2**16  # of a piece


@dataclass(frozen=True)
class Attack:
    """A kind of attack.

    script: the bytes of one connection. speaks: the connection opens with HTTP/2's preface, these settings and a wide
    window, and its peer's frames are read. times: connections for each one that is asked for. least: the fewest
    connections. server: the kind of server that is attacked, one of ``served.KINDS``. port: the port that is attacked.
    record_bytes: the most bytes of a TLS record; a connection that speaks to a server with TLS, or to its other ports,
    is encrypted.
    """

    name: str
    script: Script
    speaks: bool = True
    settings: Mapping[int, int] = field(default_factory=dict)
    times: int = 1
    least: int = 1
    server: str = "plain"
    port: Port = "grpc"
    record_bytes: int = 2**14

    def sockets(self, connections: int) -> int:
        """Return the number of open connections, if so many are asked for."""
        return min(_MAX_CONNECTIONS, max(self.least, connections * self.times))


class Link:
    """A connection whose script has not ended.

    window, stream_window: bytes that the server takes on the connection, and on each new stream. max_streams: the
    server's limit. settled: True once the server has told its limits. reads: the script may set it to False. sent:
    bytes sent. silent: True once the script has ended. closed: True once the connection has ended. hung_up: True if
    the script has ended it.
    """

    def __init__(self, port: int, attack: Attack) -> None:
        self.attack = attack
        self.window = self.stream_window = frames.DEFAULT_WINDOW
        self.max_streams = frames.MAX_STREAM
        self.settled = self.silent = self.closed = self.hung_up = False
        self.reads = True
        self.sent = 0
        #: The bytes that the server takes on each stream of ``open``.
        self.windows: dict[int, int] = {}
        self._stream = -1
        self._received = b""
        # The handshakes of gRPC's port are attacks of their own.
        encrypted = (attack.port != "grpc" or attack.speaks) and attack.server == "tls"
        self._encryption = _Encryption("h2" if attack.port == "grpc" else "http/1.1") if encrypted else None
        self._opening = _opening(attack.settings) if attack.speaks else b""
        self._unsent = memoryview(self._encryption.receive(b"")[0] if self._encryption else self._opening)
        self._replies = b""
        self._pieces = attack.script(self)
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(("127.0.0.1", port))

    def next_stream(self) -> int:
        self._stream += 2
        return self._stream

    def open(self) -> int:
        """Return the next stream, whose window is kept in ``windows`` until the server ends it."""
        stream = self.next_stream()
        self.windows[stream] = self.stream_window
        return stream

    def hang_up(self) -> None:
        """End the connection, so that a new one takes its place at once."""
        self.closed = self.hung_up = True

    @property
    def has_replies(self) -> bool:
        return bool(self._replies)

    def send(self) -> float | None:
        """Send a piece. Return the seconds to pause, or None if the script has ended.

        Raises BlockingIOError if the server reads nothing now. The end of the connection sets ``closed``.
        """
        if not self._unsent:
            if self._replies:
                self._unsent, self._replies = memoryview(self._replies), b""
            elif self._encryption and not self._encryption.ready:
                return WAIT_SECONDS
            else:
                piece = self._take_opening() or next(self._pieces, None)
                if not isinstance(piece, bytes):
                    self.silent = piece is None
                    return piece
                self._unsent = memoryview(self._written(piece))
        try:
            count = self.socket.send(self._unsent)
        except BlockingIOError:
            raise
        except OSError:
            self.closed = True
            return 0
        self.sent += count
        self._unsent = self._unsent[count:]
        return 0

    def receive(self) -> None:
        """Read the bytes that have come. The end of the connection sets ``closed``."""
        try:
            read = self.socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            read = b""
        if not read:
            self.closed = True
            return
        if self._encryption:
            replies, read = self._encryption.receive(read)
            self._replies += replies
        if self.attack.speaks:
            self._received = self._read_frames(self._received + read)

    def _take_opening(self) -> bytes:
        """Return the first bytes inside of TLS, once."""
        opening, self._opening = self._opening if self._encryption else b"", b""
        return opening

    def _written(self, data: bytes) -> bytes:
        """Return bytes as they are sent."""
        return self._encryption.encrypted(data, self.attack.record_bytes) if self._encryption else data

    def _read_frames(self, data: bytes) -> bytes:
        """Take note of all whole frames, and return the rest."""
        at = 0
        while len(data) - at >= frames.HEAD.size:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(data, at)
            end = at + frames.HEAD.size + (high << 8 | low)
            if end > len(data):
                break
            if kind in (frames.SETTINGS, frames.PING, frames.WINDOW_UPDATE):
                self._control(kind, flags, stream, data[at + frames.HEAD.size : end])
            elif kind == frames.RST_STREAM or (kind in (frames.HEADERS, frames.DATA) and flags & frames.END_STREAM):
                self.windows.pop(stream, None)
            at = end
        return data[at:]

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == frames.WINDOW_UPDATE:
            more = frames.read_number(payload, "WINDOW_UPDATE")
            if stream == 0:
                self.window += more
            elif stream in self.windows:
                self.windows[stream] += more
        elif not flags & frames.ACK:
            reply = frames.frame(kind, frames.ACK, 0, payload if kind == frames.PING else b"")
            self._replies += self._written(reply)
            if kind == frames.SETTINGS:
                values = dict(frames.read_settings(payload))
                before, self.stream_window = (
                    self.stream_window,
                    values.get(frames.INITIAL_WINDOW_SIZE, self.stream_window),
                )
                for one in self.windows:
                    self.windows[one] += self.stream_window - before
                self.max_streams = values.get(frames.MAX_CONCURRENT_STREAMS, self.max_streams)
                self.settled = True

    def ready(self) -> Pieces:
        """Wait for the server's limits."""
        while not self.settled:
            yield WAIT_SECONDS

    def room(self, size: int) -> Pieces:
        """Wait until the connection's window has room for data, and take it."""
        while self.window < size:
            yield WAIT_SECONDS
        self.window -= size


class _Encryption:
    """The client's side of TLS, without a socket. protocol: for ALPN. ready: True once the handshake has ended."""

    def __init__(self, protocol: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols([protocol])
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing)
        self.ready = False

    def receive(self, data: bytes) -> tuple[bytes, bytes]:
        """Take the peer's bytes. Return what is to be sent, and their content."""
        self._incoming.write(data)
        content = b""
        try:
            if not self.ready:
                self._tls.do_handshake()
                self.ready = True
            while read := self._tls.read(_READ_BYTES):
                content += read
        except ssl.SSLError:  # mostly since more must come; the peer ends a connection that is broken
            pass
        return self._outgoing.read(), content

    def encrypted(self, data: bytes, record_bytes: int) -> bytes:
        """Return bytes as they are sent, in records of at most this size."""
        for begin in range(0, len(data), record_bytes):
            self._tls.write(data[begin : begin + record_bytes])
        return self._outgoing.read()


def _opening(settings: Mapping[int, int]) -> bytes:
    """Return the first bytes of a client: preface, settings, and the widest window of the connection."""
    wide = frames.window_update(0, frames.MAX_WINDOW - frames.DEFAULT_WINDOW)
    return frames.PREFACE + frames.settings(dict(settings)) + wide


def text(value: str) -> bytes:
    """Return a string of HPACK, not compressed (RFC 7541, section 5.2)."""
    encoded = value.encode()
    return bytes(encode_integer(len(encoded), 7)) + encoded


def literal(name: str, value: str) -> bytes:
    """Return a header that is not kept in the table (RFC 7541, section 6.2.2)."""
    return b"\0" + text(name) + text(value)


def block(path: str, *more: tuple[str, str]) -> bytes:
    """Return the header block of a call, which leaves the server's table as it is."""
    usual = (("content-type", "application/grpc"), ("te", "trailers"))
    known = b"\x83\x86\x04" + text(path) + b"\x01" + text("localhost")
    return known + b"".join(literal(*one) for one in (*usual, *more))


def headers(stream: int, path: str, *more: tuple[str, str], end: bool = False) -> bytes:
    """Return the frame that begins a call. end: the call has no message."""
    return frames.header_frames(stream, block(path, *more), end)


def data(stream: int, payload: bytes, end: bool = True) -> bytes:
    """Return the DATA frames of a message. end: they end the stream."""
    pieces = [payload[at : at + frames.MAX_FRAME_BYTES] for at in range(0, len(payload), frames.MAX_FRAME_BYTES)]
    last = frames.END_STREAM if end else 0
    return b"".join(
        frames.frame(frames.DATA, last if number == len(pieces) - 1 else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )


def cancel(stream: int) -> bytes:
    """Return the frame by which a client resets a call."""
    return frames.reset(stream, ErrorCode.CANCEL)


def framed(message: bytes, compressed: bool = False) -> bytes:
    """Return a message with gRPC's prefix."""
    return PREFIX.pack(compressed, len(message)) + message


@cache
def zipped(repeated: bytes, size: int) -> bytes:
    """Return a message of some repeated bytes, of this size at most, compressed by gzip, with gRPC's prefix."""
    return framed(gzip.compress(repeated * (size // len(repeated)), mtime=0), True)


def request(images: int = 1) -> bytes:
    """Return the message of a Classify call, with gRPC's prefix."""
    return framed(pb.ClassifyRequest(images=[pb.Image(pixels=bytes(_PIXELS))] * images).SerializeToString())


def stream_request(images: int = 1) -> bytes:
    """Return a message of a ClassifyStream call, with gRPC's prefix."""
    asked = pb.ClassifyRequest(images=[pb.Image(pixels=bytes(_PIXELS))] * images)
    return framed(pb.ClassifyStreamRequest(id="1", request=asked).SerializeToString())


def priority(stream: int) -> bytes:
    """Return a PRIORITY frame (RFC 9113, section 6.3)."""
    return frames.frame(frames.PRIORITY, 0, stream, struct.pack(">IB", 0, 15))


def uploads(link: Link, path: str, make: Message, *more: tuple[str, str]) -> Pieces:
    """Send large messages on as many streams as the server allows, as fast as it takes them.

    Streams do not end: each gets one message after the other.
    """
    yield from link.ready()
    message, endless = make(), path in (CLASSIFY_STREAM, STREAM_INFER)
    sent: dict[int, int] = {}  # by stream, the bytes of its message
    while True:
        piece = b""
        while len(sent) < link.max_streams and len(piece) < _MAX_UPLOADED_BYTES:
            stream = link.open()
            sent[stream] = 0
            piece += headers(stream, path, *more)
        for stream, begin in list(sent.items()):
            size = min(len(message) - begin, link.windows.get(stream, 0), link.window, frames.MAX_FRAME_BYTES)
            if size > 0:
                complete = begin + size == len(message)
                link.window -= size
                link.windows[stream] -= size
                piece += data(stream, message[begin : begin + size], complete and not endless)
                sent[stream] = 0 if complete else begin + size
            if stream not in link.windows or (size > 0 and complete and not endless):
                del sent[stream]
            if len(piece) >= _MAX_UPLOADED_BYTES:
                break
        yield piece or WAIT_SECONDS
