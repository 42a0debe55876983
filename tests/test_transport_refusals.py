"""Requests that are no gRPC calls, or wrong ones, sent by hand to the native transport."""

import gzip
import zlib

import grpc
import pytest

from serving.transport.frames import ErrorCode
from tests.raw_client import HEADERS, Raw, data, framed, headers, literal
from tests.transport_methods import Serving

REFUSED: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "a GET": ({":method": "GET"}, {":status": "405"}),
    "another content type": ({"content-type": "application/json"}, {":status": "415"}),
    "a content type that only begins alike": ({"content-type": "application/grpcs"}, {":status": "415"}),
    "an encoding that is not known": (
        {"grpc-encoding": "snappy"},
        {"grpc-status": "12", "grpc-accept-encoding": "identity,gzip,deflate"},
    ),
    "a timeout without a unit": ({"grpc-timeout": "100"}, {"grpc-status": "13"}),
    "a timeout with too many digits": ({"grpc-timeout": "123456789S"}, {"grpc-status": "13"}),
    "a deadline that has passed": ({"grpc-timeout": "0n"}, {"grpc-status": "4"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_call_is_answered(serving: Serving, raw: Raw, name: str) -> None:
    given, expected = REFUSED[name]
    raw.call(1, b"60", "/test.Test/Wait" if "deadline" in name else "/test.Test/Echo", *given.items())
    assert raw.read(1).headers.items() >= expected.items()
    raw.call(3, b"b")
    assert raw.read(3).messages == [b"b"]


@pytest.mark.parametrize("content", ["application/grpc+proto", "application/grpc;charset=utf-8"])
def test_other_spellings_of_the_content_type_are_taken(serving: Serving, raw: Raw, content: str) -> None:
    raw.call(1, b"a", "/test.Test/Echo", ("content-type", content))
    assert raw.read(1).messages == [b"a"]


def test_metadata_that_are_no_base64_reset_their_stream_alone(serving: Serving, raw: Raw) -> None:
    raw.call(1, b"a")
    for stream in (3, 5):  # the second time from memory, if it were remembered
        block = b"".join(literal(*field) for field in (*HEADERS, ("key-bin", "?")))
        raw.send(headers(stream, block) + data(stream, framed(b"a")))
        assert raw.read(stream).reset == ErrorCode.PROTOCOL_ERROR
    raw.call(7, b"b")
    assert raw.read(7).messages == [b"b"]


BODIES: dict[str, tuple[str, bytes, int]] = {
    "none": ("Echo", b"", 12),
    "two": ("Echo", framed(b"a") + framed(b"b"), 12),
    "half of one": ("Echo", framed(b"abc")[:-1], 3),
    "half of a prefix": ("Echo", b"\0\0", 3),
    "one and a half in a stream": ("EchoAll", framed(b"a") + framed(b"abc")[:-1], 3),
    "compressed, without saying how": ("Echo", framed(b"abc", compressed=True), 13),
    "a flag that means nothing": ("Echo", b"\2" + framed(b"abc")[1:], 13),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_not_the_messages_expected_are_refused(serving: Serving, raw: Raw, name: str) -> None:
    method, body, status = BODIES[name]
    raw.send(headers(1, raw.block(f"/test.Test/{method}")) + data(1, body))
    assert raw.read(1).headers["grpc-status"] == str(status)


@pytest.mark.parametrize(
    "body", [b"abc", b"", zlib.compress(b"abc"), gzip.compress(b"abc")[:-1], gzip.compress(b"") * 2]
)
def test_bytes_that_are_not_compressed_as_they_say_are_refused(serving: Serving, raw: Raw, body: bytes) -> None:
    raw.send(headers(1, raw.block("/test.Test/Echo", ("grpc-encoding", "gzip"))) + data(1, framed(body, True)))
    assert raw.read(1).headers["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
