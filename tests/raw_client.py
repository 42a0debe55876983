"""A client of HTTP/2 whose frames are made by hand, right or wrong, and helpers for calls by gRPC's own client."""

import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hpack import Decoder, Encoder

from serving.transport import frames
from serving.transport.frames import ErrorCode

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", "/test.Test/Echo"),
    (":authority", "localhost"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]


class Answer:
    """The frames that came for one stream."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = b""
        self.ended = False
        self.reset: int | None = None

    @property
    def messages(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.data):
            (size,) = struct.unpack_from(">I", self.data, at + 1)
            found.append(self.data[at + 5 : at + 5 + size])
            at += 5 + size
        return found


class Raw:
    """A client that sends any frames, right or wrong."""

    def __init__(self, port: int, preface: bytes = frames.PREFACE, settings: dict[int, int] | None = None) -> None:
        self.take(socket.create_connection(("127.0.0.1", port), 10), preface, settings)

    def take(
        self, link: socket.socket, preface: bytes = frames.PREFACE, settings: dict[int, int] | None = None
    ) -> None:
        """Send the preface on an existing connection."""
        self.socket = link
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder, self.decoder = Encoder(), Decoder()
        self.answers: dict[int, Answer] = defaultdict(Answer)
        self.went_away: list[tuple[int, ErrorCode, bytes]] = []
        self.pings: list[bytes] = []
        self.updates: dict[int, int] = defaultdict(int)
        self.closed = False
        self._received = b""
        self.send(preface + frames.settings(settings or {}))

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def block(self, path: str = "/test.Test/Echo", *more: tuple[str, str], without: tuple[str, ...] = ()) -> bytes:
        named = dict(more)
        fields = [(name, named.pop(name, value)) for name, value in HEADERS if name not in without]
        fields = [(name, path if name == ":path" else value) for name, value in fields]
        block: bytes = self.encoder.encode([*fields, *named.items()])
        return block

    def call(self, stream: int, message: bytes, path: str = "/test.Test/Echo", *more: tuple[str, str]) -> None:
        self.send(frames.frame(frames.HEADERS, frames.END_HEADERS, stream, self.block(path, *more)))
        self.send_data(stream, framed(message))

    def send_data(self, stream: int, sent: bytes, last: bool = True) -> None:
        """Send data in frames of the usual size. last: the data are the stream's last."""
        for at in range(0, len(sent), frames.MAX_FRAME_BYTES):
            end = last and at + frames.MAX_FRAME_BYTES >= len(sent)
            self.send(data(stream, sent[at : at + frames.MAX_FRAME_BYTES], frames.END_STREAM if end else 0))

    def read(self, stream: int | None = None) -> Answer:
        """Receive until the stream has ended, or the connection."""
        while not self.closed and not (
            stream and (self.answers[stream].ended or self.answers[stream].reset is not None)
        ):
            self.read_some()
        return self.answers[stream or 0]

    def read_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert not self.closed, self.went_away
            self.read_some()

    def read_some(self) -> None:
        try:
            data = self.socket.recv(2**16)
        except ConnectionResetError:
            data = b""
        self.closed = not data
        self._received += data
        while len(self._received) >= 9:
            high, low, kind, flags, stream = frames.HEAD.unpack_from(self._received)
            end = 9 + (high << 8 | low)
            if len(self._received) < end:
                break
            payload, self._received = self._received[9:end], self._received[end:]
            self._take(kind, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        answer = self.answers[stream] if stream else Answer()
        if kind == frames.HEADERS:
            assert flags & frames.END_HEADERS
            answer.headers |= {str(name): str(value) for name, value in self.decoder.decode(payload)}
        elif kind == frames.DATA:
            answer.data += payload
        elif kind == frames.RST_STREAM:
            answer.reset = frames.read_number(payload, "RST_STREAM")
        elif kind == frames.GOAWAY:
            last, code = struct.unpack_from(">II", payload)
            self.went_away.append((last, ErrorCode(code), payload[8:]))
        elif kind == frames.PING:
            self.pings.append(payload)
            if not flags & frames.ACK:
                self.send(frames.frame(frames.PING, frames.ACK, 0, payload))
        elif kind == frames.WINDOW_UPDATE:
            self.updates[stream] += frames.read_number(payload, "WINDOW_UPDATE")
        if kind in (frames.HEADERS, frames.DATA) and flags & frames.END_STREAM:
            answer.ended = True

    def why_closed(self) -> ErrorCode:
        self.read()
        return self.went_away[-1][1]


def framed(message: bytes, compressed: bool = False) -> bytes:
    return struct.pack(">BI", compressed, len(message)) + message


def headers(stream: int, block: bytes, flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream, block)


def literal(name: str, value: str) -> bytes:
    """Written by hand, since the library makes names small."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def data(stream: int, payload: bytes, flags: int = frames.END_STREAM) -> bytes:
    return frames.frame(frames.DATA, flags, stream, payload)


def failure(call: Any, request: bytes, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=options.pop("timeout", 10), **options)
    error: grpc.RpcError = caught.value
    return error


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.005)
